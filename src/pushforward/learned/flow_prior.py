"""`FlowPrior`: a NumPyro distribution learned from samples, the push of standard normal noise by a normalising flow."""

import functools
import math
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from pushforward import _files
from pushforward._errors import ArgumentError, CheckpointError, InferenceError, MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned import flows
from pushforward.learned._samples import checked, described, free_coordinates, named, standardisation
from pushforward.learned.fitting import Training, fit
from pushforward.learned.flows import Flow
from pushforward.model._maps import inside_support

_PROBE_TOLERANCE = 1e-3
_USABLE = ("coupling", "coupling_spline", "autoregressive", "autoregressive_spline")


@_files.Stored.register
class FlowPrior(dist.TransformedDistribution):
    """A prior known by samples only: a density with a sampler, for `numpyro.sample("x", prior)`.

    x = b(m + L T(e)), e ~ N(0, I): T is a normalising flow, m and L are mean and Cholesky factor of the samples, and
    b is NumPyro's bijection from R^d to the support (Rezende and Mohamed 2015; Papamakarios et al. 2021). The density
    is exact, log p(x) = log N(e; 0, I) - log|det dx/de|; what is approximate is the fit. All methods of this library
    work in e, where the prior is exactly standard normal. NumPyro's own NUTS and `Predictive` take it as well.

    Use it for samples of a posterior that becomes a prior, of a simulator's climatology, or of an archive of states;
    with fewer than about 1000 samples, or more than about 50 dimensions, a multivariate normal or a mixture is the
    safer choice. Modes that are far apart are joined by thin bridges of density, as by any continuous map of R^d.
    Architectures called autoregressive evaluate the density in one pass and x in d passes; coupling ones take one for
    both. `FlowPrior.fit` makes it; `pf.save` and `pf.load` write and read it.

    Attributes:
        event_shape: shape of one sample; the batch shape is (), and `expand` or a plate repeats it independently.

    Example:
        >>> import jax, pushforward as pf
        >>> samples = jax.random.gamma(jax.random.key(0), 3.0, (500,))
        >>> options = pf.Training(epochs=5)
        >>> prior = pf.FlowPrior.fit(samples, support=dist.constraints.positive, training=options, progress=False)
        >>> prior.event_shape, bool((prior.sample(jax.random.key(1), (100,)) > 0).all())
        ((), True)
    """

    def __init__(
        self,
        flow: Flow,
        weights: Array,
        mean: Array,
        root: Array,
        shape: tuple[int, ...],
        support: constraints.Constraint,
        *,
        validate_args: bool | None = None,
    ):
        push = FlowTransform(flow, weights, mean, root, shape)
        noise = dist.Normal(0.0, 1.0).expand((math.prod(shape),)).to_event(1)
        super().__init__(noise, [push, IntoSupport(support)], validate_args=validate_args)

    @classmethod
    def fit(
        cls,
        samples: Any,
        *,
        flow: str | Flow = "coupling_spline",
        training: Training = Training(patience=10, held_out=0.1),
        support: constraints.Constraint = constraints.real,
        key: int | Key = 0,
        progress: bool = True,
    ) -> Self:
        """Fit the flow to independent samples by maximum likelihood.

        Adam minimises the mean of -log p over the samples; those held out end the training before it learns the
        sample by heart, so thin draws of a Markov chain. Fitted is the law of the whole sample: coordinates may depend
        on each other.

        Args:
            samples: array (samples,) for a scalar, (samples, *event shape) else; at least 100, and 10 per dimension.
            flow: "coupling", "coupling_spline", "autoregressive" or "autoregressive_spline", or `pf.Flow(...)` of one
                of them. The affine ones take fewer samples, the splines bend more.
            training: how.
            support: where values lie: a constraint of NumPyro, such as `constraints.positive`,
                `constraints.interval(0, 1)` or `constraints.simplex`. Draws never leave it.
            key: an integer or a typed JAX key.
            progress: whether to show a progress bar.

        Raises:
            ArgumentError: `samples`, `training` or `key` is of another type.
            DataError: too few samples, values that are not finite or not inside the support, coordinates that are
                constant, discrete or linear combinations of others.
            MethodError: a flow or a support that cannot be used.
            InferenceError: the training did not reach a finite density.
        """
        flow = _usable(flows.flow_option(flow), training)
        key = _typed(key)
        if not isinstance(progress, bool):
            raise ArgumentError(f"progress= takes True or False; got {progress!r}.")
        support = named(described(support))
        values = checked(samples)
        free = free_coordinates(values, support)
        shape = free.shape[1:]
        mean, root = standardisation(values, free)
        white = np.linalg.solve(root, (free.reshape(len(free), -1) - mean).T).T
        weights = _trained(jnp.asarray(white, float), flow, training, key, progress)
        return cls(flow, weights, jnp.asarray(mean, float), jnp.asarray(root, float), shape, support)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Leaves are weights, mean and root alone: what NumPyro's `scan` stacks must have a batch axis of its own."""
        push, into = self.transforms
        return (push.weights, push.mean, push.root), (push.flow, push.shape, into.codomain)

    @classmethod
    def tree_unflatten(cls, aux_data: tuple, params: tuple) -> "FlowPrior":
        """See `tree_flatten`."""
        (flow, shape, support), (weights, mean, root) = aux_data, params
        return cls(flow, weights, mean, root, shape, support, validate_args=False)

    needs_model = False
    """Of `pf.load`."""

    def stored(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """See `pushforward._files.Stored`."""
        push, into = self.transforms
        # Weights mean nothing to a later version whose layers differ: two values tell.
        parts = (push.flow, push.weights, push.mean, push.root, push.shape, push(_probe(push)))
        names = ("flow", "weights", "mean", "root", "shape", "probe")
        found = {n: _files._encode(part, arrays) for n, part in zip(names, parts, strict=True)}
        return found | {"support": _files._encode(described(into.codomain), arrays)}

    @classmethod
    def restored(cls, value: dict[str, Any], arrays: list[np.ndarray], model: Any = None) -> "FlowPrior":
        """See `pushforward._files.Stored`."""
        parts = {n: _files._decode(v, arrays) for n, v in value.items()}
        support = named(parts["support"])
        prior = cls(parts["flow"], parts["weights"], parts["mean"], parts["root"], parts["shape"], support)
        push = prior.transforms[0]
        built = jax.eval_shape(functools.partial(_start, push.flow, push.dimension), jax.random.key(0)).shape
        if push.weights.shape != built:
            raise CheckpointError(
                f"the flow has weights of shape {push.weights.shape}, and this version of pushforward builds {built}. "
                "Fit it again: pf.FlowPrior.fit(samples)."
            )
        scale = jnp.sqrt(jnp.sum(push.root**2, axis=1)).reshape(push.shape)
        if not jnp.all(jnp.abs(push(_probe(push)) - parts["probe"]) < _PROBE_TOLERANCE * scale):
            raise CheckpointError(
                "the weights give another map than when they were written: this version of pushforward builds other "
                "layers. Fit it again: pf.FlowPrior.fit(samples)."
            )
        return prior


class FlowTransform(Transform):
    """The map e -> m + L T(e) from R^d to arrays without bounds.

    Attributes:
        flow: the architecture of T.
        weights: of T, (layers, numbers of a layer); leading axes are a batch of maps.
        mean: m, (d,).
        root: L, lower triangular (d, d).
        shape: shape of the result, of d elements.
    """

    domain = constraints.real_vector

    def __init__(self, flow: Flow, weights: Array, mean: Array, root: Array, shape: tuple[int, ...]):
        self.flow, self.weights, self.mean, self.root, self.shape = flow, weights, mean, root, tuple(shape)

    @property
    def dimension(self) -> int:
        """d."""
        return math.prod(self.shape)

    @property
    def codomain(self) -> constraints.Constraint:
        """Arrays of shape `shape`."""
        return constraints.independent(constraints.real, len(self.shape)) if self.shape else constraints.real

    @property
    def inv(self) -> Transform:
        """The inverse, which NumPyro would note on the instance: its content would depend on how it was used."""
        found = super().inv
        self.__dict__.pop("_inv", None)
        return found

    def __call__(self, x: Array) -> Array:
        value = _forward(self.flow, self.weights, self.mean, self.root, x)
        return value.reshape(value.shape[:-1] + self.shape)

    def _inverse(self, y: Array) -> Array:
        return _backward(self.flow, self.weights, self.mean, self.root, self._flat(y))[0]

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """log|det L T'(e)|, from y, where the inverse was taken and the compiler has it already."""
        return -_backward(self.flow, self.weights, self.mean, self.root, self._flat(y))[1]

    def _flat(self, y: Array) -> Array:
        return jnp.reshape(y, self.inverse_shape(jnp.shape(y)))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the value of noise of shape (..., d)."""
        return tuple(shape[:-1]) + self.shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the noise of a value."""
        return (*shape[: len(shape) - len(self.shape)], self.dimension)

    def tree_flatten(self) -> tuple:
        """Arrays, and the rest."""
        return (self.weights, self.mean, self.root), (
            ("weights", "mean", "root"),
            {"flow": self.flow, "shape": self.shape},
        )


class IntoSupport(Transform):
    """NumPyro's bijection to a constraint, whose values stay inside it when they are rounded."""

    def __init__(self, support: constraints.Constraint):
        self._codomain = support

    @property
    def domain(self) -> constraints.Constraint:
        """Of the bijection."""
        return biject_to(self._codomain).domain

    @property
    def codomain(self) -> constraints.Constraint:
        """The constraint."""
        return self._codomain

    @property
    def inv(self) -> Transform:
        """See `FlowTransform.inv`."""
        found = super().inv
        self.__dict__.pop("_inv", None)
        return found

    def __call__(self, x: Array) -> Array:
        return inside_support(self._codomain, biject_to(self._codomain)(x))

    def _inverse(self, y: Array) -> Array:
        return biject_to(self._codomain).inv(y)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """See `numpyro.distributions.transforms.Transform`."""
        return biject_to(self._codomain).log_abs_det_jacobian(x, y)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `numpyro.distributions.transforms.Transform`."""
        return biject_to(self._codomain).forward_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `numpyro.distributions.transforms.Transform`."""
        return biject_to(self._codomain).inverse_shape(shape)

    def tree_flatten(self) -> tuple:
        """No leaves: bounds are not stacked by NumPyro's `scan`."""
        return (), ((), {"_codomain": self._codomain})


# ------------------------------------------------------------------------------------------------------------- the maps


def _layers(flow: Flow, dimension: int, weights: Array) -> flows.Bijection:
    """T with given weights; building it costs nothing in a trace, since what the weights replace is not computed."""
    return eqx.tree_at(lambda t: t.weights, flow.build(jax.random.key(0), dimension, fast="density"), weights)


@functools.partial(jax.jit, static_argnums=0)
def _forward(flow: Flow, weights: Array, mean: Array, root: Array, e: Array) -> Array:
    def one(weights: Array, mean: Array, root: Array, e: Array) -> Array:
        return mean + root @ flows.transform(_layers(flow, e.shape[0], weights), e)[0]

    return jnp.vectorize(one, signature="(l,p),(d),(d,d),(d)->(d)")(weights, mean, root, e)


@functools.partial(jax.jit, static_argnums=0)
def _backward(flow: Flow, weights: Array, mean: Array, root: Array, u: Array) -> tuple[Array, Array]:
    def one(weights: Array, mean: Array, root: Array, u: Array) -> tuple[Array, Array]:
        white = solve_triangular(root, u - mean, lower=True)
        e, log_det = flows.inverse(_layers(flow, u.shape[0], weights), white)
        return e, log_det - jnp.sum(jnp.log(jnp.diag(root)))

    return jnp.vectorize(one, signature="(l,p),(d),(d,d),(d)->(d),()")(weights, mean, root, u)


def _probe(push: FlowTransform) -> Array:
    """Noise of two points that fills a spline's interval."""
    return jnp.linspace(-2.0, 2.0, 2 * push.dimension).reshape(2, push.dimension)


# ------------------------------------------------------------------------------------------------------------- training


def _usable(flow: Any, training: Training) -> Flow:
    if not isinstance(flow, Flow) or flow.architecture not in _USABLE:
        raise MethodError(
            f"FlowPrior.fit(flow=...) takes one of {list(_USABLE)}, whose density and sampler are both in closed form "
            f"and can be traced; got {flow!r}."
        )
    if not isinstance(training, Training):
        raise ArgumentError(f"training= takes pf.Training(...); got {type(training).__name__}.")
    if training.source != "buffer":
        raise MethodError(
            f"FlowPrior.fit(training=...) has given samples and cannot draw new ones; got source={training.source!r}. "
            'Write pf.Training(source="buffer").'
        )
    return flow


def _typed(key: Any) -> Key:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    raise ArgumentError(f"key= takes an integer or one typed key, jax.random.key(0); got {type(key).__name__}.")


def _trained(white: Array, flow: Flow, training: Training, key: Key, progress: bool) -> Array:
    """All arrays of T after a fit to standardised samples (samples, d)."""
    split, first, steps = jax.random.split(key, 3)
    runner = Runner(progress=progress, label="FlowPrior")
    rows = jax.random.permutation(split, white)
    held = max(1, round(training.held_out * len(rows)))
    dimension = white.shape[1]
    start = runner.call(_start, flow, dimension, first)
    static = (flow, dimension, start.shape)
    found = fit(_loss, start.reshape(-1), rows[held:], rows[:held], training, steps, runner, static)
    if not jnp.isfinite(found.lowest):
        raise InferenceError(
            "FlowPrior.fit reached no finite density of the samples held out. Lower the learning rate, "
            "pf.Training(learning_rate=5e-4), or look for samples far outside the others.",
            Outcome.NONFINITE,
        )
    return found.best.reshape(start.shape)


def _start(flow: Flow, dimension: int, key: Key) -> Array:
    """Weights of a random map that is the identity but for the places of the coordinates, as samples are standard."""
    return flow.build(key, dimension, fast="density").weights


def _loss(flow: Flow, dimension: int, shape: tuple[int, int], weights: Array, batch: Array, key: Key) -> Array:
    """-log density of each standardised sample."""
    del key
    bijection = _layers(flow, dimension, weights.reshape(shape))
    return jax.vmap(lambda row: -flows.log_density(bijection, row))(batch)
