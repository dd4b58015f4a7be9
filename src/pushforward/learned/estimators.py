"""What is learned of u given c: a conditional flow, a flow of matched velocities, an energy map, mean and sd.

u of shape (d,) are coordinates whose prior is near N(0, I); c of shape (k,) is what an embedding makes of the data. A
loss never evaluates a density of the model: it sees pairs (u, c) alone, and its expectation is least at the posterior
(for `PointEstimate`, at its mean and variance).
"""

from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.learned.flows import Flow, log_density, transform

_LOG_2PI = 1.8378770664093453


class Estimator(eqx.Module):
    """Base of estimators. Subclasses are final; their fields are options."""

    has_density: ClassVar[bool] = False

    @abstractmethod
    def build(self, key: Key, dimension: int, condition: int) -> Any:
        """Networks with random weights."""

    @abstractmethod
    def loss(self, network: Any, u: Array, c: Array, key: Key) -> Array:
        """Loss of one pair."""

    @abstractmethod
    def push(self, network: Any, e: Array, c: Array) -> Array:
        """u from noise e ~ N(0, I) of the same shape."""

    def weighed(self, network: Any, e: Array, c: Array) -> tuple[Array, Array]:
        """u from noise, and log q(u given c) there."""
        u = self.push(network, e, c)
        return u, self.log_density(network, u, c)

    def log_density(self, network: Any, u: Array, c: Array) -> Array:
        """log q(u given c), where `has_density`."""
        raise MethodError(f"{type(self).__name__} has no density.")


class ConditionalFlow(Estimator):
    """A normalising flow whose layers see the data (neural posterior estimation: Papamakarios and Murray 2016).

    Loss: ``-log q(u given c)``; its expectation over the joint distribution is least, namely h(u given y), where q is
    the posterior for all data.

    Args:
        flow: the architecture.
    """

    flow: Flow = eqx.field(default_factory=lambda: Flow(layers=5, width=64, depth=3))

    has_density = True

    def __check_init__(self):
        if self.flow.architecture not in CONDITIONAL:
            raise MethodError(
                f"a conditional flow takes one of {list(CONDITIONAL)}, whose layers the data can bend and which can be "
                f"drawn from; got {self.flow.architecture!r}."
            )

    def build(self, key: Key, dimension: int, condition: int) -> Any:
        """See `Estimator.build`."""
        return self.flow.build(key, dimension, condition, fast="density")

    def loss(self, network: Any, u: Array, c: Array, key: Key) -> Array:
        """See `Estimator.loss`."""
        return -log_density(network, u, c)

    def push(self, network: Any, e: Array, c: Array) -> Array:
        """See `Estimator.push`."""
        return transform(network, e, c)[0]

    def weighed(self, network: Any, e: Array, c: Array) -> tuple[Array, Array]:
        """See `Estimator.weighed`; one pass gives both."""
        u, log_det = transform(network, e, c)
        return u, -0.5 * jnp.sum(e**2) - 0.5 * e.size * _LOG_2PI - log_det

    def log_density(self, network: Any, u: Array, c: Array) -> Array:
        """See `Estimator.log_density`."""
        return log_density(network, u, c)


