"""Is a chain linear and Gaussian, and what are its matrices? Decided by data flow, never by trying points.

A step is affine in state and noise when its Jacobian depends on neither; its matrices need computing once
when they do not depend on time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.math.kalman import Step
from pushforward.model._chain import ChainStructure
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, StateSpace

NORMAL = ("Normal", "MultivariateNormal", "LowRankMultivariateNormal", "GaussianRandomWalk", "Delta")


class Facts(NamedTuple):
    """What data flow says of a chain.

    Attributes:
        nonlinear: why the chain is not affine in state and noise, or None.
        constant: whether A, B, H, D and R are the same at all steps.
        offsets_constant: whether b and d are, too.
    """

    nonlinear: str | None
    constant: bool
    offsets_constant: bool


def why_no_gaussian_noise(space: StateSpace, *, matching: bool) -> str | None:
    """Why the observations have no Gaussian noise that a Kalman or ensemble analysis may use, or None.

    Args:
        space: the model.
        matching: whether a Gaussian of the same mean and variance may stand for a noise such as Poisson's.
    """
    s = space.structure
    if s.factors:
        return f"numpyro.factor '{s.factors[0]}' stands in the body of the scan; write it as an observed site"
    for name in s.joint.discrete:
        kind = s.joint.sites[name].distribution
        return f"latent site '{name}' ({kind}) is discrete; use pf.ParticleFilter() or pf.DiscreteHMM()"
    if s.inexact:
        return (
            f"latent site '{s.inexact[0]}' ({s.joint.sites[s.inexact[0]].distribution}) has no exact map from Gaussian "
            "noise; use pf.NUTS() on the joint density"
        )
    if s.discrete:
        return (
            f"leaf {s.discrete[0]} of the carry is an integer that depends on the state, which has no Gaussian law; "
            "use pf.EnKF()"
        )
    for name, (kind, what) in s.families.items():
        if kind == "other":
            return f"observed site '{name}' {what}; use pf.ParticleFilter(), or pf.NUTS() on the joint density"
        if kind == "matched" and not matching:
            return f"observed site '{name}' is {what}, not Normal; use pf.Extended(), pf.Unscented() or pf.NUTS()"
        if kind == "gaussian" and _random_sources(s, name, "noise"):
            return (
                f"the noise of observed site '{name}' ({what}) depends on the state, which Gaussian methods would "
                "ignore; use pf.ParticleFilter(), or pf.NUTS() on the joint density"
            )
        if not _random_sources(s, name, "mean"):
            return f"the mean of observed site '{name}' does not depend on the state, so that its data tell nothing"
    return None


def _random_sources(s: ChainStructure, name: str, part: str) -> bool:
    if name in s.first:
        return any(k[0] == "outer" and k[1] in s.initial for k in s.around.sources("observed", name, part))
    if name in s.fused:
        return any(k[0] == "stacked" for k in s.around.sources("observed", name, part))
    return any(_is_random(s, k) for k in s.body.sources("observed", name, part))


def _is_random(s: ChainStructure, source: tuple) -> bool:
    return source[0] == "noise" or (source[0] == "carry" and source[1] in s.state)


def facts(space: StateSpace) -> Facts:
    """What data flow says of the chain, worked out once for a model."""
    return space.structure.remember("facts", lambda: _facts(space))


def _facts(space: StateSpace) -> Facts:
    s = space.structure
    if s.discrete:
        return Facts(f"leaf {s.discrete[0]} of the carry is discrete and depends on the state", False, False)
    for name in (*s.initial, *s.latent):
        kind = s.joint.sites[name].distribution
        if kind not in NORMAL:
            return Facts(f"latent site '{name}' is {kind}, not Normal", False, False)
    values = {n: jnp.zeros(s.joint.sites[n].shape) for n in s.parameters}
    shapes = jax.eval_shape(space.chain, values)
    start = jax.eval_shape(lambda c: c.start(jnp.zeros(space.initial_dimension)), shapes)
    inputs = {
        "chain": shapes,
        "state": jnp.zeros(space.state_dimension),
        "riders": start[1],
        "step": jnp.asarray(0),
        "noise": jnp.zeros(space.noise_dimension),
    }
    matrices = Program(lambda **i: {"matrices": step_at(**i)._replace(b=None, d=None), "all": step_at(**i)}, **inputs)
    used = {k[0] for k in matrices.sources("matrices")}
    initial = {"chain": shapes, "noise": jnp.zeros(space.initial_dimension)}
    first = Program(lambda **i: {"matrices": first_at(**i)._replace(b=None, d=None)}, **initial)
    reason = None
    if {"state", "noise"} & used:
        reason = _culprit(s, matrices)
    elif "noise" in {k[0] for k in first.sources("matrices")}:
        reason = f"the initial state is not linear in the noise of {list(s.initial)}"
    else:
        run = Program(lambda chain, state, riders, step, noise: _both(chain, state, riders, step, noise), **inputs)
        lost = run.steps_of("state", "noise")
        reason = f"the step is not linear in the state: it contains jax's '{lost}'" if lost else None
    moving = {"step", "riders"}
    return Facts(reason, not moving & used, not moving & {k[0] for k in matrices.sources("all")})


def _both(chain: Chain, state: Array, riders: list, step: Array, noise: Array) -> dict[str, Array]:
    moved = chain.step(state, riders, step, noise)
    return {"state": moved.state, "mean": moved.observed.mean}


def _culprit(s: ChainStructure, program: Program) -> str:
    parts = {"A": "the next state", "B": "the next state", "H": "the data's mean", "D": "the data's mean"}
    for name, words in parts.items():
        if {"state", "noise"} & {k[0] for k in program.sources("matrices", name)}:
            sites = [n for n in (*s.latent, *s.body.shapes["sites"]) if n in s.body.shapes["sites"]]
            seen = list(s.families) if name in "HD" else list(dict.fromkeys(sites))
            return f"{words} is not linear in the state and the noise (sites {seen})"
    return f"the noise of {list(s.families)} depends on the state"


def step_at(chain: Chain, state: Array, riders: list[Array], step: Array, noise: Array) -> Step:
    """The affine map that touches the chain at a state and a noise: c' = A c + B e + b, y = H c + D e + d + v."""
    n = state.shape[0]

    def run(joint: Array) -> tuple[tuple[Array, Array], Array]:
        moved = chain.step(joint[:n], riders, step, joint[n:])
        return (moved.state, moved.observed.mean), moved.observed.noise

    joint = jnp.concatenate([state, noise])
    (value, mean), push, noise_of_data = jax.linearize(run, joint, has_aux=True)
    slopes, data_slopes = jax.vmap(push, out_axes=1)(jnp.eye(joint.shape[0], dtype=joint.dtype))
    offset, data_offset = value - slopes @ joint, mean - data_slopes @ joint
    H, D = data_slopes[:, :n], data_slopes[:, n:]
    return Step(slopes[:, :n], slopes[:, n:], offset, H, D, data_offset, noise_of_data)


