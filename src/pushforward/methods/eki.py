"""`EKI`: ensemble Kalman inversion, from the prior to the posterior or to a minimiser, without derivatives."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.methods import _asked
from pushforward.methods._base import Draws, Method, check_choice, check_integer, check_positive
from pushforward.methods._ensemble_parts import Adaptive, Inflation, NoInflation
from pushforward.methods._inversion import (
    FAILURES,
    LONGEST,
    UPDATES,
    Inversion,
    Step,
    ended,
    moved,
    next_step,
)
from pushforward.methods._inversion_result import check_units, failure_warnings, packaged, why_not_ensemble
from pushforward.methods._localisation import Localisation
from pushforward.methods._outputs import Units, flat, predict_both, simulate_twice, succeeded
from pushforward.model.inverse import InverseProblem, read_problem

_UPDATES = {
    "transform": "symmetric square root; exact for linear Gaussian models with any number of members",
    "perturbed": "perturbed observations (ES-MDA); exact as the members grow",
    "unperturbed": "every member sees the same data: an optimiser",
    "tikhonov": "the prior as extra data: tends to the posterior's mode",
}
_OPTIMISERS = ("unperturbed", "tikhonov")


class EKI(Method):
    """Ensemble Kalman inversion: members move from the prior to the posterior of a Gaussian likelihood.

    In ``z``, where the prior is N(0, I), steps h_i with sum `time` lead along ``prior * likelihood^t``; the covariances
    of members and outputs stand for the derivative: ``z += C^zg (C^gg + R / h)^-1 (y - G(z))``. What comes out depends
    on the update, and is named by it:

    - "transform" (default): the posterior of the members' own prior moments where the model is linear and Gaussian, for
      any number of members and any steps; elsewhere a Gaussian-like approximation without a promise.
    - "perturbed": the same as the members become many; error J^-1/2, and the spread is too small for few members.
    - "unperturbed": the form of Iglesias, Law and Stuart (2013) and of Stuart's lectures. It fits the data: the spread
      ``C(t)^-1 = C(0)^-1 + 2 t G^T R^-1 G`` is no posterior at any time. `returns` says "minimiser".
    - "tikhonov": the minimiser of misfit plus prior (the mode in ``z``), error 1 / time (Chada, Stuart and Tong 2020).

    Use it where the simulator is expensive or has no gradient: some 4 to 10 runs of the model for each member. Members
    stay in the span of the first ones (unless `inflation` adds noise or `localisation` is given), so with fewer members
    than directions that the data inform the posterior is that of the span. It is no sampler for bent or many-peaked
    posteriors: compare with NUTS, PreconditionedCrankNicolson or TemperedSMC once.

    A member whose outputs are NaN, infinite, or farther from the data than a million times the median member's counts
    as failed, is left out of the step, and is drawn anew from the Gaussian of the others.

    Args:
        members: size J of the ensemble; each is one draw of the result.
        update: one of the above.
        schedule: "adaptive", steps by the data misfit controller (Iglesias and Yang 2021); a number of equal steps;
            or the alphas of ES-MDA, whose inverses sum to 1, such as (9.333, 7.0, 4.0, 2.0).
        time: total of the steps: 1 for the posterior; longer, such as 100.0, for the two optimisers.
        inflation: `pf.Multiplicative`, `pf.Additive`, `pf.RTPS` or `pf.RTPP`, applied after each step.
        noise: "given", the noise of a Gaussian likelihood whose scale is fixed; "simulated", the noise of simulated
            data, for scales that are latent and for other likelihoods. Each step then runs the model twice for each
            member, their difference is noise, and the update is "perturbed". It learns from the means of the
            simulated data: a scale that only their spread tells of stays as the prior has it.
        minibatch: data used by one step, 0 for all; the schedule is then the number of passes over the data, whose
            batches are drawn anew in each. The product of all steps is the whole likelihood.
        localisation: `pf.ByDistance(...)` or `pf.ByCorrelation(...)` for many parameters and few members: each
            parameter then learns only from the data that it has to do with. None: from all.

    The members and outputs of each step are kept in the result's group ``ensemble`` while they are no more than four
    million numbers (of the last 40 steps at most): `pf.Surrogate` learns from them.

    Reference:
        Iglesias, Law, Stuart (2013), doi:10.1088/0266-5611/29/4/045001; Emerick and Reynolds (2013),
        doi:10.1016/j.cageo.2012.03.011; Huang, Huang, Reich, Stuart (2022), doi:10.1088/1361-6420/ac99fa.

    Example:
        >>> import pushforward as pf
        >>> pf.EKI(200, update="perturbed", schedule=4).returns
        'posterior'
    """

    members: int = 100
    update: str = "transform"
    schedule: str | int | tuple[float, ...] = eqx.field(
        default="adaptive", converter=lambda s: tuple(s) if isinstance(s, list) else s
    )
    time: float = 1.0
    inflation: Inflation = eqx.field(default_factory=NoInflation)
    noise: str = "given"
    minibatch: int = 0
    localisation: Localisation | None = None

    shards = "members"

    def __check_init__(self):
        check_integer("EKI", 2, members=self.members)
        check_integer("EKI", 0, minibatch=self.minibatch)
        check_positive("EKI", time=self.time)
        check_choice("EKI", _UPDATES, update=self.update)
        check_choice("EKI", ("given", "simulated"), noise=self.noise)
        _check_schedule(self.schedule, self.time)
        if not isinstance(self.inflation, Inflation) or isinstance(self.inflation, Adaptive):
            raise MethodError(
                "EKI(inflation=...) takes pf.Multiplicative(...), pf.Additive(...), pf.RTPS(...) or pf.RTPP(...); got "
                f"{self.inflation!r}."
            )
        if self.time != 1 and self.update not in _OPTIMISERS:
            raise MethodError(
                f'EKI(update="{self.update}", time={self.time}): the posterior is at time=1.0. Other times are for '
                'the optimisers, update="unperturbed" and update="tikhonov".'
            )
        _check_localisation(self)
        if self.noise == "simulated" and self.update not in ("transform", "perturbed"):
            raise MethodError(f'EKI(noise="simulated") perturbs the data itself; leave update="{self.update}" out.')
        if self.minibatch and self.schedule == "adaptive":
            raise MethodError(
                "EKI(minibatch=...) needs the number of passes over the data: write schedule=4 (or alphas) with it."
            )

    @property
    def returns(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """ "posterior", or "minimiser" for the updates that optimise."""
        return "minimiser" if self.update in _OPTIMISERS else "posterior"

    def why_not(self, problem: InverseProblem) -> str | None:
        """Likelihoods that are not Gaussian, priors without an exact map from N(0, I), minibatches beyond the data."""
        reason = why_not_ensemble(problem)
        if reason:
            return reason
        if self.noise == "given":
            reason = problem.why_not_gaussian()
            if reason:
                ways = 'or let simulated data carry the noise, pf.EKI(noise="simulated")'
                return f"{reason.removesuffix(', or use a method that samples its data')}; {ways}"
        return None

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        units = None if self.noise == "simulated" else runner.call(Units.of, problem)
        if units is not None:
            check_units(units)
        m = _data_count(problem)
        epoch = self._epoch(m)
        local = self._local(problem, m)
        first = self._first(problem, key, m)
        last = runner.loop(
            _advance, first, self._steps(epoch), self, problem, units, epoch, key, local, runner.mesh, every=1
        )
        runs = 2 if self.noise == "simulated" else 1
        return packaged(last, self.time, draws, runs * self.members)

    def start(self, model: Any, *args: Any, key: int | Key = 0, **kwargs: Any) -> _asked.Asked:
        """Begin a run whose simulations are made elsewhere.

        Args:
            model: a NumPyro model; its forward map need not be one that can run here, only its shapes and noise count.
            *args: its positional arguments, data included.
            key: an integer or a typed JAX key.
            **kwargs: its named arguments.

        Returns:
            A state: simulate `state.members` (values of the latent sites, leading axis of the members), give the
            outputs to `tell`, and repeat until `state.finished`. The result does not depend on who simulates:
            it is that of `infer` with the same key.
        """
        problem = read_problem(model, args, kwargs)
        misfit = self.why_not(problem)
        if misfit:
            raise MethodError(f"EKI does not fit this model: {misfit}.")
        check_units(Runner().call(Units.of, problem))
        typed = jax.random.key(key) if isinstance(key, int) else key
        m = _data_count(problem)
        self._local(problem, m)
        return _asked.start(self, problem, typed, self._first(problem, typed, m))

    def tell(self, state: _asked.Asked, outputs: Any, model: Any, *args: Any, **kwargs: Any) -> _asked.Asked:
        """Take in the outputs of the members and move them.

        Args:
            state: what `start` or the last `tell` returned, or `pf.load` of it.
            outputs: means of the observed sites for all members, by site name (or one array where there is one site),
                (members, *shape of the data); NaN for members that failed.
            model: the model that the run began with.
            *args: its positional arguments.
            **kwargs: its named arguments.

        Returns:
            The next state.

        Raises:
            ArgumentError: outputs of another shape, or a finished run.
            InferenceError: fewer than 2 members succeeded; `partial` is the state that was given.
        """
        problem = read_problem(model, args, kwargs)
        values = _asked.values_of(state, problem, outputs)
        m = sum(v[0].size for v in values.values())
        epoch, local = self._epoch(m), self._local(problem, m)
        key = jax.random.wrap_key_data(state.key)
        return _asked.after(
            self, problem, state, Runner().call(_answered, state.inversion, self, problem, values, epoch, key, local)
        )

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        return FAILURES.get(int(draws.summary["stopped"]))

    def warnings(self, draws: Draws) -> list[str]:
        """Many failures."""
        return failure_warnings(draws, self.members)

    def _first(self, problem: InverseProblem, key: Key, m: int) -> Inversion:
        z = jax.random.normal(jax.random.fold_in(key, 0), (self.members, problem.dimension))
        steps = self._steps(self._epoch(m))
        return Inversion.start(z, max(steps, LONGEST), m=0 if self.noise == "simulated" else m, steps=steps)

    def _local(self, problem: InverseProblem, m: int) -> Any:
        return None if self.localisation is None else self.localisation.plan(problem, m)

    def _epoch(self, m: int) -> int:
        """Steps in a pass over m data."""
        if self.minibatch > m:
            raise MethodError(f"EKI(minibatch={self.minibatch}): the model has {m} data.")
        return -(-m // self.minibatch) if self.minibatch else 1

    def _steps(self, epoch: int) -> int:
        if self.schedule == "adaptive":
            return LONGEST
        return epoch * (self.schedule if isinstance(self.schedule, int) else len(self.schedule))


def _data_count(problem: InverseProblem) -> int:
    return sum(int(np.size(v)) for v in problem.observed_values().values())


def _check_localisation(method: EKI) -> None:
    if method.localisation is None:
        return
    if not isinstance(method.localisation, Localisation):
        raise MethodError(
            f"EKI(localisation=...) takes pf.ByDistance(...) or pf.ByCorrelation(...); got {method.localisation!r}."
        )
    if method.update == "tikhonov":
        raise MethodError(
            'EKI(update="tikhonov") takes the prior as data, which a localisation has no taper for. Leave '
            'localisation= out, or write update="transform".'
        )


def _check_schedule(schedule: Any, time: float) -> None:
    if schedule == "adaptive":
        return
    if isinstance(schedule, int) and not isinstance(schedule, bool) and schedule >= 1:
        return
    alphas = schedule if isinstance(schedule, tuple) else ()
    if not alphas or not all(isinstance(a, int | float) and a > 0 for a in alphas):
        raise MethodError(
            'EKI(schedule=...) takes "adaptive", a number of equal steps, or a list of positive alphas; '
            f"got {schedule!r}."
        )
    total = sum(1 / a for a in alphas)
    if abs(total - time) > 1e-3 * time:
        raise MethodError(
            f"EKI(schedule={schedule}): the inverses of the alphas must sum to {time:g}, these sum to {total:.4f}. "
            f"Multiply each by {total / time:.6g}, or give a number of equal steps."
        )


def _advance(
    state: Inversion,
    start: Array,
    stop: Array,
    method: EKI,
    problem: InverseProblem,
    units: Units | None,
    epoch: int,
    key: Key,
    local: Any,
    mesh: Mesh | None,
) -> Inversion:
    """Carry the ensemble from step `start` to step `stop`, or to the end; a step's keys depend on its number alone."""
    del start

    def going(s: Inversion) -> Array:
        return (s.steps < stop) & ~ended(s, method.time) & (s.stopped == 0)

    def step(s: Inversion) -> Inversion:
        keys = jax.random.split(jax.random.fold_in(key, 1 + s.steps), 4)
        if units is None:
            told = _simulated(problem, s.z, keys[0], mesh)
        else:
            outputs, plain = parallel.vmap(partial(predict_both, problem, units), mesh)(s.z)
            noise = jax.random.normal(keys[0], outputs.shape, outputs.dtype) if method.update == "perturbed" else None
            told = Step(outputs, units.whitened, noise, succeeded(outputs, units.whitened), plain)
        return _told(s, told, method, epoch, key, keys, local)

    return jax.lax.while_loop(going, step, state)