class FlowMatching(Estimator):
    """A velocity that carries noise to the posterior along straight lines (Lipman et al. 2023; Wildberger et al. 2023).

    Loss: ``|v(t, (1 - t) e + t u, c) - (u - e)|^2`` for t ~ U(0, 1). Draws solve ``dx/dt = v`` from t = 0 to 1 with the
    classical Runge-Kutta scheme; their density has the divergence of v integrated along the way. The network may be of
    any kind, so it scales to many dimensions better than layers that must be invertible; a draw costs `4 steps` of its
    evaluations.

    Args:
        width: units of the hidden layers.
        depth: hidden layers.
        steps: steps of the solver.
    """

    width: int = 128
    depth: int = 4
    steps: int = 20

    has_density = True

    def __check_init__(self):
        _check("FlowMatching", width=self.width, depth=self.depth, steps=self.steps)

    def build(self, key: Key, dimension: int, condition: int) -> Any:
        """See `Estimator.build`."""
        return eqx.nn.MLP(dimension + condition + 3, dimension, self.width, self.depth, activation=jax.nn.silu, key=key)

    def _velocity(self, network: Any, t: Array, x: Array, c: Array) -> Array:
        angle = jnp.pi * t
        return network(jnp.concatenate([x, c, jnp.stack([t, jnp.sin(angle), jnp.cos(angle)])]))

    def loss(self, network: Any, u: Array, c: Array, key: Key) -> Array:
        """See `Estimator.loss`."""
        time_key, noise_key = jax.random.split(key)
        t, e = jax.random.uniform(time_key, dtype=u.dtype), jax.random.normal(noise_key, u.shape, u.dtype)
        return jnp.sum((self._velocity(network, t, (1 - t) * e + t * u, c) - (u - e)) ** 2)

    def push(self, network: Any, e: Array, c: Array) -> Array:
        """See `Estimator.push`."""
        return self._solve(lambda t, x: self._velocity(network, t, x, c), e, 0.0, 1.0)

    def log_density(self, network: Any, u: Array, c: Array) -> Array:
        """See `Estimator.log_density`; d backward passes for each of 4 steps."""

        def slope(t: Array, state: Array) -> Array:
            velocity, push_forward = jax.linearize(lambda x: self._velocity(network, t, x, c), state[:-1])
            divergence = jnp.trace(jax.vmap(push_forward)(jnp.eye(u.size, dtype=u.dtype)))
            return jnp.append(velocity, divergence)

        back = self._solve(slope, jnp.append(u, 0.0), 1.0, 0.0)
        e, volume = back[:-1], back[-1]
        # From t = 1 to 0 the integral of the divergence comes out with the sign of log|det du/de| reversed.
        return -0.5 * jnp.sum(e**2) - 0.5 * u.size * _LOG_2PI + volume

    def _solve(self, slope: Any, start: Array, begin: float, end: float) -> Array:
        h = (end - begin) / self.steps

        def step(x: Array, i: Array) -> tuple[Array, None]:
            t = begin + h * i
            first = slope(t, x)
            second = slope(t + h / 2, x + h / 2 * first)
            third = slope(t + h / 2, x + h / 2 * second)
            fourth = slope(t + h, x + h * third)
            return x + h / 6 * (first + 2 * second + 2 * third + fourth), None

        return jax.lax.scan(step, start, jnp.arange(self.steps, dtype=start.dtype))[0]


class EnergyMap(Estimator):
    """A map T(e, c) of noise that need not be invertible, by the energy score (Gneiting and Raftery 2007, eq. 20).

    Loss: ``mean_i |T(e_i, c) - u| - mean_{i < j} |T(e_i, c) - T(e_j, c)| / 2``, the unbiased estimate from `samples`
    draws. The score is strictly proper, so its expectation is least where T pushes N(0, I) to the posterior. Without a
    density there is no Pareto k-hat and no correction.

    Args:
        width: units of the hidden layers.
        depth: hidden layers.
        samples: draws for each simulation in a step.
    """

    width: int = 128
    depth: int = 3
    samples: int = 8

    def __check_init__(self):
        _check("EnergyMap", width=self.width, depth=self.depth)
        _check("EnergyMap", 2, samples=self.samples)

    def build(self, key: Key, dimension: int, condition: int) -> Any:
        """See `Estimator.build`."""
        direct, bent = jax.random.split(key)
        inputs = dimension + condition
        linear = eqx.nn.Linear(inputs, dimension, key=direct)
        return linear, eqx.nn.MLP(inputs, dimension, self.width, self.depth, activation=jax.nn.silu, key=bent)

    def push(self, network: Any, e: Array, c: Array) -> Array:
        """See `Estimator.push`."""
        inputs = jnp.concatenate([e, c])
        return network[0](inputs) + network[1](inputs)

    def loss(self, network: Any, u: Array, c: Array, key: Key) -> Array:
        """See `Estimator.loss`."""
        m = self.samples
        draws = jax.vmap(lambda e: self.push(network, e, c))(jax.random.normal(key, (m, u.size), u.dtype))
        rows, columns = jnp.triu_indices(m, 1)
        apart = jnp.sum(_norm(draws[rows] - draws[columns])) / (m * (m - 1))
        return jnp.mean(_norm(draws - u)) - apart


