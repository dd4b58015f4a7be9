"""Reading the one scan of a model: which sites are parameters, initial state and state, and its step as a program.

The model is traced around its scan, and the body of the scan once on its own. Closed-over values become inputs
of the body's program, so that the step is a pure function that `jit`, `vmap` and `grad` go through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from pushforward._errors import ModelError, PushforwardError
from pushforward._types import Array
from pushforward.model import _scan_trace, _trace
from pushforward.model._body import BY_NOISE, Mode, is_data, is_factor, read_body
from pushforward.model._observed import family, observation, time_in_batch
from pushforward.model._program import Program
from pushforward.model._reading import Structure
from pushforward.model._refusals import check_law, check_unscaled


@dataclass(eq=False)
class ChainStructure:
    """The static part of a state-space model, one object per `Structure`, compared by identity.

    Attributes:
        joint: the same model read as one joint density.
        around: program of what stands around the scan. Inputs: arrays, outer (values of parameters, noise of other
            sites), last, stacked.
        by_noise: the same with the noise of all sites.
        body: program of one step. Inputs: consts, carry (leaves), x (leaves), step, noise (by site).
        carry_tree: tree of the carry.
        length: number of steps.
        parameters: outer latent sites that are neither initial state nor late.
        initial: outer latent sites that reach the first carry and not the body.
        late: outer latent sites whose law follows from the trajectory.
        latent: latent sites of a step.
        state: indices of the carry's random leaves; the others (counters, known values) ride along.
        discrete: indices of random leaves that are not floating, such as a regime chosen by the state.
        families: per observed site that filters assimilate, its family and name.
        first: observed sites outside the scan that depend on the initial state.
        fused: observed sites after the scan, local in time.
        static: observed sites that depend on parameters alone.
        factors: sites with `numpyro.factor` in a step.
        inexact: latent sites whose map from noise is not exact.
    """

    joint: Structure
    around: Program
    by_noise: Program
    body: Program
    carry_tree: Any
    carry: list[jax.ShapeDtypeStruct]
    length: int
    parameters: tuple[str, ...]
    initial: tuple[str, ...]
    late: tuple[str, ...]
    latent: tuple[str, ...]
    state: tuple[int, ...]
    discrete: tuple[int, ...]
    families: dict[str, tuple[str, str | None]]
    first: tuple[str, ...]
    fused: tuple[str, ...]
    static: tuple[str, ...]
    factors: tuple[str, ...]
    inexact: tuple[str, ...]
    remembered: dict[Any, Any] = field(default_factory=dict)

    def remember(self, name: Any, make: Callable[[], Any]) -> Any:
        """A fact about the structure, worked out once."""
        if name not in self.remembered:
            self.remembered[name] = make()
        return self.remembered[name]


class _Reached(Exception):
    """Leaves the model at its scan."""


def read_chain(structure: Structure, arrays: tuple[Array, ...], *, local: bool = True) -> ChainStructure:
    """Read the scan of a model that was read as a joint density.

    Args:
        structure: the joint density.
        arrays: the model's array arguments.
        local: whether what is observed outside the scan must be local in time, as filters need it; otherwise it is
            not sorted.

    Raises:
        ModelError: the model has no scan, or one that state methods cannot read; the text says what to write.
    """
    with numpyro.validation_enabled(False):
        return _read(structure, arrays, local)


def _read(structure: Structure, arrays: tuple[Array, ...], local: bool) -> ChainStructure:
    outer = {n: jnp.zeros(s.shape) for n, s in structure.slots.items() if s.steps is None}
    inner = tuple(n for n, s in structure.slots.items() if s.steps is not None)
    explored = _explore(structure, arrays, outer)
    seen: dict[str, Any] = {}

    def around(by_value: tuple[str, ...]) -> Program:
        types = {n: int if structure.sites[n].discrete else float for n in by_value}
        values = {n: jnp.zeros(structure.sites[n].shape, types[n]) for n in by_value}
        given = {n: values.get(n, z) for n, z in outer.items()}
        run = _around(structure, by_value, explored, seen)
        return Program(run, arrays=arrays, outer=given, last=explored["last"], stacked=explored["stacked"])

    by_noise, by_value = around(()), around(tuple(outer))
    late = tuple(n for n in outer if {"last", "stacked"} & {s[0] for s in by_noise.sources("laws", n)})
    initial = tuple(n for n in outer if n not in late and _reaches(by_value, n, ("init",), ("consts", "xs")))
    forced = seen["parameters"]
    initial = tuple(n for n in initial if n not in forced)
    parameters = tuple(n for n in outer if n not in initial and n not in late)
    for name in (*initial, *late):
        check_unscaled(seen["outer_sites"][name])
    for name in (*parameters, *late):
        if structure.sites[name].discrete:
            raise ModelError(
                f"site '{name}' ({structure.sites[name].distribution}) is discrete and stands outside the scan, where "
                "only an initial state may be discrete. Sum it out by hand, or make it a part of the carry."
            )
    program = around(parameters)
    body = seen["body"]
    first, fused, static = _sort_observed(program, seen, initial, late) if local else ((), (), ())
    random = _random_leaves(program, body, initial, len(explored["carry"]))
    floating = [jnp.issubdtype(c.dtype, jnp.floating) for c in explored["carry"]]
    outside = (*first, *fused) if local else tuple(seen["outer_families"])
    families = seen["families"] | {n: seen["outer_families"][n] for n in outside}
    sites = structure.sites
    return ChainStructure(
        joint=structure,
        around=program,
        by_noise=by_noise,
        body=body,
        carry_tree=explored["tree"],
        carry=explored["carry"],
        length=explored["length"],
        parameters=parameters,
        initial=initial,
        late=late,
        latent=inner,
        state=tuple(i for i in random if floating[i]),
        discrete=tuple(i for i in random if not floating[i]),
        families=families,
        first=first,
        fused=fused,
        static=static,
        factors=tuple(seen["factors"]),
        inexact=tuple(n for n in (*initial, *inner) if not sites[n].exact),
    )


def _explore(structure: Structure, arrays: tuple, outer: dict[str, Array]) -> dict[str, Any]:
    """Shapes of the carry and of what the scan returns; the model is left at the scan."""
    found: dict[str, Any] = {}

    def instead(scan: _scan_trace.Scan) -> Any:
        leaves, tree = jax.tree.flatten(scan.init)
        leaves = [jnp.asarray(x) for x in leaves]
        body = read_body(structure, scan, tree, [], leaves)
        # A carry that starts as a Python number takes the type that the body gives it, as in lax.scan.
        leaves = [x.astype(o.dtype) for x, o in zip(leaves, body.shapes["carry"], strict=True)]
        shapes = read_body(structure, scan, tree, [], leaves).shapes
        found["tree"], found["length"], found["carry"] = tree, scan.length, shapes["carry"]
        found["last"] = jax.tree.unflatten(tree, shapes["carry"])
        found["stacked"] = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((scan.length, *s.shape), s.dtype), shapes["returned"]
        )
        raise _Reached

    def run(arrays: tuple, outer: dict[str, Array]) -> None:
        call, assign = structure.call(arrays), _trace.from_noise(structure.slots, outer)
        _scan_trace.run_around(call, assign, instead)

    try:
        jax.eval_shape(run, arrays, outer)
    except _Reached:
        return found
    except PushforwardError:
        raise
    except Exception as error:
        raise _unreadable(error) from error
    raise ModelError(
        "the model has no numpyro scan, which state methods (Kalman, EnKF) read. Write the time loop with "
        "numpyro.contrib.control_flow.scan(step, x0, ys), or choose another method, such as pf.NUTS()."
    )


def _unreadable(error: Exception) -> ModelError:
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    return ModelError(
        f"the body of the scan stopped with {type(error).__name__}: {said}. The carry that it returns must have the "
        "shapes and types of the carry that it receives."
    )


def _around(
    structure: Structure, by_value: tuple, explored: dict, seen: dict, mode: Mode = BY_NOISE
) -> Callable[..., dict[str, Any]]:
    """What stands around the scan, as a function of outer noise (or values) and of what the scan would return."""

    def assigned(outer: dict[str, Array]) -> _trace.Assign:
        values = _trace.from_values(structure.slots, {n: outer[n] for n in by_value})
        noise = _trace.from_noise({n: structure.slots[n] for n in outer if n not in by_value}, outer)

        def assign(site: dict) -> Array | None:
            value = values(site)
            return noise(site) if value is None else value

        return assign

    def run(arrays: tuple, outer: dict[str, Array], last: Any, stacked: Any) -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def instead(scan: _scan_trace.Scan) -> Any:
            leaves, tree = jax.tree.flatten(scan.init)
            kept["init"] = [jnp.asarray(x, s.dtype) for x, s in zip(leaves, explored["carry"], strict=True)]
            kept["xs"] = [jnp.asarray(x) for x in jax.tree.leaves(scan.xs)]
            consts: list[Array] = []
            seen["body"] = read_body(structure, scan, tree, consts, kept["init"], seen, mode)
            kept["consts"] = consts
            return last, stacked

        sites = _scan_trace.run_around(structure.call(arrays), assigned(outer), instead)
        seen["outer_families"] = {n: family(s) for n, s in sites.items() if is_data(s) and n not in structure.fixed}
        seen["parameters"] = {n for n, s in sites.items() if s.get("infer", {}).get("state") is False}
        length = explored["length"]
        observed = {n: observation(time_in_batch(sites[n], length)) for n in seen["outer_families"]}
        factors = {n: _trace._log_prob(s) for n, s in sites.items() if is_factor(s) and not _trace._is_jacobian(n)}
        for name in (*outer, *observed):
            check_law(sites[name])
        seen["outer_sites"] = {n: {"name": n, "scale": sites[n]["scale"]} for n in outer}
        laws = {n: _law(s) for n, s in sites.items() if n in outer}
        found = {n: s for n, s in sites.items() if s["type"] == "deterministic" or n in outer}
        parts = {
            "observed": observed,
            "factors": factors,
            "laws": laws,
            "values": {n: s["value"] for n, s in found.items()},
            "log_prior": {n: _trace._log_prob(s) for n, s in found.items() if n in outer},
        }
        return kept | parts

    return run


def _law(site: dict) -> list[Array]:
    return [x for x in jax.tree.leaves(site["fn"]) if isinstance(x, jax.Array)]


def read_again(s: ChainStructure, mode: Mode) -> tuple[Program, Program]:
    """The program around the scan, for its constants and series, and that of the body in another mode."""
    seen: dict[str, Any] = {}
    explored = {"carry": s.carry, "length": s.length}
    with numpyro.validation_enabled(False):
        around = Program(_around(s.joint, s.parameters, explored, seen, mode), **s.around.inputs)
    return around, seen["body"]


def explored_by_value(s: ChainStructure, names: tuple[str, ...]) -> Program:
    """The program around the scan, with sites outside it set to values."""
    joint = s.joint
    values = {n: jnp.zeros(joint.sites[n].shape, int if joint.sites[n].discrete else float) for n in names}
    explored = {"carry": s.carry, "length": s.length}
    with numpyro.validation_enabled(False):
        return Program(_around(joint, names, explored, {}), **(s.around.inputs | {"outer": values}))


def _reaches(program: Program, name: str, through: tuple[str, ...], never: tuple[str, ...]) -> bool:
    """Whether an outer site reaches one group of outputs and none of the others."""

    def met(group: str) -> bool:
        return ("outer", name) in program.sources(group)

    return any(map(met, through)) and not any(map(met, never))


def _sort_observed(program: Program, seen: dict, initial: tuple, late: tuple) -> tuple[tuple, tuple, tuple]:
    """Observed sites outside the scan: with the initial state, after the scan, and on parameters alone."""
    first, fused, static = [], [], []
    for name in seen["outer_families"]:
        sources = program.sources("observed", name)
        groups = {s[0] for s in sources}
        on_initial = any(s[0] == "outer" and s[1] in initial for s in sources)
        if "last" in groups or ("stacked" in groups and on_initial) or any(("outer", n) in sources for n in late):
            raise _not_local(name)
        if "stacked" in groups and not is_local(program, name):
            raise _not_local(name)
        (fused if "stacked" in groups else first if on_initial else static).append(name)
    factors = [
        n for n in program.shapes["factors"] if {s[0] for s in program.sources("factors", n)} & {"last", "stacked"}
    ]
    factors += [
        n for n in program.shapes["factors"] if any(("outer", i) in program.sources("factors", n) for i in initial)
    ]
    if factors:
        raise ModelError(
            f"numpyro.factor '{factors[0]}' depends on the trajectory, which a state method integrates out. Write it "
            "as an observed site in the body of the scan, or use method=pf.NUTS() on the joint density."
        )
    return tuple(first), tuple(fused), tuple(static)


def is_local(program: Program, name: str) -> bool:
    """Whether step t of a site observed after the scan depends on step t of what the scan returned alone.

    Probed by derivatives at a random point: steps whose number has a given bit are moved, and those without it
    must not follow. Any dependence of one step on another shows in some bit.
    """
    rng = np.random.default_rng(0)

    def fill(s: jax.ShapeDtypeStruct) -> Array:
        spread = rng.uniform(0.1, 0.9, s.shape) if jnp.issubdtype(s.dtype, jnp.floating) else np.ones(s.shape)
        return jnp.asarray(spread, s.dtype)

    point = jax.tree.map(fill, program.inputs)
    length = jax.tree.leaves(point["stacked"])[0].shape[0]

    def run(stacked: Any) -> list[Array]:
        found = program(**(point | {"stacked": stacked}))["observed"][name]
        return [found.mean, found.noise, found.log_prob]

    if any(jnp.ndim(v) == 0 or v.shape[0] != length for v in jax.eval_shape(run, point["stacked"])):
        return False

    def follows(bit: int, flip: int) -> bool:
        moved = ((np.arange(length) >> bit) & 1) != flip
        floats, other = eqx.partition(point["stacked"], lambda v: jnp.issubdtype(v.dtype, jnp.floating))
        blank = moved.astype(float)

        def weigh(v: Array) -> Array:
            return jnp.asarray(rng.normal(size=v.shape) * blank.reshape(-1, *[1] * (v.ndim - 1)), v.dtype)

        _, tangents = jax.jvp(lambda f: run(eqx.combine(f, other)), (floats,), (jax.tree.map(weigh, floats),))
        return any(bool(np.any(np.asarray(t)[~moved] != 0)) for t in tangents)

    return not any(follows(bit, flip) for bit in range(max(1, (length - 1).bit_length())) for flip in (0, 1))


def _not_local(name: str) -> ModelError:
    return ModelError(
        f"the observed site '{name}' after the scan is not local in time: step t of it depends on other steps of the "
        "trajectory or on the last carry. Observe inside the body of the scan:\n"
        "    def step(x, y):\n"
        "        x = numpyro.sample('x', ...)\n"
        f"        numpyro.sample('{name}', dist.Normal(x, sd), obs=y)\n"
        "        return x, None\n"
        "    scan(step, x0, ys)\n"
        "(earlier values go into the carry), or use method=pf.NUTS() on the joint density."
    )


def _random_leaves(program: Program, body: Program, initial: tuple[str, ...], count: int) -> tuple[int, ...]:
    """Leaves of the carry that depend on the initial state or on noise, by a fixed point of the data flow."""
    random = {i for i in range(count) if any(("outer", n) in program.sources("init", i) for n in initial)}
    sources = {i: body.sources("carry", i) for i in range(count)}
    while True:
        more = {
            i for i, s in sources.items() if any(k[0] == "noise" or (k[0] == "carry" and k[1] in random) for k in s)
        }
        if more <= random:
            return tuple(sorted(random))
        random |= more
