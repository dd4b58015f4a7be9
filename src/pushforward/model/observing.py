"""What a step observes, as a function of the state that it leads to: y_t = h(x_t) + noise, found by data flow.

The body of a scan is a program from the carry before a step and noise to the carry after it and the data. Where the
data follow from the new carry alone, the program is cut there: the new carry becomes an input. Fixed gains and
background covariances live on the state, so 3DVar needs h and not its composition with the dynamics.
"""

from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.model._chain import ChainStructure
from pushforward.model._observed import flat
from pushforward.model._program import Program, _keys
from pushforward.model.state_space import Chain, Observed, StateSpace, join


def why_not_of_state(space: StateSpace) -> str | None:
    """Why the data of a step are no function of the state that it leads to, or None where they are."""
    s = space.structure
    cut = _cut_program(s)
    for name in s.families:
        if name in s.first:
            continue
        part = ("returned",) if name in s.fused else ("observed", name, "mean")
        if any(_is_before(s, k) for k in cut.sources(*part)):
            return (
                f"the data '{name}' of a step depend on more than the state that the step leads to. Let the step "
                f"return as its carry what '{name}' is observed of: x = numpyro.sample('x', ...); "
                f"numpyro.sample('{name}', dist.Normal(h(x), sd), obs=y); return x, None"
            )
    return None


def observes_alike(space: StateSpace) -> bool:
    """Whether H = dh/dx and the noise of the data are the same at all steps and states; worked out once."""
    return space.structure.remember("observes_alike", lambda: _alike(space))


def observed_at(
    chain: Chain, state: Array, riders: list[Array], step: Array, after: Array
) -> tuple[Observed, dict[str, Array], Any]:
    """Data of a step with their prediction, its sites and what it returns, if it had led to another state.

    Args:
        chain: the model at its parameters, none of them in the state.
        state: the state before the step, shape (n,).
        riders: what rides along before it.
        step: its number.
        after: the state after it, shape (n,).
    """
    s = chain.structure
    found = _cut_program(s)(
        constants=chain.bound["consts"],
        carry=join(s, state, riders),
        x=[v[step] for v in chain.bound["xs"]],
        step=jnp.asarray(step),
        noise={n: jnp.zeros(v.shape, v.dtype) for n, v in s.body.inputs["noise"].items()},
        after=_leaves(s, after),
    )
    observed = dict(found["observed"])
    if s.fused:
        observed |= chain._fused(found["returned"], step)
    mean, noise, data = flat(observed)
    return Observed(mean, noise, data, {n: o.log_prob for n, o in observed.items()}), found["sites"], found["returned"]


def _leaves(s: ChainStructure, state: Array) -> list[Array]:
    """The random leaves of the carry from the state as one vector."""
    riders = [jnp.zeros(c.shape, c.dtype) for i, c in enumerate(s.carry) if i not in s.state]
    carry = join(s, state, riders)
    return [carry[i] for i in s.state]


def _is_before(s: ChainStructure, source: tuple) -> bool:
    return source[0] == "noise" or (source[0] == "carry" and source[1] in s.state)


def _cut_program(s: ChainStructure) -> Program:
    return s.remember("after", lambda: _cut(s))


def _cut(s: ChainStructure) -> Program:
    """The body with its new carry as an input instead of what its equations give."""
    body = s.body
    jaxpr: Any = body._closed.jaxpr
    places = {("carry", i): k for k, i in enumerate(s.state)}
    new = [jex.Var(jax.core.ShapedArray(s.carry[i].shape, s.carry[i].dtype)) for i in s.state]
    cut: dict[int, jex.Var] = {}
    for path, v in zip(body._outputs, jaxpr.outvars, strict=True):
        if _keys(path) in places and not isinstance(v, jex.Literal):
            cut[id(v)] = new[places[_keys(path)]]

    def instead(variables: list) -> list:
        return [cut.get(id(v), v) for v in variables]

    equations = [e.replace(invars=instead(e.invars)) for e in jaxpr.eqns]
    inputs = [*jaxpr.invars, *new]
    # A program is told the names of its arguments and results; those of any with as many will do.
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
    names = jax.make_jaxpr(lambda *v: [jnp.zeros(())] * len(jaxpr.outvars))(*shapes).jaxpr.debug_info
    opened = jex.Jaxpr([], inputs, instead(jaxpr.outvars), equations, jaxpr.effects, names)
    evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(opened, ()))

    def run(constants: list, after: list, **given: Any) -> dict[str, Any]:
        found = jax.tree.unflatten(body._out_tree, evaluate(*constants, *jax.tree.leaves(given), *after))
        return {name: found[name] for name in ("observed", "sites", "returned")}

    known = jaxpr.invars[: sum(name == "consts" for name in body._names)]
    consts = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in known]
    return Program(run, constants=consts, after=[s.carry[i] for i in s.state], **body.inputs)


def _alike(space: StateSpace) -> bool:
    s = space.structure
    chain = jax.eval_shape(space.chain, {n: jnp.zeros(s.joint.sites[n].shape) for n in s.parameters})
    start = jax.eval_shape(lambda c: c.start(jnp.zeros(space.initial_dimension)), chain)
    state = jax.ShapeDtypeStruct((space.state_dimension,), start[0].dtype)

    def run(chain: Chain, state: Array, riders: list[Array], step: Array, after: Array) -> dict[str, Array]:
        H = jax.jacfwd(lambda x: observed_at(chain, state, riders, step, x)[0].mean)(after)
        return {"H": H, "noise": observed_at(chain, state, riders, step, after)[0].noise}

    given = {"chain": chain, "state": state, "riders": start[1], "step": jnp.asarray(0), "after": state}
    program = Program(run, **given)
    moving = {"state", "riders", "step", "after"}
    return not moving & {k[0] for k in (*program.sources("H"), *program.sources("noise"))}
