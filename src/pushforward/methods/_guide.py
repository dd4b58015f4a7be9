"""The user's own proposal: a NumPyro program that draws the latent sites of a step."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro

from pushforward._errors import MethodError, PushforwardError
from pushforward._types import Array
from pushforward.methods._proposals import Proposal, Proposed, log_likelihood, riders_of
from pushforward.model import _scan_trace, _trace, coordinates
from pushforward.model._body import Mode, is_factor
from pushforward.model._chain import ChainStructure, read_again
from pushforward.model._program import Program
from pushforward.model.state_space import Chain, Moved, StateSpace, join, nothing


class Guide(Proposal):
    """A proposal written in NumPyro: `guide(carry, x)` samples the latent sites of a step by their names.

    It receives what the body of the scan receives, the step's data included (NaN where missing), and, where it has a
    third argument, a dictionary of the parameters' values. The weight is p(sites, data given carry) / q(sites). Its
    laws must cover the model's wherever data make that likely; wider tails than the posterior's keep weights bounded.

    Args:
        guide: a function of `(carry, x)` or `(carry, x, parameters)`. Its distributions need maps from standard normal
            noise, which NumPyro's continuous ones and discrete ones of scalar events have.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def guide(x, y):
        ...     mean = jnp.where(jnp.isnan(y), 0.9 * x, 0.5 * (0.9 * x + y))
        ...     numpyro.sample("x", dist.Normal(mean, 0.5))
        >>> pf.ParticleFilter(100, proposal=pf.Guide(guide)).particles
        100
    """

    guide: Callable = eqx.field(static=True)

    def __check_init__(self):
        if not callable(self.guide):
            raise MethodError(f"Guide(...) takes a function guide(carry, x); got {self.guide!r}.")
        _arguments(self.guide)

    def why_not(self, space: StateSpace) -> str | None:
        """Refuses guides whose sites are not those of the model's step."""
        if space.joined:
            return (
                "parameters in the state (augment=True) have no law that pf.Guide() could weigh by; use pf.Bootstrap()"
            )
        s = space.structure
        try:
            found = _read(s, self.guide)
        except PushforwardError as error:
            return str(error).rstrip(".")
        missing, extra = set(s.latent) - set(found.sites), set(found.sites) - set(s.latent)
        if missing:
            return f"the guide does not sample {sorted(missing)}, a latent site of the step: it samples {found.names}"
        if extra:
            return f"the guide samples {sorted(extra)}, which the step does not: its latent sites are {list(s.latent)}"
        for name in s.latent:
            given, wanted = found.sites[name], s.body.shapes["sites"][name]
            if given.shape != wanted.shape:
                return f"the guide's site '{name}' has shape {given.shape}, the model's has {wanted.shape}"
            if jnp.issubdtype(given.dtype, jnp.floating) != jnp.issubdtype(wanted.dtype, jnp.floating):
                return f"the guide's site '{name}' is {given.dtype}, the model's is {wanted.dtype}"
        return None

    def noise_dimension(self, chain: Chain) -> int:
        """See `Proposal.noise_dimension`; the first are for the one-step prediction."""
        return chain.noise_dimension + sum(slot.size for slot in _read(chain.structure, self.guide).slots.values())

    def move(self, chain: Chain, state: Array, riders: list[Array], memory: Any, t: Array, normals: Array) -> Proposed:
        """See `Proposal.move`."""
        s, guided = chain.structure, _read(chain.structure, self.guide)
        around, body = _programs(s)
        bound = around(arrays=chain.arrays, outer=chain.outer, **nothing(s))
        parameters = {n: chain.outer[n] for n in s.parameters}

        def one(x: Array, riding: list[Array], e: Array, z: Array) -> tuple[Moved, dict[str, Array], Array]:
            carry = join(s, x, riding)
            covariates = [v[t] for v in chain.bound["xs"]]
            drawn = guided.program(carry=carry, x=covariates, parameters=parameters, noise=z)
            values = {n: v.astype(s.body.shapes["sites"][n].dtype) for n, v in drawn["values"].items()}
            row, step = [v[t] for v in bound["xs"]], jnp.asarray(t)
            moved = chain.moved(body(bound["consts"], carry=carry, x=row, step=step, values=values), t)
            log_prior = sum((jnp.sum(v) for v in moved.log_prior.values()), jnp.zeros(()))
            predicted = chain.step(x, riding, t, e).sites
            return moved, predicted, jnp.where(moved.factor == -jnp.inf, -jnp.inf, log_prior - drawn["log_density"])

        axes = 0 if s.discrete else None
        own, given = normals[:, : chain.noise_dimension], normals[:, chain.noise_dimension :]
        moved, predicted, log_ratio = jax.vmap(one, (0, axes, 0, 0))(state, riders, own, given)
        value = log_likelihood(moved) + log_ratio
        return Proposed(moved.state, riders_of(chain, moved), memory, moved.sites, predicted, value)


@dataclass(frozen=True, eq=False)
class _Guided:
    """A guide that was read: its program (inputs carry, x, parameters, noise), sites' shapes and slots in the noise."""

    program: Program
    sites: dict[str, jax.ShapeDtypeStruct]
    slots: dict[str, _trace.Slot]

    @property
    def names(self) -> list[str]:
        return list(self.slots)


