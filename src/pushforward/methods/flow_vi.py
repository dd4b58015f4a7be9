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
from pushforward.learned.flows import Flow, Transport, affine, flow_option, inverse, log_scale, trainable, transform
from pushforward.learned.training import Trainer, Training
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
    vanishes where q is the posterior. Training ends when a lower learning rate brings nothing any more.

    Use it for bent and skewed posteriors of up to some tens of dimensions, whose gradient is cheap. Reverse KL covers
    the modes that it finds: for several modes give `tempering`. Pareto k-hat above 0.7 says that part of the
    posterior is missed; where it is below, `correct` removes the error that is left.

    Args:
        flow: an architecture by name, such as "coupling_spline", or `pf.Flow(...)`.
        samples: draws per step.
        steps: at most.
        learning_rate: of Adam, at the start.
        tolerance: gain of the mean ELBO over 50 steps, in nats, below which the rate is lowered.
        tempering: steps in which the likelihood's power rises from 0.01 to 1; the flow then starts at the prior.
        correct: "none"; "psis", draws resampled by Pareto smoothed importance weights; "imh", an independence
            Metropolis chain that the flow proposes to, exact as it gets long.
        transport: the trained map; `fit` sets it.

    Example:
        >>> import pushforward as pf
        >>> pf.FlowVI("autoregressive_spline").flow.architecture
        'autoregressive_spline'
    """

    flow: Flow = eqx.field(default="coupling_spline", converter=flow_option)
    samples: int = 128
    steps: int = 2000
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
        transport, curve, steps = self.transport, np.zeros(0), 0
        if transport is None:
            transport, state, first = self._trained(problem, key, runner)
            curve, steps = np.asarray(state.curve), int(state.step)
        else:
            check_transport("FlowVI", transport, problem)
            first = 0
        noise = points.fit_noise(
            jax.random.fold_in(key, 2), max(_FRESH, 2 * problem.dimension), problem.dimension, draws
        )
        fresh, log_weights = runner.call(_evaluated, problem, transport, noise.fresh, runner.mesh)
        z = runner.call(_pushed, transport, noise.drawn, runner.mesh)
        summary = evidence_summary(log_weights) | {"steps": steps, "elbo_curve": -curve[np.isfinite(curve)]}
        good = np.isfinite(log_weights).all()
        if good and self.correct != "none":
            corrected = {"psis": _correction.smoothed, "imh": _correction.independence}[self.correct]
            z, numbers = corrected(fresh, np.asarray(log_weights), draws, jax.random.fold_in(key, 3))
            summary |= numbers
        outcome = Outcome.SUCCESS if good else Outcome.NONFINITE
        if good and self.transport is None and not bool(state.done):
            outcome = Outcome.MAXIMUM_STEPS
        gradient = count(first + steps * self.samples)
        runs = count(first + steps * self.samples + log_weights.size)
        return Draws(z[None], {}, summary, np.asarray(int(outcome)), runs, gradient, log_weights)

    def warnings(self, draws: Draws) -> list[str]:
        """Pareto k-hat above 0.7."""
        remedy = "Give more layers or steps, tempering=500 for several modes, or use NUTS or TemperedSMC."
        return khat_warning(float(draws.summary["khat"]), remedy)

    def _with(self, transport: Transport) -> Self:
        return eqx.tree_at(lambda m: m.transport, self, transport, is_leaf=lambda v: v is None)

    def _trained(self, problem: InverseProblem, key: Key, runner: Runner) -> tuple[Transport, Training, int]:
        """The transport, its training, and the gradients that the start took."""
        mean, root, first = self._gaussian(problem, key, runner)
        state = runner.call(_begin, self, key, mean)
        trainer = self._trainer
        size = max(trainer.window, -(-self.steps // 10)) if runner.progress else self.steps
        for stop in range(size, self.steps + size, size):
            state = runner.call(
                _advance, state, jnp.asarray(min(stop, self.steps)), self, problem, mean, root, key, runner.mesh
            )
            if bool(state.done):
                break
        arrays = runner.call(_arrays, self, state.weights, key, mean)
        return Transport(self.flow, arrays, mean, root), state, first

    def _gaussian(self, problem: InverseProblem, key: Key, runner: Runner) -> tuple[Array, Array, int]:
        """Mean and root of the Gaussian that the flow starts at, and how many gradients that took."""
        d = problem.dimension
        if self.tempering:
            return jnp.zeros(d), jnp.ones(d), 0
        noise = points.fit_noise(jax.random.fold_in(key, 1), 2 * max(256, 4 * d), d, 1)
        start = GaussianVI(covariance="full" if d <= _DENSE else "diagonal")
        mean, root, steps = runner.call(_start, start, problem, noise, runner.mesh)
        return mean, root, int(steps) * noise.matched.shape[0]

    @property
    def _trainer(self) -> Trainer:
        return Trainer(self.steps, self.learning_rate, tolerance=self.tolerance, patient=self.tempering)


def check_transport(owner: str, transport: Transport, problem: InverseProblem) -> None:
    """Refuse a transport that was trained in another number of dimensions."""
    if transport.dimension != problem.dimension:
        raise MethodError(
            f"{owner}: the flow was fitted to a model with {transport.dimension} latent numbers, and this one has "
            f"{problem.dimension}. Fit it to this model: FlowVI().fit(model, ...)."
        )


def _start(method: GaussianVI, problem: InverseProblem, noise: Any, mesh: Mesh | None) -> tuple[Array, Array, Array]:
    covariance = method.covariance
    assert isinstance(covariance, Full | Diagonal)
    last = climb(method, covariance, problem, noise, mesh)
    return last.family.mean, last.family.root, last.steps


def _begin(method: FlowVI, key: Key, mean: Array) -> Training:
    weights, _ = trainable(method.flow.build(jax.random.fold_in(key, 4), mean.shape[0]))
    return method._trainer.start(weights)


def _arrays(method: FlowVI, weights: Any, key: Key, mean: Array) -> list[Array]:
    """All arrays of the map with trained weights; those that are not trained follow from the key."""
    _, rest = trainable(method.flow.build(jax.random.fold_in(key, 4), mean.shape[0]))
    return jax.tree.leaves(eqx.filter(eqx.combine(weights, rest), eqx.is_array))


def _advance(
    state: Training,
    stop: Array,
    method: FlowVI,
    problem: InverseProblem,
    mean: Array,
    root: Array,
    key: Key,
    mesh: Mesh | None,
) -> Training:
    d = mean.shape[0]
    _, rest = trainable(method.flow.build(jax.random.fold_in(key, 4), d))

    def target(z: Array, power: Array) -> Array:
        whole = problem.log_density(z)
        if not method.tempering:
            return whole
        prior = problem.log_prior(z)
        return prior + power * (whole - prior)

    def loss(weights: Any, step_key: Key, step: Array) -> Array:
        power = 0.01 ** jnp.maximum(1.0 - step / max(method.tempering, 1), 0.0)
        frozen = eqx.combine(jax.lax.stop_gradient(weights), rest)
        moving = eqx.combine(weights, rest)

        def one(e: Array) -> Array:
            x, log_det = transform(moving, e)
            value = target(affine(mean, root, x), power)
            if not method.flow.invertible:
                return value + log_det
            back, log_det_back = inverse(frozen, x)
            return value + 0.5 * jnp.sum(back**2) - log_det_back

        half = jax.random.normal(step_key, (-(-method.samples // 2), d))
        values = parallel.vmap(one, mesh)(jnp.concatenate([half, -half])[: method.samples])
        constant = 0.5 * d * _LOG_2PI + log_scale(root) + (0.0 if method.flow.invertible else 0.5 * d)
        return -(jnp.mean(values) + constant)

    return method._trainer.advance(state, stop, loss, jax.random.fold_in(key, 5))


def _evaluated(problem: InverseProblem, transport: Transport, fresh: Array, mesh: Mesh | None) -> tuple[Array, Array]:
    """Fresh draws (replicate, n, d) and log p - log q at them."""
    batch = parallel.vmap(problem.log_density, mesh)

    def replicate(e: Array) -> tuple[Array, Array]:
        z, log_det = jax.vmap(transport.push)(e)
        log_q = -0.5 * jnp.sum(e**2, 1) - 0.5 * e.shape[1] * _LOG_2PI - log_det
        return z, batch(z) - log_q

    return jax.lax.map(replicate, fresh)


def _pushed(transport: Transport, e: Array, mesh: Mesh | None) -> Array:
    return parallel.vmap(lambda v: transport.push(v)[0], mesh)(e)
