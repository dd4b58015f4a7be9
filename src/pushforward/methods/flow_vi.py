"""`FlowVI`: the closest member of a family of normalising flows to the posterior, in reverse KL."""

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.flows import Flow, Given, Transport, affine, flow_option, path, weights_of, with_weights
from pushforward.learned.training import WINDOW, Adam, Schedule
from pushforward.math import points
from pushforward.methods import _correction
from pushforward.methods._base import Draws, Method, check_choice, check_integer, check_positive, count
from pushforward.methods._covariance import Diagonal, Full
from pushforward.methods._importance import evidence_summary, khat_warning
from pushforward.methods.gaussian_vi import GaussianVI, climb
from pushforward.model.inverse import InverseProblem, read_problem

_DENSE = 100
"""Dimensions up to which the flow starts at a full Gaussian."""
_FRESH = 1024
_WIDENING = 1.6
"""In units of the spread of the length of e, which does not depend on d."""
_SCORE, _CUT = 4.0, 3.0
"""Weight of the slope by scores while tempering, and the largest difference of log weights that it believes."""
_LOG_2PI = 1.8378770664093453
CORRECTIONS = {
    "none": "draws of the flow",
    "psis": "draws resampled by smoothed importance weights",
    "imh": "an independence Metropolis chain with the flow as proposal",
}


class FlowVI(Method):
    """Variational inference by a normalising flow in ``z``.

    Maximises ``ELBO = E_q[log p(z, y) - log q(z)]`` over ``z = m + S^1/2 T(e)``, e ~ N(0, I): m and S are those of
    full Gaussian variational inference, T a flow that starts near the identity (Rezende and Mohamed 2015). Gradients
    follow the path of the draws alone (Roeder, Wu and Duvenaud 2017, "Sticking the landing"), so that their noise
    vanishes where q is the posterior. Half of the draws come from wider noise and are weighted by the square root of
    what would make up for it: where the family holds the posterior the optimum is the same, elsewhere tails count for
    more than in the ELBO. When 100 steps bring nothing more the learning rate falls to zero, in as many steps as were
    taken.

    Use it for bent and skewed posteriors of up to some tens of dimensions, whose gradient is cheap. Reverse KL covers
    the modes that it finds, and k-hat does not see the others: for several modes give `tempering=1000`, and
    `correct="psis"`, which sets their masses right. Pareto k-hat above 0.7 says that part of the
    posterior is missed; where it is below, `correct` removes the error that is left.

    Args:
        flow: an architecture by name, such as "coupling_spline", `pf.Flow(...)`, or a bijection of FlowJAX, which
            `pf.save` cannot write.
        samples: draws per step.
        steps: at most.
        learning_rate: of Adam, at the start.
        tolerance: gain of the mean ELBO over 100 steps, in nats, below which the rate falls.
        tempering: steps in which the likelihood's power rises from 0.01 to 1; the flow then starts at the prior.
        correct: "none"; "psis", draws resampled by Pareto smoothed importance weights; "imh", an independence
            Metropolis chain that the flow proposes to, exact as it gets long.
        transport: the trained map; `fit` sets it.

    Example:
        >>> import pushforward as pf
        >>> pf.FlowVI("autoregressive_spline").flow.architecture
        'autoregressive_spline'
    """

    flow: Flow | Given = eqx.field(default="coupling_spline", converter=flow_option)
    samples: int = 256
    steps: int = 3000
    learning_rate: float = 5e-3
    tolerance: float = 2e-3
    tempering: int = 0
    correct: str = "none"
    transport: Transport | None = None

    shards = "samples"
    gradients = True

    def __check_init__(self):
        check_integer("FlowVI", 2, samples=self.samples)
        check_integer("FlowVI", 1, steps=self.steps)
        check_integer("FlowVI", 0, tempering=self.tempering)
        check_positive("FlowVI", learning_rate=self.learning_rate, tolerance=self.tolerance)
        check_choice("FlowVI", CORRECTIONS, correct=self.correct)
        if self.tempering >= self.steps:
            raise MethodError(
                f"FlowVI(tempering={self.tempering}, steps={self.steps}): tempering must leave steps at the full "
                "likelihood. Give more steps."
            )
        if self.transport is not None and not isinstance(self.transport, Transport):
            raise MethodError(f"FlowVI(transport=...) is set by FlowVI().fit(model, ...); got {self.transport!r}.")

    def fit(
        self,
        model: Any,
        *args: Any,
        key: int | Key = 0,
        progress: bool = True,
        mesh: Mesh | None = None,
        **kwargs: Any,
    ) -> Self:
        """Train the flow on a model and its data.

        Args:
            model: a NumPyro model.
            *args: its positional arguments, data included.
            key: an integer or a typed JAX key.
            progress: whether to show a progress bar.
            mesh: devices that share the samples.
            **kwargs: its named arguments.

        Returns:
            The same method with `transport` set: `infer` takes it without training again, `pf.save` writes it, and
            `pf.NUTS(transport=fitted)` samples in its coordinates.
        """
        problem = read_problem(model, args, kwargs)
        typed = jax.random.key(key) if isinstance(key, int) else key
        runner = Runner(progress=progress, label="FlowVI", mesh=parallel.check_mesh(mesh))
        return self._with(self._trained(problem, typed, runner)[0])

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        transport, schedule, first = self.transport, None, 0
        if transport is None:
            transport, schedule, first = self._trained(problem, key, runner)
        else:
            check_transport("FlowVI", transport, problem)
        steps = schedule.taken if schedule else 0
        d = problem.dimension
        noise = points.fit_noise(jax.random.fold_in(key, 2), max(_FRESH, 2 * d), d, draws)
        z, fresh, log_weights = runner.call(_pushed, problem, transport, noise.fresh, noise.drawn, runner.mesh)
        log_weights = log_weights + np.asarray(_log_scale(transport.root), log_weights.dtype)
        summary: dict[str, Any] = evidence_summary(log_weights) | {"steps": steps}
        outcome = Outcome.SUCCESS
        if schedule:
            summary["elbo_curve"] = _log_scale(transport.root) - np.asarray(schedule.losses)
            outcome = Outcome.SUCCESS if schedule.stalled else Outcome.MAXIMUM_STEPS
        if not np.isfinite(log_weights).all():
            outcome = Outcome.NONFINITE
        elif self.correct != "none":
            corrected = {"psis": _correction.smoothed, "imh": _correction.independence}[self.correct]
            z, numbers = runner.call(corrected, fresh, log_weights, draws, jax.random.fold_in(key, 3))
            summary |= numbers
        gradients = first + steps * self.samples
        runs = gradients + log_weights.size + (draws if self.correct == "none" else 0)
        return Draws(z[None], {}, summary, np.asarray(int(outcome)), count(runs), count(gradients), log_weights)

    def warnings(self, draws: Draws) -> list[str]:
        """Pareto k-hat above 0.7."""
        remedy = "Give more layers or steps, tempering=1000 for several modes, or use NUTS or TemperedSMC."
        return khat_warning(float(draws.summary["khat"]), remedy)

    def _with(self, transport: Transport) -> Self:
        return eqx.tree_at(lambda m: m.transport, self, transport, is_leaf=lambda v: v is None)

    def _trained(self, problem: InverseProblem, key: Key, runner: Runner) -> tuple[Transport, Schedule, int]:
        """The transport, its training, and the gradients that the start took."""
        d = problem.dimension
        noise = points.fit_noise(jax.random.fold_in(key, 1), 2 * max(256, 4 * d), d, 1)
        mean, root, first, state = runner.call(_start, self, problem, noise, key, runner.mesh)
        schedule = Schedule(self.steps, self.learning_rate, self.tolerance, self.tempering)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        while schedule.taken < schedule.end:
            e, weights = _wide_noise(generator, self.samples, d)
            powers = None
            if self.tempering:
                powers = 0.01 ** np.maximum(1 - (schedule.taken + np.arange(WINDOW)) / self.tempering, 0.0)
            steps = np.arange(schedule.taken, schedule.taken + WINDOW)
            window = _floats((e, weights, schedule.rates(), powers, steps))
            state, loss = runner.call(_window, state, window, self.flow, problem, mean, root, runner.mesh)
            schedule.note(float(loss))
        return Transport(self.flow, state.weights, mean, root), schedule, int(first)


