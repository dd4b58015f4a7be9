"""Which part of a chain is linear and Gaussian once some latent sites are known? Decided by data flow.

Given the sampled sites, the other leaves of the carry and the data's mean must be affine in those leaves and in the
noise of the other sites; nothing sampled may follow from them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushforward._types import Array
from pushforward.model._chain import ChainStructure
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, Moved, StateSpace, nothing

_MOST = 6
"""Continuous sites up to which all choices of sampled ones are tried."""

_ALL = "the whole step is linear and Gaussian, which leaves nothing to sample; use pf.Kalman()"


@dataclass(frozen=True, eq=False)
class Split:
    """A chain in two parts, sampled and integrated out, as positions in flat vectors.

    Attributes:
        sampled: latent sites of the step that are sampled.
        state: entries of the state that are integrated out.
        noise: entries of a step's noise that are.
        initial: entries of the noise z_0 that are.
        plain: data (m,) that have another law than a Gaussian, and depend on what is sampled alone.
        plain_sites: their sites.
    """

    sampled: tuple[str, ...]
    state: np.ndarray
    noise: np.ndarray
    initial: np.ndarray
    plain: np.ndarray
    plain_sites: tuple[str, ...]


def split(space: StateSpace, sampled: tuple[str, ...] = ()) -> Split | str:
    """The two parts of a chain, or why it does not fall into them.

    Args:
        space: the model.
        sampled: latent sites to sample; (): discrete ones, and as few others as leave the rest linear.
    """
    s = space.structure
    return s.remember(("split", sampled), lambda: _given(space, sampled) if sampled else _found(space))


def _given(space: StateSpace, sampled: tuple[str, ...]) -> Split | str:
    s = space.structure
    unknown = [n for n in sampled if n not in (*s.latent, *s.initial)]
    if unknown:
        return f"sampled= names {unknown}, which are no latent sites of the state: these are {[*s.initial, *s.latent]}"
    missing = [n for n in s.latent if s.joint.sites[n].discrete and n not in sampled]
    if missing:
        return f"the discrete site '{missing[0]}' cannot be integrated out; add it to sampled="
    if all(n in sampled for n in s.latent):
        return f"sampled= names all latent sites {list(s.latent)} of the step, and leaves none to integrate out"
    return _tried(space, sampled)


def _found(space: StateSpace) -> Split | str:
    s = space.structure
    discrete = tuple(n for n in s.latent if s.joint.sites[n].discrete)
    rest = [n for n in s.latent if n not in discrete]
    if not rest:
        return f"all latent sites {list(discrete)} of the step are discrete; use pf.DiscreteHMM() or pf.Bootstrap()"
    reason = ""
    for size in range(len(rest) if len(rest) <= _MOST else 1):
        for more in combinations(rest, size):
            found = _tried(space, (*discrete, *more))
            if not isinstance(found, str) or found == _ALL:
                return found
            reason = reason or found
    return f"no part of the step is linear and Gaussian given the others: {reason}"


def _tried(space: StateSpace, sampled: tuple[str, ...]) -> Split | str:
    """The parts for given sampled sites; initial sites are integrated out where that works."""
    s = space.structure
    out = tuple(n for n in s.latent if n not in sampled)
    choices = dict.fromkeys((_initial(s, out, sampled), ()))
    reasons = []
    for initial in choices:
        leaves = _leaves(s, out, initial)
        reason = _why_not_step(space, sampled, out, leaves) or _why_not_start(space, initial, leaves)
        if not reason and len(out) == len(s.latent):
            return _ALL
        if not reason:
            return _positions(s, sampled, out, initial, leaves)
        reasons.append(reason)
    return reasons[0]


def _leaves(s: ChainStructure, out: tuple[str, ...], initial: tuple[str, ...]) -> frozenset[int]:
    """Leaves of the carry that follow from sites that are integrated out, by a fixed point."""
    sources = {i: s.body.sources("carry", i) for i in (*s.state, *s.discrete)}
    found = {i for i, k in sources.items() if any(("noise", n) in k for n in out)}
    found |= {i for i in sources if any(("outer", n) in s.around.sources("init", i) for n in initial)}
    while True:
        more = {i for i, k in sources.items() if any(("carry", j) in k for j in found)} | found
        if more == found:
            return frozenset(found)
        found = more


def _initial(s: ChainStructure, out: tuple[str, ...], sampled: tuple[str, ...]) -> tuple[str, ...]:
    """Initial sites to integrate out: those of leaves that are, and of leaves that move without noise."""
    leaves = _leaves(s, out, ())

    def quiet(leaf: int) -> bool:
        kinds = s.body.sources("carry", leaf)
        return leaf in s.state and all(k == ("carry", leaf) or k[0] in ("consts", "x", "step") for k in kinds)

    def fits(name: str) -> bool:
        reached = [i for i in range(len(s.carry)) if ("outer", name) in s.around.sources("init", i)]
        return bool(reached) and all(i in leaves or quiet(i) for i in reached)

    names = (n for n in s.initial if n not in sampled and not s.joint.sites[n].discrete)
    return tuple(n for n in names if fits(n))


def _why_not_step(
    space: StateSpace, sampled: tuple[str, ...], out: tuple[str, ...], leaves: frozenset[int]
) -> str | None:
    s, wholes = space.structure, f"site{'s' * (len(out) > 1)} {list(out)}"
    whole = [i for i in leaves if i in s.discrete]
    if whole:
        return f"leaf {whole[0]} of the carry is discrete and depends on {wholes}"
    programs = _step_programs(space, tuple(n for n in sampled if n in s.latent), leaves)
    inside = ("linear", "noise_linear")

    def touched(*output: str) -> bool:
        return any(k[0] in inside for k in programs[0].sources(*output))

    for name in s.latent:
        if name in sampled and touched("sites", name):
            return f"the law of the sampled site '{name}' depends on {wholes}"
    if touched("factor"):
        return f"a numpyro.factor, or a map from noise that is not exact, depends on {wholes}"
    for name in _plain(s):
        if touched("plain", name):
            return f"observed site '{name}' ({s.families[name][1]}) depends on {wholes} and is not Gaussian"
    seen = [n for n in s.families if n not in s.first]
    if touched("variance"):
        return f"the variance of observed sites {seen} depends on {wholes}"
    for leaf in leaves:
        if touched("slopes", "carry", str(leaf)):
            names = [n for n in out if ("noise", n) in s.body.sources("carry", leaf)] or list(out)
            return f"the step is not linear in {wholes}: the leaf of the carry that site '{names[0]}' moves is not"
    if touched("slopes", "mean"):
        return f"the mean of observed sites {seen} is not linear in {wholes}"
    lost = programs[1].steps_of(*inside)
    return f"the step is not linear in {wholes}: it contains jax's '{lost}'" if lost else None


def _step_programs(space: StateSpace, sampled: tuple[str, ...], leaves: frozenset[int]) -> tuple[Program, Program]:
    """What may not follow from the linear part, with the slopes of what does; and the latter itself."""
    s = space.structure

    def run(chain: Chain, kept: dict, linear: dict, step: Array, noise_kept: dict, noise_linear: dict) -> tuple:
        given = kept | linear
        found = s.body(
            chain.bound["consts"],
            carry=[given[str(i)] for i in range(len(s.carry))],
            x=[v[step] for v in chain.bound["xs"]],
            step=jnp.asarray(step),
            noise=noise_kept | noise_linear,
        )
        return found, chain.moved(found, step)

    def moving(**given: Any) -> dict[str, Any]:
        found, moved = run(**given)
        return {"carry": {str(i): found["carry"][i] for i in leaves}, "mean": moved.observed.mean}

    def asked(linear: dict, noise_linear: dict, **given: Any) -> dict[str, Any]:
        found, moved = run(linear=linear, noise_linear=noise_linear, **given)
        slopes = jax.jacfwd(lambda *pair: moving(linear=pair[0], noise_linear=pair[1], **given), (0, 1))
        return {
            "sites": {n: found["sites"][n] for n in sampled},
            "factor": moved.factor,
            "plain": {n: moved.observed.log_prob[n] for n in _plain(s)},
            "variance": moved.observed.noise,
            "slopes": slopes(linear, noise_linear),
        }

    noise = s.body.inputs["noise"]
    inputs = {
        "chain": _shapes(space),
        "kept": {str(i): c for i, c in enumerate(s.carry) if i not in leaves},
        "linear": {str(i): s.carry[i] for i in leaves},
        "step": jnp.asarray(0),
        "noise_kept": {n: v for n, v in noise.items() if n in sampled},
        "noise_linear": {n: v for n, v in noise.items() if n not in sampled},
    }
    return Program(asked, **inputs), Program(moving, **inputs)


def _why_not_start(space: StateSpace, initial: tuple[str, ...], leaves: frozenset[int]) -> str | None:
    s = space.structure
    if not initial:
        return None
    words = f"the initial state is not linear and Gaussian in {list(initial)}"
    if any(s.families[n][0] != "gaussian" for n in s.first):
        return words

    def run(chain: Chain, kept: dict, linear: dict) -> dict[str, Any]:
        return s.around(arrays=chain.arrays, outer=chain.outer | kept | linear, **nothing(s))

    def moving(**given: Any) -> dict[str, Any]:
        found = run(**given)
        means = {n: found["observed"][n].mean for n in s.first}
        return {"init": {str(i): found["init"][i] for i in leaves}, "mean": means}

    def asked(linear: dict, **given: Any) -> dict[str, Any]:
        found = run(linear=linear, **given)
        rest = [v for i, v in enumerate(found["init"]) if i not in leaves]
        rest += [found["values"][n] for n in s.initial if n not in initial]
        slopes = jax.jacfwd(lambda z: moving(linear=z, **given))(linear)
        return {"rest": rest, "variance": [found["observed"][n].noise for n in s.first], "slopes": slopes}

    outer = {n: s.around.inputs["outer"][n] for n in s.initial}
    inputs = {
        "chain": _shapes(space),
        "kept": {n: v for n, v in outer.items() if n not in initial},
        "linear": {n: v for n, v in outer.items() if n in initial},
    }
    sources = Program(asked, **inputs).sources()
    return words if any(k[0] == "linear" for k in sources) or Program(moving, **inputs).steps_of("linear") else None


def _shapes(space: StateSpace) -> Chain:
    values = {n: jnp.zeros(space.structure.joint.sites[n].shape) for n in space.structure.parameters}
    return jax.eval_shape(space.chain, values)


def _plain(s: ChainStructure) -> tuple[str, ...]:
    return tuple(n for n in s.families if n not in s.first and s.families[n][0] != "gaussian")


def _positions(
    s: ChainStructure, sampled: tuple[str, ...], out: tuple[str, ...], initial: tuple[str, ...], leaves: frozenset[int]
) -> Split:
    slots, plain = s.joint.slots, _plain(s)
    shapes = {n: v.mean.shape for n, v in s.body.shapes["observed"].items()}
    shapes |= {n: s.around.shapes["observed"][n].mean.shape[1:] for n in s.fused}
    return Split(
        tuple(n for n in s.latent if n in sampled),
        _places((math.prod(s.carry[i].shape), i in leaves) for i in s.state),
        _places((math.prod(slots[n].noise_shape), n in out) for n in s.latent),
        _places((slots[n].size, n in initial) for n in s.initial),
        np.concatenate([np.zeros(0, bool), *(np.full(math.prod(v), n in plain) for n, v in shapes.items())]),
        plain,
    )


def _places(parts: Iterable[tuple[int, bool]]) -> np.ndarray:
    """Positions of the chosen parts of a flat vector."""
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *(np.full(size, chosen) for size, chosen in parts)]))


def plain_log_density(given: Split, moved: Moved) -> Array:
    """Log density of a step's data that are not Gaussian, and its factors."""
    return sum((jnp.sum(moved.observed.log_prob[n]) for n in given.plain_sites), moved.factor)
