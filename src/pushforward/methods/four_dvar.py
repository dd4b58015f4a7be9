"""`FourDVar`: the mode of a trajectory given all data of a window, and draws around it."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.methods import _four_dvar
from pushforward.methods._base import Draws, check_boolean, check_choice, check_integer, check_positive
from pushforward.methods._four_dvar_windows import Cycled, Plan, Rows, cycle
from pushforward.methods._kalman_filter import each
from pushforward.methods._state import STORES, StateDraws, StateMethod
from pushforward.model import trajectories
from pushforward.model.linear import why_no_gaussian_noise
from pushforward.model.state_space import Chain, StateSpace

_CONSTRAINTS = {"weak": "step noise is part of the control", "strong": "step noise is zero"}
_SAMPLERS = {
    "randomised": "minimise again with perturbed data and prior mean",
    "laplace": "the Gaussian at the mode",
    "mode": "the mode alone",
}
_COVARIANCES = ("climatology", "flow")


class Window(eqx.Module):
    """Cycling: windows of steps that follow each other, each with a background N(mode of the one before, B).

    Each datum is assimilated once: a window looks at the data of its last `shift` steps. With ``shift = length``
    windows touch. With ``shift = 1`` they slide: the newest data correct the state `length` steps back.

    Args:
        length: steps of a window, at most those of the data.
        shift: steps from the start of a window to that of the next, `length` by default.
        covariance: B as an array (n, n); "climatology": the covariance of a free run of the model; "flow": the
            posterior covariance at the mode, carried along by the tangent (exact for linear models), whose cost is
            that of a matrix of the window's control.
        scale: factor of B. A climatology is far too wide: 0.01 to 0.2 are usual, less for longer windows.

    Example:
        >>> import pushforward as pf
        >>> pf.FourDVar("strong", window=pf.Window(4, shift=1, scale=0.02)).window.shift
        1
    """

    length: int
    shift: int
    covariance: Array | str
    scale: float

    def __init__(
        self,
        length: int,
        *,
        shift: int | None = None,
        covariance: Array | np.ndarray | str = "climatology",
        scale: float = 1.0,
    ):
        self.length, self.shift, self.scale = length, length if shift is None else shift, scale
        self.covariance = covariance if isinstance(covariance, str) else _checked(covariance)

    def __check_init__(self):
        check_integer("Window", 1, length=self.length, shift=self.shift)
        check_positive("Window", scale=self.scale)
        if isinstance(self.covariance, str):
            check_choice("Window", _COVARIANCES, covariance=self.covariance)
        if self.shift > self.length:
            raise MethodError(
                f"Window(length={self.length}, shift={self.shift}) would skip data: write shift <= length."
            )


def _checked(covariance: Any) -> Array:
    """A covariance as an array.

    Raises:
        MethodError: it is not square, symmetric and positive definite.
    """
    given = np.asarray(covariance, float)
    said = "Window(covariance=...) takes a symmetric positive definite matrix (n, n)"
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise MethodError(f"{said}; got an array of shape {given.shape}. For variances write np.diag(variances).")
    if not np.isfinite(given).all() or not np.allclose(given, given.T, atol=1e-6 * np.abs(given).max()):
        raise MethodError(f"{said}; got one that is not finite and symmetric. Write 0.5 * (B + B.T) to make it so.")
    least = np.linalg.eigvalsh(given)[0]
    if not least > 0:
        raise MethodError(
            f"{said}; the least eigenvalue of that given is {least:.3g}. Add a small multiple of the identity, as in "
            "B + 1e-6 * np.trace(B) / len(B) * np.eye(len(B))."
        )
    return jnp.asarray(given)


class FourDVar(StateMethod):
    """4DVar: the most probable noise of a trajectory given its data, by Gauss-Newton (Courtier et al. 1994).

    Minimises ``J(z) = |z|^2 / 2 - log p(y | z)`` over the noise z of the initial state, of each step (weak
    constraint; Tremolet 2006) and of free parameters (`augment=True`). Systems are solved by conjugate gradients with
    tangent and adjoint of the model's own step, so nothing needs an n x n matrix but the background of `Window`; memory
    is O(sqrt T). Draws are around the mode: exact for linear Gaussian models, where the result is Kalman's.

    Use it for smooth models with many states and data that pin the trajectory. Not for posteriors with several modes.
    Where errors grow, J over many steps has many minima: windows of more than 16 steps are taken up over horizons that
    double, each from the minimum of the one before (quasi-static; Pires, Vautard and Talagrand 1996). That reaches as
    far as errors grow by about 1 / sqrt(precision), a factor of some hundreds in float32; beyond, use `window=`, or
    ``pf.Kalman("iterated")``, which has the same mode for small states.

    With `window=`, ``posterior`` holds each step as the last window that contains it left it, ``filtering`` as the
    window that assimilates its data; draws of different windows are independent of each other.

    Args:
        constraint: "weak", or "strong": step noise is held at zero.
        window: `pf.Window(...)` or a number of steps; None puts all data into one.
        sampler: "randomised": each draw minimises again with perturbed data and prior mean; "laplace": the Gaussian at
            the mode, cheaper, also for counts; "mode": the mode alone.
        iterations: Gauss-Newton iterations at most.
        solver_steps: steps of conjugate gradients at most, in each iteration.
        store: "draws"; "moments": the mode and standard deviations around it in time, as ``filtering``; "last": draws
            of the last step.
        augment: whether free parameters join the control.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y)
        >>> tree = pf.infer(walk, method=pf.FourDVar(), y=np.array([1.0, 2.0, np.nan, 3.0]), draws=50)
        >>> tree["posterior"]["x"].shape
        (1, 50, 4)
    """

    differentiable: ClassVar[bool] = False

    constraint: str = "weak"
    window: Window | None = None
    sampler: str = "randomised"
    iterations: int = 20
    solver_steps: int = 200
    store: str = "draws"
    augment: bool = False

    def __init__(
        self,
        constraint: str = "weak",
        window: Window | int | None = None,
        *,
        sampler: str = "randomised",
        iterations: int = 20,
        solver_steps: int = 200,
        store: str = "draws",
        augment: bool = False,
    ):
        number = isinstance(window, int | np.integer) and not isinstance(window, bool)
        self.constraint, self.window = constraint, Window(int(window)) if number else window  # pyright: ignore
        self.sampler, self.iterations, self.solver_steps = sampler, iterations, solver_steps
        self.store, self.augment = store, augment

    def __check_init__(self):
        check_choice("FourDVar", _CONSTRAINTS, constraint=self.constraint)
        check_choice("FourDVar", _SAMPLERS, sampler=self.sampler)
        check_choice("FourDVar", STORES, store=self.store)
        check_integer("FourDVar", 1, iterations=self.iterations, solver_steps=self.solver_steps)
        check_boolean("FourDVar", augment=self.augment)
        if self.window is not None and not isinstance(self.window, Window):
            raise MethodError(
                "FourDVar(window=...) takes a number of steps, pf.Window(length, shift=..., scale=...), or None for "
                f"all data at once; got {self.window!r}."
            )

    @property
    def returns(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """ "posterior", "minimiser" for the mode alone, "filtering" where windows cut the trajectory."""
        if self.sampler == "mode":
            return "minimiser"
        return "posterior" if self.window is None else "filtering"

    def why_not(self, problem: Any) -> str | None:
        """Data need a Gaussian form, randomised draws Gaussian data; windows must fit the data and the state."""
        reason = why_no_gaussian_noise(problem, matching=True)
        if reason:
            return reason
        counts = [n for n, (kind, _) in problem.structure.families.items() if kind == "matched"]
        if counts and self.sampler == "randomised":
            return (
                f"observed site '{counts[0]}' is {problem.structure.families[counts[0]][1]}, not Normal, and "
                "randomised draws perturb Gaussian data; use pf.FourDVar(sampler='laplace')"
            )
        return None if self.window is None else self._why_not_windows(problem, self.window)

    def _why_not_windows(self, space: StateSpace, window: Window) -> str | None:
        n, steps = space.state_dimension, space.steps
        if window.length > steps:
            return f"a window of {window.length} steps is longer than the data, which have {steps}; use window=None"
        if space.joined or self.augment:
            return "windows carry the state only, not parameters; use window=None, or fix the parameters"
        free = space.noise_dimension and self.constraint == "weak"
        if window.shift < window.length and free:
            return (
                f"windows of {window.length} steps that move by {window.shift} overlap, and would forget what earlier "
                f"ones found of the noise of sites {list(space.structure.latent)}; use constraint='strong', or "
                "shift = length"
            )
        if isinstance(window.covariance, str):
            size = max(n, space.initial_dimension) + (window.length * space.noise_dimension if free else 0)
            if window.covariance == "flow" and size > _four_dvar._DENSE:
                return (
                    f"covariance='flow' needs a matrix of the window's control, which has {size} numbers; more than "
                    f"{_four_dvar._DENSE} take covariance='climatology', or an array"
                )
            return None
        if window.covariance.shape != (n, n):
            return f"the background covariance has shape {window.covariance.shape}, and the state {n} numbers"
        return None

    def _plan(self, chain: Chain) -> Plan:
        window = self.window or Window(chain.structure.length)
        numbers = (window.length, window.shift, window.covariance, window.scale)
        strong = self.constraint == "strong" or not chain.noise_dimension
        return Plan(strong, *numbers, self.sampler, self.iterations, self.solver_steps)

    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """Laplace's approximation of log p(data), exact for linear Gaussian models with all data in one window."""
        found = cycle(chain, self._plan(chain)._replace(sampler="mode"), key, 1, "last")
        return found.totals.evidence

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`."""
        found = cycle(chain, self._plan(chain), key, draws, store)
        late = jax.random.normal(jax.random.fold_in(key, 3), (found.initial.shape[0], chain.late_dimension))
        state, riders = _end(found)
        empty: dict[str, Array] = {}
        if store == "draws":
            sites = _sites(chain, found.initial, found.smoothing, (state, riders), late)
            parts = (sites.values, sites.log_prior, sites.log_likelihood)
            filtering = empty if self.window is None else _along(chain, found.initial, found.filtering)
        else:
            parts, filtering = (_last_sites(chain, found), empty, empty), found.moments
        joined = found.initial[:, : chain.joined_size]
        last = (jnp.concatenate([joined, state], 1), each(riders, state.shape[0]))
        evidence = found.totals.evidence
        evidence = evidence if chain.joined else evidence + chain.static_log_likelihood()
        summary = _summary(found, self.window.length if self.window else chain.structure.length)
        return StateDraws(parts[0], filtering, empty, parts[1], parts[2], last, evidence, summary)

    def warnings(self, draws: Draws) -> list[str]:
        """Windows and draws that did not converge."""
        notes, found = [], draws.summary
        late, of_draws = float(found.get("windows_not_converged", 0)), float(found.get("draws_not_converged", 0))
        if late:
            what = "Gauss-Newton" if self.window is None else f"Gauss-Newton in {late:.0f} windows"
            notes.append(
                f"{what} did not converge: the last step was up to {float(found['newton_decrement']):.2g} standard "
                "deviations long. Give more iterations or solver_steps; if that does not help, errors grow too much "
                "within the window: use float64 (JAX_ENABLE_X64=1) or window=pf.Window(...)."
            )
        if of_draws:
            notes.append(
                f"{of_draws:.0f} randomised draws did not converge. Give more iterations, or use sampler='laplace'."
            )
        return notes


def _summary(found: Cycled, length: int) -> dict[str, Array]:
    totals = found.totals
    return {
        # Steps of the model for the modes; those of randomised draws are not counted.
        "evaluations": 2 * length * totals.iterations,
        "gradient_evaluations": length * (totals.iterations + totals.solver_steps),
        "objective": totals.objective,
        "iterations": totals.iterations,
        "solver_steps": totals.solver_steps,
        "newton_decrement": totals.decrement,
        "converged": totals.late == 0,
        "windows_not_converged": totals.late,
        "draws_not_converged": totals.late_draws,
        "log_evidence_se": jnp.sqrt(totals.evidence_variance),
    }


def _end(found: Cycled) -> tuple[Array, list[Array]]:
    """States (draw, n) after the last step, and what rides along."""
    return found.last.states[:, found.offset], [r[found.offset] for r in found.last.riders]


def _sites(chain: Chain, initial: Array, rows: Rows, end: tuple, late: Array) -> trajectories.Sites:
    """All sites of draws of a trajectory, leading axis draw."""
    k = chain.joined_size

    def one(z: Array, states: Array, noise: Array, state: Array, w: Array) -> trajectories.Sites:
        last = (state[None], each(end[1], 1))
        inner = chain.at(z[:k])
        found = trajectories.posterior(inner, rows.riders, z[None, k:], states[:, None], noise[:, None], last, w[None])
        return jax.tree.map(lambda v: v[0], found)

    return jax.vmap(one)(initial, rows.states, rows.noise, end[0], late)


def _along(chain: Chain, initial: Array, rows: Rows) -> dict[str, Array]:
    """Sites of the steps of draws of a trajectory, axes (draw, time, ...)."""
    times = jnp.arange(rows.states.shape[1])

    def one(z: Array, states: Array, noise: Array) -> dict[str, Array]:
        inner = chain.at(z[: chain.joined_size])
        found = trajectories.along(inner, rows.riders, states[:, None], noise[:, None], times)["values"]
        return jax.tree.map(lambda v: v[:, 0], found)

    return jax.vmap(one)(initial, rows.states, rows.noise)


def _last_sites(chain: Chain, found: Cycled) -> dict[str, Array]:
    """Sites of the last step, and parameters, at draws."""
    rows = slice(found.offset - 1, found.offset)

    def one(z: Array) -> dict[str, Array]:
        values = {n: v[0] for n, v in _four_dvar.path_sites(found.stretch, z, rows).items()}
        outer = chain.at(z[: chain.joined_size]).outer
        return values | {n: outer[n] for n in chain.joined}

    return jax.vmap(one)(found.last.controls)