def check_transport(owner: str, transport: Transport, problem: InverseProblem) -> None:
    """Refuse a transport that was trained in another number of dimensions."""
    if transport.dimension != problem.dimension:
        raise MethodError(
            f"{owner}: the flow was fitted to a model with {transport.dimension} latent numbers, and this one has "
            f"{problem.dimension}. Fit it to this model: FlowVI().fit(model, ...)."
        )


def transport_option(value: Any) -> Transport | None:
    """The map of a fitted `FlowVI`, for methods that move in its coordinates."""
    if isinstance(value, FlowVI) and value.transport is not None:
        return value.transport
    if value is None or isinstance(value, Transport):
        return value
    given = "a FlowVI that is not fitted" if isinstance(value, FlowVI) else repr(value)
    raise MethodError(f"transport= takes a fitted flow, pf.FlowVI().fit(model, ...); got {given}.")


def _start(
    method: FlowVI, problem: InverseProblem, noise: points.FitNoise, key: Key, mesh: Mesh | None
) -> tuple[Array, Array, Array, Adam]:
    """Mean and root that the flow starts from, gradients that they took, and the training before its first step."""
    d = problem.dimension
    # A generator that compiles in half the time of the default one; initial weights need no better.
    bits = jax.random.key_data(jax.random.fold_in(key, 4))
    quick = jax.random.wrap_key_data(jnp.concatenate([bits, bits])[:4], impl="unsafe_rbg")
    state = Adam.start(weights_of(method.flow.build(quick, d)))
    if method.tempering:
        return jnp.zeros(d), jnp.ones(d), jnp.zeros((), int), state
    gaussian = GaussianVI(covariance="full" if d <= _DENSE else "diagonal")
    covariance = gaussian.covariance
    assert isinstance(covariance, Full | Diagonal)
    last = climb(gaussian, covariance, problem, noise, mesh)
    # The optimum of reverse KL is narrower than the posterior where that is no Gaussian, and a flow that starts too
    # narrow is slow to find the rest. The variance of log p - log q is twice the divergence that is left.
    misfit = jnp.var(last.log_weights) / d
    wider = 1.0 + jnp.where(jnp.isfinite(misfit), jnp.minimum(1.0, jnp.sqrt(misfit)), 1.0)
    return last.family.mean, wider * last.family.root, last.steps * noise.matched.shape[0], state


