"""`NeuralLikelihood`: a likelihood learned from simulations, and a sampler that uses it."""

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned.amortized import Conditional, Shape, fit_conditional
from pushforward.learned.embeddings import Vector
from pushforward.learned.estimators import ConditionalFlow, Estimator, estimator_option
from pushforward.learned.fitting import Training
from pushforward.methods import _simulations
from pushforward.methods._base import Draws, Method, check_integer
from pushforward.methods._trained import arguments_of, check_arguments
from pushforward.methods.nuts import NUTS
from pushforward.model._arguments import bound
from pushforward.model.inverse import InverseProblem, read_problem


class LearnedLikelihood(eqx.Module):
    """What training leaves.

    Attributes:
        conditional: q(standardised data given z); its roles are swapped, data are its u and z its condition.
        location: mean of the data over the simulations, arranged.
        spread: standard deviation.
        shapes: shapes of the data sites by name.
        arguments: the model's other arguments in training.
        losses: mean training and held-out loss by epoch, (2, epochs).
        dimension: length of z.
    """

    conditional: Conditional
    location: Array
    spread: Array
    shapes: dict[str, tuple[int, ...]]
    arguments: dict[str, Any]
    losses: Array
    dimension: int

    def log_likelihood(self, z: Array, values: Array) -> Array:
        """log q(data given z) for arranged data (k,)."""
        standard = (values - self.location) / self.spread
        return self.conditional.log_density(standard[None], z)[0] - jnp.sum(jnp.log(self.spread))