def _answered(
    s: Inversion, method: EKI, problem: InverseProblem, values: dict[str, Array], epoch: int, key: Key, local: Any
) -> Inversion:
    """The state after a step whose outputs were told by the user."""
    keys = jax.random.split(jax.random.fold_in(key, 1 + s.steps), 4)
    told = _asked.told_of(problem, values, keys[0], method.update == "perturbed")
    return _told(s, told, method, epoch, key, keys, local)


def _told(s: Inversion, told: Step, method: EKI, epoch: int, key: Key, keys: Key, local: Any) -> Inversion:
    """The state after a step whose outputs are known."""
    if epoch > 1:
        told = eqx.tree_at(lambda t: t.data, told, _batch(told.data, s.steps, method.minibatch, epoch, key))
    h = next_step(s, told, method.schedule, method.time, epoch)
    # Two simulations leave half of the noise in their mean, the update adds the rest.
    size = 1 / jnp.maximum(1 / h - 0.5, 0.5) if method.noise == "simulated" else h
    told = eqx.tree_at(lambda t: t.outputs, told, jnp.where(told.present[:, None], told.outputs, 0.0))
    update = UPDATES["perturbed" if method.noise == "simulated" else method.update]
    after = moved(s, told, size, update, keys[1], local)
    z = method.inflation.after(s.z, after.z, keys[2])
    time = s.time + h / epoch
    sizes = s.sizes.at[s.steps].set(h)
    return eqx.tree_at(lambda t: (t.z, t.time, t.sizes), after, (z, time, sizes))


def _simulated(problem: InverseProblem, z: Array, key: Key, mesh: Mesh | None) -> Step:
    """Means of two simulations, and their difference as noise of variance 1: everything in units of its spread."""
    keys = jax.random.split(key, z.shape[0])
    first, second = parallel.vmap(lambda z, k: simulate_twice(problem, z, k), mesh)(z, keys)
    data = flat(problem.observed_values())
    good = jnp.isfinite(first).all(-1) & jnp.isfinite(second).all(-1)
    half = jnp.where(good[:, None], first - second, 0.0) / 2**0.5
    variance = jnp.sum(half**2, 0) / jnp.maximum(jnp.sum(good), 1)
    # Data that are the same in all simulations have no noise to be measured in.
    sd = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    outputs, data = 0.5 * (first + second) / sd, data / sd
    return Step(outputs, data, half / sd, good & succeeded(outputs, data))


def _batch(data: Array, step: Array, size: int, epoch: int, key: Key) -> Array:
    """The data of one step of a pass, NaN elsewhere; each datum is in one step of each pass."""
    order = jax.random.permutation(jax.random.fold_in(key, 10**6 + step // epoch), data.shape[0])
    return jnp.where(order // size == step % epoch, data, jnp.nan)