def first_at(chain: Chain, noise: Array) -> Step:
    """The same for the initial state, whose previous state has no entries."""

    def run(z: Array) -> tuple[tuple[Array, Array], Array]:
        state, _, observed = chain.start(z)
        return (state, observed.mean), observed.noise

    (value, mean), push, noise_of_data = jax.linearize(run, noise, has_aux=True)
    slopes, data_slopes = jax.vmap(push, out_axes=1)(jnp.eye(noise.shape[0], dtype=noise.dtype))
    empty, data_empty = jnp.zeros((value.shape[0], 0)), jnp.zeros((mean.shape[0], 0))
    offset, data_offset = value - slopes @ noise, mean - data_slopes @ noise
    return Step(empty, slopes, offset, data_empty, data_slopes, data_offset, noise_of_data)


def riders_along(chain: Chain, riders: list[Array], state: Array, noise: Array, steps: int) -> list[Array]:
    """What rides along, before each step: it depends on no state, so it is known before filtering; leading axis T."""

    def move(riding: list[Array], step: Array) -> tuple[list[Array], list[Array]]:
        return chain.step(state, riding, step, noise).riders, riding

    return jax.lax.scan(move, riders, jnp.arange(steps))[1]


def data_along(chain: Chain, riders: list[Array], state: Array, noise: Array, steps: int) -> Array:
    """Data of all steps, shape (T, m), NaN where missing."""
    return jax.vmap(lambda r, t: chain.step(state, r, t, noise).observed.data)(riders, jnp.arange(steps))