class PointEstimate(Estimator):
    """Posterior mean and standard deviation of each coordinate in z, by one network.

    Loss: minus the log density of N(u; m(c), diag s(c)^2); its expectation is least at the posterior mean and variance,
    whatever the shape of the posterior. Draws are those of that Gaussian, so correlations and tails are not the
    posterior's: use it for a first look, or as a summary for another method.

    Args:
        width: units of the hidden layers.
        depth: hidden layers.
    """

    width: int = 128
    depth: int = 3

    has_density = True

    def __check_init__(self):
        _check("PointEstimate", width=self.width, depth=self.depth)

    def build(self, key: Key, dimension: int, condition: int) -> Any:
        """See `Estimator.build`."""
        direct, bent = jax.random.split(key)
        linear = eqx.nn.Linear(condition, 2 * dimension, key=direct)
        return linear, eqx.nn.MLP(condition, 2 * dimension, self.width, self.depth, activation=jax.nn.silu, key=bent)

    def _moments(self, network: Any, c: Array) -> tuple[Array, Array]:
        mean, log_sd = jnp.split(network[0](c) + network[1](c), 2)
        return mean, log_sd

    def loss(self, network: Any, u: Array, c: Array, key: Key) -> Array:
        """See `Estimator.loss`."""
        return -self.log_density(network, u, c)

    def push(self, network: Any, e: Array, c: Array) -> Array:
        """See `Estimator.push`."""
        mean, log_sd = self._moments(network, c)
        return mean + jnp.exp(log_sd) * e

    def log_density(self, network: Any, u: Array, c: Array) -> Array:
        """See `Estimator.log_density`."""
        mean, log_sd = self._moments(network, c)
        return jnp.sum(-0.5 * ((u - mean) * jnp.exp(-log_sd)) ** 2 - log_sd - 0.5 * _LOG_2PI)


NAMES: dict[str, type[Estimator]] = {
    "flow_matching": FlowMatching,
    "energy": EnergyMap,
    "point": PointEstimate,
}
"""Estimators beside flows, which have the names of their architectures."""

CONDITIONAL = ("coupling", "coupling_spline", "autoregressive", "autoregressive_spline")
"""Architectures whose every layer sees the condition, and whose inverse is in closed form."""


def estimator_option(value: Any) -> Estimator:
    """An estimator, a flow, or a name of either with its defaults."""
    if isinstance(value, Estimator):
        return value
    if isinstance(value, str) and value in CONDITIONAL:
        value = Flow(value, layers=5, width=64, depth=3)
    if isinstance(value, Flow):
        return ConditionalFlow(value)
    if isinstance(value, str) and value in NAMES:
        return NAMES[value]()
    raise MethodError(
        f"estimator= takes one of {[*CONDITIONAL, *NAMES]}, or an instance such as pf.Flow('autoregressive') or "
        f"pf.FlowMatching(width=64); got {value!r}."
    )


def _norm(x: Array) -> Array:
    """Euclidean norm along the last axis, with slope 0 at 0."""
    square = jnp.sum(x**2, -1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _check(owner: str, least: int = 1, **options: Any) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{owner}({name}=...) takes an integer of at least {least}; got {value!r}.")
