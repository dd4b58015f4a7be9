"""What a surrogate keeps of its training: the emulator, its error on held-out runs, and what it holds for."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array
from pushforward.learned.emulator import Emulator
from pushforward.math.noise import DataNoise, LowRank, fault
from pushforward.model.inverse import InverseProblem

_QUANTILE = 1.959964


class HeldOut(eqx.Module):
    """How an emulator does on runs that it was not fitted to.

    Attributes:
        rmse: by site, root mean squared error in units of the noise.
        spread: by site, the same of errors in units of the emulator's own sd; 1 is right, more is overconfident.
        coverage: by site, share of its 95 % intervals that hold the output.
        training: runs that it was fitted to.
        held_out: runs that judged.
        failed: runs that were left out, because an output was not finite.
        components: principal components of the outputs.
    """

    rmse: dict[str, float]
    spread: dict[str, float]
    coverage: dict[str, float]
    training: int
    held_out: int
    failed: int
    components: int

    def __repr__(self) -> str:
        parts = [
            f"{n}: error {self.rmse[n]:.3g} noise sd, 95 % intervals hold {self.coverage[n]:.0%}" for n in self.rmse
        ]
        return (
            f"{'; '.join(parts)} ({self.training} training, {self.held_out} held-out, {self.failed} failed runs, "
            f"{self.components} components)"
        )


class Fitted(eqx.Module):
    """What training leaves.

    Attributes:
        emulator: from z to the predicted data of all sites, one after the other.
        error: on held-out runs.
        shapes: of the data by site, in that order.
        prior: values of the latent sites at a fixed z, by which another prior is known.
        arguments: arguments of the model that the predictions depend on, as arrays or text.
        simulations: runs of the model that the training made.
    """

    emulator: Emulator
    error: HeldOut
    shapes: dict[str, tuple[int, ...]]
    prior: dict[str, Array]
    arguments: dict[str, Any]
    simulations: int


def check_model_of(problem: InverseProblem) -> None:
    """Refuse a model whose likelihood an emulator of its predictions does not give.

    Raises:
        MethodError: the text names the site.
        DataError: no data site, or no latent one.
    """
    if not problem.structure.data:
        raise DataError(
            f"no site of the model is data: it has {list(problem.sites)}. Pass the data, or name the sites, as in "
            ".fit(model, observed=('y',), ...)."
        )
    if problem.dimension == 0:
        raise DataError("the model has no latent site, so there is nothing to emulate. Add numpyro.sample(...).")
    reason = f"{problem.why_not_continuous}" if problem.why_not_continuous else problem.why_not_gaussian()
    if reason:
        reason = reason.removesuffix(", or use a method that samples its data")
        raise MethodError(f"a surrogate emulates the mean of a Gaussian likelihood, and {reason}.")


def check_same(fitted: Fitted, problem: InverseProblem, fixed: dict[str, Any]) -> None:
    """Refuse a model, or arguments of it, that the surrogate was not fitted to.

    Raises:
        MethodError: what differs.
    """
    shapes = {n: tuple(problem.sites[n].shape) for n in problem.sites if n in problem.structure.data}
    if shapes != {n: tuple(s) for n, s in fitted.shapes.items()}:
        raise MethodError(
            f"the surrogate predicts data of the shapes {fitted.shapes}, and this model has {shapes}. Fit one to this "
            "model."
        )
    here = Runner(progress=False).call(prior_at, problem)
    for name in {**fitted.prior, **here}:
        known, found = fitted.prior.get(name), here.get(name)
        if known is None or found is None or known.shape != found.shape or not np.allclose(known, found, rtol=1e-4):
            raise MethodError(
                f"the surrogate was fitted to a model with latent sites {list(fitted.prior)}, and in this one, which "
                f"has {list(here)}, the prior of '{name}' is another. Fit one to this model."
            )
    for name in {**fitted.arguments, **fixed}:
        known, found = fitted.arguments.get(name), fixed.get(name)
        if not _equal(known, found):
            raise MethodError(
                f"the surrogate was fitted with another value of the argument {name!r}, on which the predictions "
                "depend. Pass that value, or fit a surrogate with this one."
            )


def _equal(known: Any, found: Any) -> bool:
    if known is None or found is None or isinstance(known, str) or isinstance(found, str):
        return isinstance(known, str) and isinstance(found, str) and known == found
    known, found = np.asarray(known), np.asarray(found)
    return known.shape == found.shape and np.allclose(known, found, rtol=1e-6, atol=0, equal_nan=True)


def judged(
    errors: np.ndarray, sd: np.ndarray, scale: np.ndarray, shapes: dict, training: int, failed: int, components: int
) -> HeldOut:
    def by_site(values: np.ndarray) -> dict[str, float]:
        return {n: float(np.mean(part_of(values.T, shapes, n))) for n in shapes}

    square, standard = by_site((errors / scale) ** 2), errors / np.maximum(sd, 1e-12 * scale)
    spread, inside = by_site(standard**2), by_site(np.abs(standard) < _QUANTILE)
    rmse = {n: v**0.5 for n, v in square.items()}
    return HeldOut(rmse, {n: v**0.5 for n, v in spread.items()}, inside, training, len(errors), failed, components)


def part_of(values: Any, shapes: dict[str, tuple[int, ...]], name: str) -> Any:
    """The rows of one site out of all, in its shape."""
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    names = list(shapes)
    start = sum(sizes[n] for n in names[: names.index(name)])
    return values[start : start + sizes[name]].reshape(*shapes[name], *values.shape[1:])


def noise_sd(noise: DataNoise, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Sd of the noise of a site, flat.

    Raises:
        MethodError: it is not positive (definite).
    """
    wrong = fault(noise, len(shape))
    if wrong:
        raise MethodError(
            f"the noise of site '{name}' cannot be used: its {wrong}. Outputs are compared in units of it; look at the "
            "arguments that it is made of."
        )
    if isinstance(noise, LowRank):
        return np.sqrt(np.asarray(noise.diagonal + jnp.sum(noise.factor**2, -1), float)).reshape(-1)
    values = np.asarray(noise, float)
    return (values if values.ndim == len(shape) else np.sqrt(np.diagonal(values, axis1=-2, axis2=-1))).reshape(-1)


def noise_of(problem: InverseProblem) -> dict[str, DataNoise]:
    """The noise by site."""
    return problem.forward(jnp.zeros(problem.dimension)).noise


def prior_at(problem: InverseProblem) -> dict[str, Array]:
    """Values of the latent sites at a z without symmetries."""
    return problem.constrain(jnp.sin(1.0 + jnp.arange(problem.dimension)))