class NeuralLikelihood(Method):
    """Neural likelihood estimation: learn q(y given z) from simulations, then sample with it.

    Minimises ``E[-log q(y given z)]`` over pairs from prior and likelihood (Papamakarios, Sterratt and Murray 2019);
    its least value is reached at the likelihood itself. The posterior follows from the prior of the model, exactly
    N(0, I) in z, by any sampler of this library. Use it where the likelihood cannot be evaluated, the data are few
    numbers, and the posterior is sharp or has several modes (with `TemperedSMC`); `AmortizedFlow` needs no sampler
    afterwards.

    Args:
        estimator: a conditional flow over the data, by the name of its architecture or as `pf.Flow(...)`.
        simulations: number of simulations.
        training: `pf.Training(...)`, with the buffer as source.
        sampler: the method that samples the posterior.
        trained: what `fit` sets.

    Example:
        >>> import pushforward as pf
        >>> pf.NeuralLikelihood(sampler=pf.TemperedSMC()).simulations
        10000
    """

    estimator: Estimator = eqx.field(default="coupling_spline", converter=estimator_option)
    simulations: int = 10_000
    training: Training = eqx.field(default_factory=Training)
    sampler: Method = eqx.field(default_factory=NUTS)
    trained: LearnedLikelihood | None = None

    needs_density = False
    gradients = True

    def __check_init__(self):
        check_integer("NeuralLikelihood", 100, simulations=self.simulations)
        if not isinstance(self.estimator, ConditionalFlow):
            raise MethodError(
                f"NeuralLikelihood(estimator=...) takes a flow, whose density is quick; got {self.estimator!r}."
            )
        if not isinstance(self.training, Training) or self.training.source != "buffer":
            raise MethodError(
                f'NeuralLikelihood(training=...) takes pf.Training(source="buffer"); got {self.training!r}.'
            )
        if not isinstance(self.sampler, Method) or self.sampler.accepts is not InverseProblem:
            raise MethodError(
                f"NeuralLikelihood(sampler=...) takes a method for parameters, such as pf.NUTS(); got {self.sampler!r}."
            )

    @property
    def observed(self) -> tuple[str, ...] | None:
        """Names of the data sites it was trained for."""
        return tuple(self.trained.shapes) if self.trained is not None else None

    def fit(
        self,
        model: Model,
        *args: Any,
        observed: tuple[str, ...] | None = None,
        key: int | Key = 0,
        progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Train on simulations of a model.

        Args:
            model: a NumPyro model.
            *args: its positional arguments.
            observed: names of the data sites, for a model that is called without its data.
            key: an integer or a typed JAX key.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments.

        Returns:
            The same method, trained: `infer` takes it, `pf.save` writes it.
        """
        typed = jax.random.key(key) if isinstance(key, int) else key
        problem = read_problem(model, args, kwargs, observed)
        arguments = arguments_of(bound(model, args, kwargs), problem.structure.data)
        trained = self._fitted(problem, typed, Runner(progress=progress, label="NeuralLikelihood"), arguments)
        return eqx.tree_at(lambda m: m.trained, self, trained, is_leaf=lambda v: v is None)

    def check_call(self, given: Any) -> None:
        """See `Method.check_call`."""
        if self.trained is not None:
            check_arguments("NeuralLikelihood", self.trained.arguments, given)

    def why_not(self, problem: InverseProblem) -> str | None:
        """See `Method.why_not`."""
        if problem.structure.discrete:
            return f"the latent site '{problem.structure.discrete[0]}' is discrete; use a model with continuous sites"
        if self.trained is None:
            return _simulations.why_not_simulated(problem)
        if self.trained.dimension != problem.dimension:
            return (
                f"it was trained with {self.trained.dimension} latent numbers, and this model has {problem.dimension}"
            )
        return _simulations.why_not_shapes(problem, self.trained.shapes)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        fit_key, sample_key = jax.random.split(key)
        trained = self.trained or self._fitted(problem, fit_key, runner, {})
        data = {n: np.asarray(v, float) for n, v in problem.observed_values().items()}
        absent = [n for n, v in data.items() if np.isnan(v).any()]
        if absent:
            raise DataError(
                f"data '{absent[0]}' have NaN (missing) values, and a learned likelihood has no marginal of the rest. "
                "Use pf.AmortizedFlow(embedding=pf.Vector(missing=0.3))."
            )
        values = Vector().arrange({n: jnp.asarray(v) for n, v in data.items()}, trained.location.shape)
        inner = read_problem(_posterior, (trained, values))
        found = self.sampler.run(inner, sample_key, draws, runner)
        positions = found.positions["z"] if isinstance(found.positions, dict) else found.positions
        stats = {k: v for k, v in found.stats.items() if k != "lp"}
        summary = found.summary | {"loss": np.nanmin(np.asarray(trained.losses)[1])}
        return Draws(
            positions,
            stats,
            summary,
            found.outcome,
            found.evaluations if self.trained is not None else found.evaluations + self.simulations,
            found.gradient_evaluations,
            found.log_weights,
        )

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        return self.sampler.failure(draws)

    def warnings(self, draws: Draws) -> list[str]:
        """What the sampler points out."""
        return self.sampler.warnings(draws)

    def _fitted(
        self, problem: InverseProblem, key: Key, runner: Runner, arguments: dict[str, Any]
    ) -> LearnedLikelihood:
        shapes = _simulations.data_shapes(problem)
        _check_continuous(problem, shapes)
        reason = _simulations.why_not_simulated(problem)
        if reason:
            raise DataError(f"NeuralLikelihood does not fit: {reason}.")
        simulate_key, fit_key = jax.random.split(key)
        columns = tuple(range(problem.dimension))
        arranged = Shape(self.estimator, Vector(), problem.dimension, Vector().layout(shapes))
        z, values = _simulations.drawn(problem, arranged, columns, self.simulations, simulate_key, runner)
        location, spread = jnp.mean(values, 0), jnp.std(values, 0)
        spread = jnp.where(spread > 0, spread, 1.0)
        swapped = Shape(self.estimator, Vector(), values.shape[1], (problem.dimension,))
        found, fitted = fit_conditional(swapped, (values - location) / spread, z, self.training, fit_key, runner)
        return LearnedLikelihood(found, location, spread, shapes, arguments, fitted.losses, problem.dimension)


def _check_continuous(problem: InverseProblem, shapes: dict[str, tuple[int, ...]]) -> None:
    for name in shapes:
        support = problem.sites[name].support
        if support is not None and getattr(support, "is_discrete", False):
            raise DataError(
                f"data '{name}' are discrete ({problem.sites[name].distribution}), and a flow over them has no "
                "density. Use pf.AmortizedFlow(), which only reads the data."
            )


def _posterior(trained: LearnedLikelihood, values: Array) -> None:
    """The posterior of z under the learned likelihood, as a NumPyro model."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([trained.dimension]).to_event(1))
    numpyro.factor("learned", trained.log_likelihood(z, values))
