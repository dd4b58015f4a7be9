"""`ThreeDVar`: a background covariance or a gain that does not follow the flow, given or learned."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import DataError, MethodError, ModelError
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.math.innovations import Innovations
from pushforward.methods import _gain_filter, _gain_fit
from pushforward.methods._base import Draws, check_choice, check_integer, check_positive, content
from pushforward.methods._climatology import climatology
from pushforward.methods._filter_stats import innovation_stats
from pushforward.methods._gain_filter import Background, Estimate, Learned, Operator, Setting
from pushforward.methods._gain_fit import GainTraining, TrainedGain
from pushforward.methods._gains import GAINS, FixedGain, Gain, Units
from pushforward.methods._kalman_filter import each
from pushforward.methods._loops import checkpointed_scan
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.methods._three_dvar_parts import covariance_option, gain_option, kept, law_of_sites, sizes
from pushforward.methods._trained import arguments_of, check_arguments
from pushforward.model import trajectories
from pushforward.model._arguments import bound
from pushforward.model._fingerprint import stable_text
from pushforward.model.inverse import check_data, read_problem
from pushforward.model.linear import why_no_gaussian_noise
from pushforward.model.observing import observed_at, observes_alike, why_not_of_state
from pushforward.model.state_space import Chain, StateSpace, read_state_space

_UNTRAINED = "its gain is not trained; write method.fit(model, ...) first, with data and at known parameters"


class ThreeDVar(StateMethod):
    """3DVar: each forecast is corrected with a covariance, or a gain, that does not depend on the flow (Lorenc 1986).

    The analysis minimises |x - forecast|^2 in B^-1 plus |y - h(x)|^2 in R^-1, with B fixed: cost of one model run, no
    ensemble. Use it as a cheap first guess, where an ensemble is too expensive, and with a learned gain where the
    data are steady. It has no posterior spread: `posterior` holds one trajectory, `filtering` its analyses with the
    standard deviations that B or the gain imply, and there is no smoothing.

    `fit` learns a gain from observations alone; untrained, `infer` learns it from its own data first. It minimises the
    sum over steps of KL(q, forecast) - E_q[log likelihood] in closed form, q the Gaussian of the analysis. Under
    ``states=`` its `log_likelihood` is that of the innovations, no marginal likelihood.

    Args:
        covariance: B: "climatology", an array (n, n) in the order of the carry's entries, or a function v -> B v for
            states too large for a matrix, whose analysis is by conjugate gradients.
        gain: instead of it, an array (n, m), or a structure to be learned: "full", "banded", "circulant", "low_rank",
            "network", or an instance such as `pf.CirculantGain(width=5)`.
        scale: factor of the climatological covariance. The forecast's errors are a small part of it.
        iterations: Gauss-Newton steps of the analysis; 1 is exact where h is linear.
        free_run: steps of each of the 32 runs that give the climatological covariance; their first half is left out.
        training: `pf.GainTraining(...)`.
        store: "moments", means and standard deviations; "draws", means alone, as one draw, so that no covariance is
            propagated for a gain; "last".
        trained: what `fit` sets.

    Reference: Lorenc (1986), Q. J. R. Meteorol. Soc. 112, doi:10.1002/qj.49711247414; learned gains, Bach, Baptista,
    Sanz-Alonso and Stuart (2024), arXiv:2410.10523.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y)
        >>> tree = pf.infer(walk, method=pf.ThreeDVar(np.eye(1)), y=np.array([1.0, 2.0, np.nan, 3.0]))
        >>> tree["filtering"]["x"].shape, tree["filtering"]["x_sd"].shape
        ((4,), (4,))
    """

    returns: ClassVar[str] = "filtering"
    densities: ClassVar[bool] = False
    augments: ClassVar[bool] = False

    covariance: Any = "climatology"
    gain: Gain | None = None
    scale: float = 0.1
    iterations: int = 3
    free_run: int = 1000
    training: GainTraining = eqx.field(default_factory=GainTraining)
    store: str = "moments"
    trained: TrainedGain | None = None

    def __init__(
        self,
        covariance: Any = "climatology",
        gain: Any = None,
        *,
        scale: float = 0.1,
        iterations: int = 3,
        free_run: int = 1000,
        training: GainTraining | None = None,
        store: str = "moments",
        trained: TrainedGain | None = None,
    ):
        given = covariance is not None and not isinstance(covariance, str)
        if given and gain is not None:
            raise MethodError("ThreeDVar takes covariance= or gain=, not both: a gain is used as it is. Leave one out.")
        self.covariance, self.gain = covariance_option(covariance), gain_option(gain)
        self.scale, self.iterations, self.free_run = scale, iterations, free_run
        self.training = GainTraining() if training is None else training
        self.store, self.trained = store, trained

    def __check_init__(self):
        check_positive("ThreeDVar", scale=self.scale)
        check_integer("ThreeDVar", 1, iterations=self.iterations)
        check_integer("ThreeDVar", 10, free_run=self.free_run)
        check_choice("ThreeDVar", STORES, store=self.store)
        if not isinstance(self.training, GainTraining):
            raise MethodError(f"ThreeDVar(training=...) takes pf.GainTraining(steps=60); got {self.training!r}.")

    @property
    def augment(self) -> bool:
        """Never: parameters have no background covariance."""
        return False

    @property
    def online(self) -> bool:
        """An operator has no covariance to carry along."""
        return not callable(self.covariance)

    @property
    def _structured(self) -> bool:
        return self.gain is not None and not isinstance(self.gain, FixedGain)

    def fit(
        self,
        model: Model,
        *args: Any,
        observed: tuple[str, ...] | None = None,
        key: int | Key = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Learn the gain from the data in the model's arguments, without knowing the truth.

        Args:
            model: a NumPyro model with one scan.
            *args: its positional arguments.
            observed: names of data sites that are deterministic.
            key: an integer or a typed JAX key; the training draws no random numbers.
            checkpoint: file to which the training writes its state, and from which it resumes.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments, the data among them.

        Returns:
            The same method, trained: `infer` takes it, `pf.save` writes it. Its `trained.losses` is the curve of the
            objective per datum.

        Raises:
            MethodError: no gain to be learned, a model that the method does not fit, or a filter that diverges before
                training. One that diverges later is reported by a warning, with the last good gain kept.
            DataError: no data.
        """
        if not self._structured:
            raise MethodError(
                f"ThreeDVar.fit learns a gain, and gain={self.gain!r}. Write pf.ThreeDVar(gain='full').fit(...), or "
                f"one of {list(GAINS)}."
            )
        problem = read_problem(model, args, kwargs, observed)
        if not problem.observed_values():
            raise DataError("ThreeDVar.fit learns from data: pass them among the model's arguments.")
        check_data(problem)
        space = read_state_space(problem)
        self._check_fit(space)
        arguments = arguments_of(bound(model, args, kwargs), problem.structure.data)
        path = None if checkpoint is None else Path(checkpoint)
        runner = Runner(progress=progress, checkpoint=path, identity="", label="ThreeDVar")
        if path is not None:
            given = {n: v for n, v in bound(model, args, kwargs).items() if v is not None}
            text = stable_text((content(self), content(given), problem.structure.arguments.static))
            runner.identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        assert self.gain is not None
        found = _gain_fit.fit(self.gain, self.training, space, runner, arguments)
        _gain_fit.report(found, self.training)
        return eqx.tree_at(lambda m: m.trained, self, found, is_leaf=lambda v: v is None)

    def _check_fit(self, space: StateSpace) -> None:
        """Refuse a model that no gain can be learned for."""
        if space.parameters:
            raise MethodError(
                f"ThreeDVar.fit learns a gain at known parameters, and {list(space.parameters)} are free. Fix them "
                "with numpyro.handlers.substitute."
            )
        reason = self._why_not_model(space)
        if reason:
            raise MethodError(f"ThreeDVar does not fit this model: {reason}.")

    def check_call(self, given: Any) -> None:
        """See `Method.check_call`."""
        if self.trained is not None:
            check_arguments("ThreeDVar", self.trained.arguments, given)

    def why_not(self, problem: Any) -> str | None:
        """The data of a step must follow from the state that it leads to, with Gaussian noise; shapes must agree."""
        try:
            reason = self._why_not_model(problem)
            return reason or self._why_not_shapes(problem)
        except ModelError as error:
            return str(error).rstrip(".")

    def _why_not_model(self, space: StateSpace) -> str | None:
        reason = why_no_gaussian_noise(space, matching=True)
        if reason:
            return reason
        if space.joined:
            return "its parameters are part of the state, and have no background covariance"
        return why_not_of_state(space)

    def _why_not_shapes(self, space: StateSpace) -> str | None:
        n, m = sizes(space)
        if isinstance(self.covariance, jax.Array) and self.covariance.shape != (n, n):
            return f"covariance= has shape {self.covariance.shape}, and the state has {n} entries: it must be {(n, n)}"
        if self.gain is None:
            return None
        if isinstance(self.gain, FixedGain):
            found = self.gain.values.shape
        elif self.trained is None:
            # `trained_on` learns it from the data at hand, at known parameters.
            return _UNTRAINED if space.parameters else None
        else:
            found = self.trained.units.spreading.shape
        if found == (n, m):
            return None
        return f"its gain has shape {found}, and {n} entries of the state with {m} data per step need {(n, m)}"

    def trained_on(self, space: StateSpace, runner: Runner) -> tuple[Self, dict[str, Any], int]:
        """See `StateMethod.trained_on`."""
        if self.gain is None or not self._structured or self.trained is not None:
            return self, {}, 0
        found = _gain_fit.fit(self.gain, self.training, space, runner, {})
        numbers = _gain_fit.numbers(found, self.training)
        ready = eqx.tree_at(lambda m: m.trained, self, found, is_leaf=lambda v: v is None)
        return ready, numbers, int(numbers["training_runs"])

    def warnings(self, draws: Draws) -> list[str]:
        """A filter that diverged while `infer` learned the gain."""
        if "training_diverged" not in draws.summary:
            return []
        failed, step = (int(draws.summary[n]) for n in ("training_diverged", "training_diverged_at"))
        text = _gain_fit.caution(self.training, failed, step)
        return [text] if text else []

    def members_of(self, draws: int) -> int:
        """See `StateMethod.members_of`."""
        return 1

    def _setting(self, chain: Chain, key: Key, spread: bool, known: Array | None = None) -> Setting:
        """What its cycles need; `known` is a background covariance that need not be worked out."""
        alike = observes_alike(StateSpace(chain.arrays, chain.structure))
        if self.gain is not None:
            H = _gain_filter.slopes(chain)[0] if alike else None
            if self._structured and self.trained is None:
                raise MethodError(f"ThreeDVar: {_UNTRAINED}.")
            if self.trained is None:
                one = jnp.ones(())
                return Learned(self.gain, jnp.zeros(0), Units(one, one, one, one), spread, H)
            return Learned(self.gain, self.trained.weights, self.trained.units, spread, H)
        if callable(self.covariance):
            return Operator(cast(Callable[[Array], Array], self.covariance), 1 if alike else self.iterations)
        if known is not None:
            B = known
        elif isinstance(self.covariance, str):
            B = self.scale * climatology(chain, key, self.free_run)
        else:
            B = self.covariance
        return _gain_filter.with_slopes(chain, B, self.iterations, alike)

    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """Log density of the innovations; of a gain, the lower bound that it is trained by.

        The climatological covariance counts as a constant in its gradient. NaN for an operator.
        """
        setting = self._setting(chain, key, True)
        first, value = setting.start(chain)

        def move(carry: tuple[Estimate, Array], t: Array) -> tuple[tuple[Estimate, Array], None]:
            cycle = setting.cycle(chain, carry[0], t)
            return (cycle.after, carry[1] + cycle.analysed.increment), None

        return checkpointed_scan(move, (first, value), chain.structure.length)[1]

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "moments") -> StateDraws:
        """See `StateMethod.trajectories`; the one draw is the series of analyses."""
        setting = self._setting(chain, key, store == "moments")
        first, value = setting.start(chain)

        def move(before: Estimate, t: Array) -> tuple[Estimate, tuple]:
            cycle = setting.cycle(chain, before, t)
            a, f = cycle.analysed, cycle.forecast
            _, sites, back = observed_at(chain, before.mean, before.riders, t, a.mean)
            groups = tuple(kept(chain, before, t, law, store) for law in ((a.mean, a.cov), (f.mean, f.cov)))
            found = Innovations(a.increment, a.square, jnp.sum(f.present))
            return cycle.after, (sites, back, groups, innovation_stats(found))

        end, (sites, back, groups, stats) = jax.lax.scan(move, first, jnp.arange(chain.structure.length))
        values, back = jax.tree.map(lambda v: v[None], (sites, back))
        last = (end.mean[None], each(end.riders, 1))
        still = (jnp.zeros((1, chain.initial_dimension)), jnp.zeros((1, chain.late_dimension)))
        outside = trajectories.around(chain, still[0], back, last, still[1])["values"]
        swapped = [jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), part) for part in groups]
        evidence = value + jnp.sum(stats["log_likelihood_increment"]) + chain.static_log_likelihood()
        summary: dict[str, Array] = {}
        if not setting.has_density:
            stats, summary, evidence = {}, {"log_evidence": evidence}, jnp.zeros(())
        return StateDraws(outside | values, swapped[0], swapped[1], {}, {}, last, evidence, summary, stats)

    def begin(self, chain: Chain, key: Key) -> tuple[Estimate, Array]:
        """See `StateMethod.begin`."""
        return self._setting(chain, key, True).start(chain)

    def advance(self, chain: Chain, belief: Estimate, key: Key) -> tuple[Estimate, Increment]:
        """See `StateMethod.advance`; the background covariance is that of `begin`."""
        setting = self._setting(chain, key, True, belief.cov)
        t = jnp.asarray(0)
        cycle = setting.cycle(chain, belief, t)
        mean, sd = law_of_sites(chain, belief, t, (cycle.analysed.mean, cycle.analysed.cov))
        count = jnp.sum(cycle.forecast.present)
        surprise = jnp.where(count > 0, cycle.analysed.square / jnp.maximum(count, 1), 1.0)
        after = cycle.after
        if isinstance(setting, Background):
            after = Estimate(after.mean, belief.cov, after.riders)
        return after, Increment(mean, sd, cycle.analysed.increment, {"surprise": surprise})

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        trained = self.warnings(draws)
        if trained:
            return trained[0][:1].upper() + trained[0][1:]
        return (
            "3DVar's estimate is not finite. Look at the step of the model for states that it cannot take; where "
            "covariance='climatology', free runs of the model must stay finite: give covariance= as an array else."
        )
