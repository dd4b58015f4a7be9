"""Cross-validated accuracy of a small neural classifier between two samples, in one compiled loop.

The classifier is the one of the simulation-based inference benchmark (Lueckmann, Boelts, Greenberg,
Goncalves and Macke 2021, arXiv 2101.04653, appendix M): two hidden layers of rectified linear units. The
folds are one `vmap` axis and the training steps one `scan`, so that five classifiers cost one compilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class Layer(NamedTuple):
    """One affine layer, `weights.T @ input + bias`."""

    weights: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]


def initial_layers(key: PRNGKeyArray, dimension: int, width: int) -> list[Layer]:
    """Layers of sizes dimension -> width -> width -> 1, with He, Zhang, Ren and Sun's (2015) eq. 10 variance.

    Args:
        key: a JAX key.
        dimension: number of inputs.
        width: units in each of the two hidden layers.
    """
    sizes = (dimension, width, width, 1)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        Layer(
            jax.random.normal(layer_key, (inputs, outputs), jnp.float32) * (2.0 / inputs) ** 0.5,
            jnp.zeros(outputs, jnp.float32),
        )
        for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def logit(layers: list[Layer], item: Float[Array, " dimension"]) -> Float[Array, ""]:
    """Log odds that one item belongs to the second sample."""
    hidden = item
    for layer in layers[:-1]:
        hidden = jax.nn.relu(layer.weights.T @ hidden + layer.bias)
    return (layers[-1].weights.T @ hidden + layers[-1].bias)[0]


def cross_entropy(
    layers: list[Layer], items: Float[Array, "batch dimension"], labels: Float[Array, " batch"]
) -> Float[Array, ""]:
    """Mean of `log(1 + exp(-s f(x)))` with `s = 2 label - 1` and f the logit."""
    logits = jax.vmap(logit, in_axes=(None, 0))(layers, items)
    return jnp.mean(jax.nn.softplus((1.0 - 2.0 * labels) * logits))


def train(
    key: PRNGKeyArray,
    items: Float[Array, "training dimension"],
    labels: Float[Array, " training"],
    *,
    width: int,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
) -> list[Layer]:
    """Minimise `cross_entropy` by `steps` steps of Adam with weight decay; its learning rate falls to 0 as a cosine.

    The number of steps is fixed: no early stopping, hence no data-dependent loop and no split to hold out.
    """
    import optax

    optimiser = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)
    key_layers, key_batches = jax.random.split(key)
    layers = initial_layers(key_layers, items.shape[1], width)

    def step(carry, step_key):
        layers, state = carry
        chosen = jax.random.randint(step_key, (batch,), 0, items.shape[0])
        gradient = jax.grad(cross_entropy)(layers, items[chosen], labels[chosen])
        updates, state = optimiser.update(gradient, state, layers)
        return (optax.apply_updates(layers, updates), state), None

    (layers, _), _ = jax.lax.scan(step, (layers, optimiser.init(layers)), jax.random.split(key_batches, steps))
    return layers  # type: ignore[reportReturnType]  # optax's alias Params


def held_out_accuracies(
    first: Float[Array, "draws dimension"],
    second: Float[Array, "draws dimension"],
    key: PRNGKeyArray,
    *,
    folds: int,
    width: int,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
) -> Float[Array, " folds"]:
    """Accuracy on each fold of the classifier that was trained on the other folds.

    The folds are stratified: each holds `draws / folds` random items of either sample.

    Args:
        first: sample with label 0, shape (draws, dimension), float32; `folds` divides `draws`.
        second: sample with label 1, same shape.
        key: a JAX key.
        folds: number of folds.
        width: units in each hidden layer.
        steps: training steps.
        batch: items in a training step.
        learning_rate: initial step size of Adam.
        weight_decay: decoupled weight decay of Loshchilov and Hutter (2019), which keeps the network from learning
            single draws by heart in ten and more dimensions.
    """
    draws, dimension = first.shape
    key_first, key_second, key_train = jax.random.split(key, 3)
    shuffled = [
        jax.random.permutation(sample_key, sample).reshape(folds, draws // folds, dimension)
        for sample_key, sample in ((key_first, first), (key_second, second))
    ]
    items = jnp.concatenate(shuffled, axis=1)
    labels = jnp.repeat(jnp.array([0.0, 1.0], jnp.float32), draws // folds)

    def accuracy(fold, fold_key):
        others = (fold + 1 + jnp.arange(folds - 1)) % folds
        layers = train(
            fold_key,
            items[others].reshape(-1, dimension),
            jnp.tile(labels, folds - 1),
            width=width,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )
        logits = jax.vmap(logit, in_axes=(None, 0))(layers, items[fold])
        return jnp.mean(((logits > 0) == (labels > 0)).astype(jnp.float32))

    return jax.vmap(accuracy)(jnp.arange(folds), jax.random.split(key_train, folds))