def _window(
    state: Adam, window: tuple, flow: Flow | Given, problem: InverseProblem, mean: Array, root: Array, mesh: Mesh | None
) -> tuple[Adam, Array]:
    """One window of steps, and the mean of the loss; the loss leaves out log|det root|."""
    d = mean.shape[0]
    noise, weights, rates, powers, steps = window

    def target(z: Array, power: Array | None) -> Array:
        whole = problem.log_density(z)
        if power is None:
            return whole
        prior = problem.log_prior(z)
        return prior + power * (whole - prior)

    def loss(flat: Array, e: Array, weight: Array, power: Array | None) -> tuple[Array, Array]:
        bijection = with_weights(flow, d, flat)

        def one(e: Array) -> tuple[Array, Array, Array]:
            x, slope, log_det = path(bijection, e, score=power is not None)
            value, along = target(affine(mean, root, x), power), jnp.dot(slope, x)
            return value - along, value + 0.5 * jnp.sum(e**2) + log_det, -log_det - along

        surrogate, gains, scores = parallel.vmap(one, mesh)(e)
        gains = jax.lax.stop_gradient(gains)
        gain = jnp.sum(weight**2 * gains) / jnp.sum(weight**2)
        if power is not None:
            surrogate = surrogate + _SCORE * jnp.clip(gains - gain, -_CUT, _CUT) * scores
        return -jnp.mean(weight * surrogate), -(gain + 0.5 * d * _LOG_2PI)

    def step(s: Adam, item: tuple) -> tuple[Adam, Array]:
        e, weight, rate, power, number = item
        slope, value = jax.grad(loss, has_aux=True)(s.weights, e, weight, power)
        return s.moved(slope, number, rate), value

    state, losses = jax.lax.scan(step, state, (noise, weights, rates, powers, steps))
    return state, jnp.mean(losses)


def _wide_noise(generator: np.random.Generator, samples: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Antithetic noise (window, samples, d) of which half is wider than N(0, I), and weights of it.

    At the posterior the slope vanishes for every e, so noise of any law has its fixed point there. Wide noise shows the
    tails, which decide on Pareto k-hat. The weights are square roots of the importance weights of the mixture of both
    laws (Veach and Guibas 1995): tails count for more than in reverse KL, and far ones still for little.
    """
    half = -(-samples // 2)
    wide = 1.0 + _WIDENING / d**0.5
    scales = np.where(np.arange(half) < half // 2, wide, 1.0)[:, None]
    e = scales * generator.standard_normal((WINDOW, half, d))
    log_ratio = 0.5 * np.sum(e**2, -1) * (1 - wide**-2) - d * np.log(wide)
    weights = (2.0 / (1.0 + np.exp(np.minimum(log_ratio, 700.0)))) ** 0.5
    return np.concatenate([e, -e], 1)[:, :samples], np.concatenate([weights, weights], 1)[:, :samples]


def _floats(arrays: tuple) -> tuple:
    """On the device, in its floating type, without compiling anything."""
    dtype = np.dtype(jnp.result_type(float))
    return tuple(None if x is None else jax.device_put(np.asarray(x, dtype)) for x in arrays)


def _log_scale(root: Array) -> float:
    """log|det root|."""
    matrix = np.asarray(root, float)
    return float(np.linalg.slogdet(matrix)[1] if matrix.ndim == 2 else np.sum(np.log(np.abs(matrix))))


def _pushed(
    problem: InverseProblem, transport: Transport, fresh: Array, drawn: Array, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    """Draws (draw, d); fresh draws (replicate, n, d) and log p - log q at them, less log|det root|."""
    replicates, n, d = fresh.shape
    blocks = -(-drawn.shape[0] // n)
    # One body for all: the map and the model are compiled once.
    padded = jnp.resize(drawn, (blocks, n, d))

    def one(e: Array) -> tuple[Array, Array]:
        z, log_det = transport.bend(e)
        return z, problem.log_density(z) + 0.5 * jnp.sum(e**2) + 0.5 * d * _LOG_2PI + log_det

    z, log_weights = jax.lax.map(parallel.vmap(one, mesh), jnp.concatenate([fresh, padded]))
    return z[replicates:].reshape(-1, d)[: drawn.shape[0]], z[:replicates], log_weights[:replicates]
