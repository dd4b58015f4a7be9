"""`AmortizedFlow`: the posterior for all data at once, learned from simulations of the model."""

import hashlib
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned.amortized import Conditional, fit_conditional
from pushforward.learned.embeddings import Embedding, Vector
from pushforward.learned.estimators import Estimator, estimator_option
from pushforward.learned.fitting import Fit, Training
from pushforward.methods import _simulations, _truncated
from pushforward.methods._base import Draws, Method, check_integer, content, count
from pushforward.methods._importance import evidence_summary, khat_warning
from pushforward.methods._trained import arguments_of, check_arguments
from pushforward.model._arguments import bound
from pushforward.model._fingerprint import stable_text
from pushforward.model.inverse import InverseProblem, read_problem

_REPLICATES, _FRESH = 8, 256


class Trained(eqx.Module):
    """What training leaves.

    Attributes:
        conditional: the fitted networks.
        sites: latent sites that they infer.
        shapes: shapes of the data sites by name.
        arguments: the model's other arguments in training: arrays, or text that stands for their content.
        losses: mean training and held-out loss by epoch, (2, epochs).
        simulations: number of simulations.
        local: whether it was trained for one data set only.
        given: whether the simulations came from outside, so that the model's densities need not be theirs.
    """

    conditional: Conditional
    sites: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    arguments: dict[str, Any]
    losses: Array
    simulations: int
    local: bool = False
    given: bool = False