def _arguments(guide: Callable) -> int:
    """How many arguments a guide takes, 2 or 3."""
    try:
        parameters = inspect.signature(guide).parameters.values()
    except (TypeError, ValueError):
        return 2
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    free = [p for p in needed if p.default is p.empty]
    if len(needed) < 2 or len(free) > 3:
        names = [p.name for p in parameters]
        raise MethodError(
            f"Guide(...) takes a function of (carry, x) or (carry, x, parameters); this one takes {names}."
        )
    return 3 if len(free) == 3 or (len(needed) == 3 and needed[2].name == "parameters") else 2


def _read(s: ChainStructure, guide: Callable) -> _Guided:
    """The guide as a program, read once for a model."""
    with numpyro.validation_enabled(False):
        return s.remember(("guide", guide), lambda: _read_guide(s, guide))


def _read_guide(s: ChainStructure, guide: Callable) -> _Guided:
    tree, three = _tree_of_xs(s), _arguments(guide) == 3
    slots: dict[str, _trace.Slot] = {}

    def run(carry: list, x: list, parameters: dict, assign: Callable) -> dict[str, dict]:
        given = (jax.tree.unflatten(s.carry_tree, carry), jax.tree.unflatten(tree, x))
        return _trace.run(lambda: guide(*given, *((parameters,) if three else ())), assign)

    def measure(**given: Any) -> dict[str, Any]:
        def assign(site: dict) -> Array | None:
            if site["type"] != "sample" or site["is_observed"]:
                return None
            law = _trace.site_law(site)
            shape = coordinates.noise_shape(law)
            offset = sum(slot.size for slot in slots.values())
            slots[site["name"]] = _trace.Slot(site["name"], shape, shape, None, offset)
            return coordinates.push(law, jnp.zeros(shape))

        sites = run(assign=assign, **given)
        observed = [n for n, site in sites.items() if site["type"] == "sample" and n not in slots]
        if observed:
            raise MethodError(f"the guide observes '{observed[0]}': it may only sample; data belong to the model")
        return {n: sites[n]["value"] for n in slots}

    def density(noise: Array, **given: Any) -> dict[str, Any]:
        sites = run(assign=_trace.from_noise(slots, noise), **given)
        # Where a map from noise is not exact, a factor holds what its law owes to that of the site.
        owed = sum((jnp.sum(_trace._log_prob(v)) for v in sites.values() if is_factor(v)), jnp.zeros(()))
        total = sum((jnp.sum(_trace._log_prob(sites[n])) for n in slots), jnp.zeros(()))
        return {"values": {n: sites[n]["value"] for n in slots}, "log_density": total - owed}

    inputs = s.body.inputs
    parameters = {n: s.around.inputs["outer"][n] for n in s.parameters}
    given = {"carry": inputs["carry"], "x": inputs["x"], "parameters": parameters}
    try:
        sites = jax.eval_shape(lambda given: measure(**given), given)
    except PushforwardError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise MethodError(
            f"the guide stopped with {type(error).__name__}: {said}. It receives the carry and the x of a step as "
            "the body of the scan does"
        ) from error
    size = sum(slot.size for slot in slots.values())
    return _Guided(Program(density, **given, noise=jnp.zeros(size)), sites, slots)


def _programs(s: ChainStructure) -> tuple[Program, Program]:
    """The model by values of its step's sites, with density zero outside their support.

    NumPyro's `log_prob` says nothing of the support, which a smoother's values never leave and a guide's may.
    """
    shapes = {n: s.body.shapes["sites"][n] for n in s.latent}

    def assign(slots: dict, data: frozenset, values: dict[str, Array]) -> _trace.Assign:
        given = _trace.from_values(slots, values)

        def found(site: dict) -> Array | None:
            value = given(site)
            if value is not None:
                inside = jnp.all(_trace.site_law(site).support(value))
                _scan_trace.add_log_density(f"_support_{site['name']}", jnp.where(inside, 0.0, -jnp.inf))
            return value

        return found

    mode = Mode(assign, lambda slots: {"values": shapes})
    return s.remember("by_value_inside", lambda: read_again(s, mode))


class _Met(Exception):
    """Leaves the model at its scan."""


def _tree_of_xs(s: ChainStructure) -> Any:
    """How what is scanned over hangs together."""
    met: list[Any] = []

    def instead(scan: _scan_trace.Scan) -> Any:
        met.append(jax.tree.structure(scan.xs))
        raise _Met

    def run(arrays: tuple, outer: dict[str, Array]) -> None:
        slots = {n: slot for n, slot in s.joint.slots.items() if slot.steps is None}
        _scan_trace.run_around(s.joint.call(arrays), _trace.from_noise(slots, outer), instead)

    noise = {n: jnp.zeros(slot.shape) for n, slot in s.joint.slots.items() if slot.steps is None}
    with suppress(_Met):
        jax.eval_shape(run, s.around.inputs["arrays"], noise)
    return met[0]
