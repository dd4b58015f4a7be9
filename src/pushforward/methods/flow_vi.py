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
from pushforward.learned.flows import Flow, Given, Transport, affine, flow_option, log_scale, path, trainable
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
_WIDENING = 0.85
"""In units of the spread of the length of e, which does not depend on d."""
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

    flow: Flow | Given = eqx.field(default="coupling_spline", converter=flow_option)
    samples: int = 256
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
        transport, curve, steps, first, done = self.transport, np.zeros(0), 0, 0, True
        if transport is None:
            transport, state, first = self._trained(problem, key, runner)
            curve, steps, done = np.asarray(state.curve), int(state.step), bool(state.done)
        else:
            check_transport("FlowVI", transport, problem)
        d = problem.dimension
        noise = points.fit_noise(jax.random.fold_in(key, 2), max(_FRESH, 2 * d), d, draws)
        z, fresh, log_weights = runner.call(_pushed, problem, transport, noise.fresh, noise.drawn, runner.mesh)
        summary = evidence_summary(log_weights) | {"steps": steps, "elbo_curve": -curve[np.isfinite(curve)]}
        outcome = Outcome.SUCCESS if done else Outcome.MAXIMUM_STEPS
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
        remedy = "Give more layers or steps, tempering=500 for several modes, or use NUTS or TemperedSMC."
        return khat_warning(float(draws.summary["khat"]), remedy)

    def _with(self, transport: Transport) -> Self:
        return eqx.tree_at(lambda m: m.transport, self, transport, is_leaf=lambda v: v is None)

    def _trained(self, problem: InverseProblem, key: Key, runner: Runner) -> tuple[Transport, Training, int]:
        """The transport, its training, and the gradients that the start took."""
        d = problem.dimension
        noise = points.fit_noise(jax.random.fold_in(key, 1), 2 * max(256, 4 * d), d, 1)
        mean, root, evaluations, state = runner.call(_start, self, problem, noise, key, runner.mesh)
        size = max(self._trainer.window, -(-self.steps // 10)) if runner.progress else self.steps
        for stop in range(size, self.steps + size, size):
            end = jnp.asarray(min(stop, self.steps))
            state = runner.call(_advance, state, end, self, problem, mean, root, key, runner.mesh)
            if bool(state.done):
                break
        return Transport(self.flow, jax.tree.leaves(state.weights), mean, root), state, int(evaluations)

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


def _start(
    method: FlowVI, problem: InverseProblem, noise: points.FitNoise, key: Key, mesh: Mesh | None
) -> tuple[Array, Array, Array, Training]:
    """Mean and root that the flow starts from, gradients that they took, and the training before its first step."""
    d = problem.dimension
    weights, _ = trainable(method.flow.build(jax.random.fold_in(key, 4), d))
    state = method._trainer.start(weights)
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
    _, rest = trainable(method.flow.build(jax.random.key(0), d))
    constant = 0.5 * d * _LOG_2PI + log_scale(root)

    def target(z: Array, power: Array) -> Array:
        whole = problem.log_density(z)
        if not method.tempering:
            return whole
        prior = problem.log_prior(z)
        return prior + power * (whole - prior)

    def loss(weights: Any, step_key: Key, step: Array) -> tuple[Array, Array]:
        power = 0.01 ** jnp.maximum(1.0 - step / max(method.tempering, 1), 0.0)
        bijection = eqx.combine(weights, rest)

        def one(e: Array) -> tuple[Array, Array]:
            x, slope, log_det = path(bijection, e)
            value = target(affine(mean, root, x), power)
            return value - jnp.dot(slope, x), value + 0.5 * jnp.sum(e**2) + log_det

        e, weight = _wide_noise(step_key, method.samples, d)
        surrogate, gain = parallel.vmap(one, mesh)(e)
        gain = jax.lax.stop_gradient(gain)
        return -jnp.mean(weight * surrogate), -(jnp.sum(weight * gain) / jnp.sum(weight) + constant)

    return method._trainer.advance(state, stop, loss, jax.random.fold_in(key, 5))


def _wide_noise(key: Key, samples: int, d: int) -> tuple[Array, Array]:
    """Antithetic noise of which half is wider than N(0, I), and importance weights that make up for it.

    Tails are then learned from many points of small weight, not from few: it is they that decide on Pareto k-hat. The
    weights are those of the mixture of both laws (Veach and Guibas 1995), at most 2.
    """
    half = -(-samples // 2)
    wide = 1.0 + _WIDENING / d**0.5
    scales = jnp.where(jnp.arange(half) < half // 2, wide, 1.0)[:, None]
    e = scales * jax.random.normal(key, (half, d))
    log_ratio = 0.5 * jnp.sum(e**2, 1) * (1 - wide**-2) - d * jnp.log(wide)
    weight = 2.0 / (1.0 + jnp.exp(log_ratio))
    return jnp.concatenate([e, -e])[:samples], jnp.concatenate([weight, weight])[:samples]


def _pushed(
    problem: InverseProblem, transport: Transport, fresh: Array, drawn: Array, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    """Draws (draw, d); fresh draws (replicate, n, d) and log p - log q at them."""
    replicates, n, d = fresh.shape
    blocks = -(-drawn.shape[0] // n)
    # One body for all: the map and the model are compiled once.
    padded = jnp.resize(drawn, (blocks, n, d))

    def one(e: Array) -> tuple[Array, Array]:
        z, log_det = transport.push(e)
        return z, problem.log_density(z) + 0.5 * jnp.sum(e**2) + 0.5 * d * _LOG_2PI + log_det

    z, log_weights = jax.lax.map(parallel.vmap(one, mesh), jnp.concatenate([fresh, padded]))
    return z[replicates:].reshape(-1, d)[: drawn.shape[0]], z[:replicates], log_weights[:replicates]