class AmortizedFlow(Method):
    """Neural posterior estimation: a conditional density q(z given y) for all data y, trained on simulations.

    Minimises ``E[-log q(z given y)]`` over pairs from prior and likelihood (Papamakarios and Murray 2016; Greenberg,
    Nonnenmacher and Macke 2019 for its sequels). Its least value h(z given y) is reached where q is the posterior for
    every y. The objective simulates the model and never evaluates one of its densities, so a simulator in the model
    and a datum that is a `numpyro.deterministic` will do. It is trained once, ``.fit(model, observed=("y",), ...)``,
    and then answers for any data of the same shape in milliseconds; untrained, `infer` trains it first.

    Use it where many data sets share one model, or where the likelihood cannot be evaluated. For one data set with a
    gradient, NUTS or `FlowVI` are cheaper and sharper.

    Args:
        estimator: a flow by the name of its architecture or as `pf.Flow(...)`; or "flow_matching", "energy", "point",
            or an instance such as `pf.FlowMatching(width=64)`.
        simulations: number of simulations, of each epoch with `Training(source="stream")`, of each round with rounds.
        embedding: what turns the data into a vector: `pf.Vector()`, `pf.Sets()`, `pf.Series()`, `pf.Image()`.
        training: `pf.Training(...)`.
        sites: names of the latent sites to infer; the others are integrated out. Empty for all.
        rounds: 1 learns for all data. More learn for the data at hand alone: after each round the prior is cut to where
            the posterior was found, and simulated there (truncated sequential estimation: Deistler, Goncalves and Macke
            2022).
        trained: what `fit` sets.

    Example:
        >>> import pushforward as pf
        >>> pf.AmortizedFlow("autoregressive", simulations=5000).simulations
        5000
    """

    estimator: Estimator = eqx.field(default="coupling_spline", converter=estimator_option)
    simulations: int = 10_000
    embedding: Embedding = eqx.field(default_factory=Vector)
    training: Training = eqx.field(default_factory=Training)
    sites: tuple[str, ...] = eqx.field(default=(), converter=lambda v: (v,) if isinstance(v, str) else tuple(v))
    rounds: int = 1
    trained: Trained | None = None

    needs_density = False

    def __check_init__(self):
        check_integer("AmortizedFlow", 100, simulations=self.simulations)
        check_integer("AmortizedFlow", 1, rounds=self.rounds)
        for name, kind, example in (
            ("embedding", Embedding, "pf.Vector(), pf.Sets(), pf.Series() or pf.Image()"),
            ("training", Training, "pf.Training(epochs=100)"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise MethodError(f"AmortizedFlow({name}=...) takes {example}; got {getattr(self, name)!r}.")
        if self.rounds > 1 and not self.estimator.has_density:
            raise MethodError(
                f"AmortizedFlow(rounds={self.rounds}) cuts the prior by the density of the estimate, and "
                f"{type(self.estimator).__name__} has none. Use a flow, or rounds=1."
            )
        if self.rounds > 1 and self.training.source == "stream":
            raise MethodError('AmortizedFlow(rounds=...) keeps its simulations; use Training(source="buffer").')

    @property
    def observed(self) -> tuple[str, ...] | None:
        """Names of the data sites it was trained for."""
        return tuple(self.trained.shapes) if self.trained is not None else None

    def fit(
        self,
        model: Model,
        *args: Any,
        observed: tuple[str, ...] | None = None,
        simulations: Any = None,
        key: int | Key = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Train on simulations of a model.

        Args:
            model: a NumPyro model.
            *args: its positional arguments.
            observed: names of the data sites, for a model that is called without its data.
            simulations: None to draw them from the model; or a dictionary of arrays by site name (latent sites that are
                inferred, and data) with a leading axis, or an iterable of such dictionaries, read once. The first
                share of them, `Training(held_out=...)`, judges: shuffle those that are sorted.
            key: an integer or a typed JAX key.
            checkpoint: file to which the training writes its state, and from which it resumes.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments.

        Returns:
            The same method, trained: `infer` takes it, `pf.save` writes it.

        Raises:
            DataError: no data site is known, or too many simulations failed.
            MethodError: `sites` do not fit the model, or rounds are asked for without data.
        """
        typed = jax.random.key(key) if isinstance(key, int) else key
        problem = read_problem(model, args, kwargs, observed)
        arguments = arguments_of(bound(model, args, kwargs), problem.structure.data)
        path = None if checkpoint is None else Path(checkpoint)
        parts = (content(self), problem.structure.arguments.static, content(arguments), sorted(problem.structure.data))
        text = stable_text(parts) + str(np.asarray(jax.random.key_data(typed)))
        identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        runner = Runner(progress=progress, checkpoint=path, identity=identity, label="AmortizedFlow")
        trained, _ = self._fitted(problem, typed, runner, simulations, arguments)
        return eqx.tree_at(lambda m: m.trained, self, trained, is_leaf=lambda v: v is None)

    def check_call(self, given: Any) -> None:
        """See `Method.check_call`."""
        if self.trained is not None:
            check_arguments("AmortizedFlow", self.trained.arguments, given)

    def why_not(self, problem: InverseProblem) -> str | None:
        """See `Method.why_not`."""
        if self.trained is None:
            return _simulations.why_not_simulated(problem)
        misfit = _simulations.why_not_shapes(problem, self.trained.shapes)
        if misfit:
            return misfit
        missing = [n for n in self.trained.sites if n not in problem.structure.slots]
        if missing:
            return f"it infers '{missing[0]}', which the model does not have; it has {list(problem.structure.slots)}"
        return None

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        trained, steps = self.trained, 0
        if trained is None:
            trained, steps = self._fitted(problem, jax.random.fold_in(key, 1), runner, None, {})
        conditional = trained.conditional
        values = self._arranged(trained, problem)
        columns = _simulations.columns_of(problem, trained.sites)
        weighed = self._weighed(problem, trained)
        z, weights, distance = runner.call(
            _drawn, problem, conditional, values, columns, jax.random.fold_in(key, 2), draws, weighed
        )
        summary: dict[str, Any] = {
            "distance": distance,
            "loss": np.nanmin(np.asarray(trained.losses)[1]),
            "simulations": trained.simulations,
        }
        if weighed:
            summary |= evidence_summary(weights) if np.isfinite(weights).all() else {}
        whole = len(trained.sites) == len(problem.structure.slots)
        sites = None if whole else trained.sites
        outcome = Outcome.SUCCESS if bool(jnp.isfinite(z).all()) else Outcome.NONFINITE
        runs = count(steps + (weights.size if weighed else 0))
        log_weights = weights if weighed else None
        return Draws(z[None], {}, summary, np.asarray(int(outcome)), runs, count(0), log_weights, sites)

    def warnings(self, draws: Draws) -> list[str]:
        """Data unlike the simulations, and Pareto k-hat above 0.7."""
        notes = []
        if float(draws.summary["distance"]) > 1.5:
            notes.append(
                f"the data are unlike the simulations: {float(draws.summary['distance']):.1f} times as far from their "
                "mean as 99.9 % of them. A network is unreliable there. Check the data, the prior and the noise."
            )
        remedy = "Give more simulations, or use rounds=, NUTS or TemperedSMC for these data."
        return notes + (khat_warning(float(draws.summary["khat"]), remedy) if "khat" in draws.summary else [])

    def _fitted(
        self, problem: InverseProblem, key: Key, runner: Runner, simulations: Any, arguments: dict[str, Any]
    ) -> tuple[Trained, int]:
        """The trained part, and the number of simulations that it took."""
        shapes = _simulations.data_shapes(problem)
        reason = _simulations.why_not_simulated(problem)
        if reason:
            raise DataError(f"AmortizedFlow does not fit: {reason}.")
        sites = _simulations.check_sites("AmortizedFlow", problem, self.sites or None)
        columns = _simulations.columns_of(problem, sites)
        shape = _simulations.shape_of(problem, self.estimator, self.embedding, columns)
        simulate_key, fit_key = jax.random.split(key)
        streamed = self.training.source == "stream"
        size = max(1000, self.simulations // 20) if streamed else self.simulations
        if simulations is None:
            u, values = _simulations.drawn(problem, shape, columns, size, simulate_key, runner)
        else:
            u, values = _simulations.given(problem, shape, sites, simulations, runner)
        if self.rounds > 1:
            found, fitted, total = _truncated.fit_rounds(self, problem, shape, columns, (u, values), fit_key, runner)
        else:
            source = _simulations.stream(problem, shape, columns, self.simulations) if streamed else None
            found, fitted = fit_conditional(shape, u, values, self.training, fit_key, runner, source)
            total = len(u) + (_epochs(fitted) * self.simulations if streamed else 0)
        _check_fit(fitted)
        simulated = 0 if simulations is not None else total
        local, outside = self.rounds > 1, simulations is not None
        return Trained(found, sites, shapes, arguments, fitted.losses, total, local, outside), simulated

    def _arranged(self, trained: Trained, problem: InverseProblem) -> Array:
        """The observed data as the networks take them."""
        data = {n: np.asarray(v, float) for n, v in problem.observed_values().items()}
        absent = [n for n, v in data.items() if np.isnan(v).any()]
        embedding = trained.conditional.shape.embedding
        if absent and not embedding.reads_missing:
            raise DataError(
                f"data '{absent[0]}' have NaN (missing) values, and the network was trained on complete data. Train it "
                "with an embedding that learns to do without: pf.Vector(missing=0.3), pf.Series(missing=0.3) or "
                "pf.Sets(varying=True)."
            )
        return embedding.arrange({n: jnp.asarray(v) for n, v in data.items()}, trained.conditional.shape.layout)

    def _weighed(self, problem: InverseProblem, trained: Trained) -> bool:
        """Whether both densities are there, so that importance weights say how good the draws are."""
        whole = len(trained.sites) == len(problem.structure.slots)
        exact = not problem.structure.without_density and not trained.given
        return whole and exact and self.estimator.has_density


def _epochs(fitted: Fit) -> int:
    return int(np.isfinite(np.asarray(fitted.losses)[1]).sum())


def _check_fit(fitted: Fit) -> None:
    if not np.isfinite(np.asarray(fitted.lowest)):
        raise MethodError(
            "AmortizedFlow: the held-out loss was never finite. Lower Training(learning_rate=...), or look at the "
            "simulations for extreme values."
        )


def _drawn(
    problem: InverseProblem,
    conditional: Conditional,
    values: Array,
    columns: tuple[int, ...],
    key: Key,
    draws: int,
    weighed: bool,
) -> tuple[Array, Array, Array]:
    """Draws z (draw, d); log p(z, y) - log q(z given y) at fresh ones (replicate, draw); the distance of the data."""
    fresh = _REPLICATES * _FRESH if weighed else 0
    u, log_q = conditional.weighed(values, key, draws + fresh)
    z = jnp.zeros((draws + fresh, problem.dimension), u.dtype).at[:, jnp.asarray(columns)].set(u)
    log_p = jax.vmap(problem.log_density)(z[draws:]) if weighed else log_q[draws:]
    return z[:draws], (log_p - log_q[draws:]).reshape(_REPLICATES, -1), conditional.distance(values)
