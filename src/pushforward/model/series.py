"""`Series`: a NumPyro model with one `scan`, read as densities of its whole trajectory.

A trajectory is one array, (rows, *state): the latent sites of the scan step by step, in NumPyro's unconstrained
coordinates, after the initial state where the model samples one. All steps are read at once, since their values are
given: nothing here runs the dynamics over time.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from pushforward._types import Array
from pushforward.model import _trace
from pushforward.model._chain import ChainStructure, read_chain
from pushforward.model._layout import Layout, read_layout
from pushforward.model._observed import Observation
from pushforward.model.by_value import programs, valued
from pushforward.model.inverse import InverseProblem
from pushforward.model.state_space import StateSpace, join


class Seen(eqx.Module):
    """What a trajectory predicts of the data, all sites in one vector.

    Attributes:
        mean: (m,), of sites whose mean follows the trajectory.
        variances: (m,); correlated noise was whitened, mean and data with it.
        data: (m,), NaN where missing.
        terms: log densities of all other sites and of factors, (k,).
    """

    mean: Array
    variances: Array
    data: Array
    terms: Array


class Series(eqx.Module):
    """A state-space model as a density of its trajectory.

    Attributes:
        arrays: the model's array arguments.
        structure: of the scan.
        layout: of the trajectory.
    """

    arrays: tuple[Array, ...]
    structure: ChainStructure = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)

    @property
    def problem(self) -> InverseProblem:
        """The same model as one joint density."""
        return InverseProblem(self.arrays, self.structure.joint)

    @property
    def rows(self) -> int:
        """Number of states of a trajectory: the steps of the scan, and one more where the initial state is random."""
        return self.structure.length + bool(self.layout.initial)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Latent sites that are no part of the trajectory."""
        return self.structure.parameters

    def trajectory(self, values: dict[str, Array]) -> Array:
        """Rows from values of the latent sites, those of the scan with time first."""
        parts = [
            biject_to(support).inv(values[name]).reshape(self.structure.length, -1)
            for name, support in zip(self.layout.names, self.layout.supports, strict=True)
        ]
        rows = jnp.concatenate(parts, 1)
        if self.layout.initial:
            begun = jnp.concatenate([jnp.ravel(values[n]) for n in self.layout.initial])
            # Entry j of the carry is entry carry[j] of a row and entry first[j] of the initial sites.
            row = jnp.zeros(self.layout.size, rows.dtype).at[self.layout.carry].set(begun[self.layout.first])
            rows = jnp.concatenate([self._free(row)[None], rows])
        return rows.reshape(self.rows, *self.layout.state)

    def values(self, trajectory: Array) -> dict[str, Array]:
        """Values of the latent sites, the inverse of `trajectory`."""
        found, offset = {}, 0
        flat = trajectory.reshape(self.rows, -1)
        later = flat[self.rows - self.structure.length :]
        for name, shape, support in zip(self.layout.names, self.layout.shapes, self.layout.supports, strict=True):
            size = math.prod(shape)
            found[name] = biject_to(support)(later[:, offset : offset + size].reshape(-1, *shape))
            offset += size
        return found | self._initial_values(flat[0])

    def positions(self, trajectory: Array) -> dict[str, Array]:
        """NumPyro's unconstrained coordinates of all latent sites; 0 for parameters."""
        shapes, values = self.problem.unconstrained_shapes(), self.values(trajectory)
        found = {n: jnp.zeros(shapes[n], trajectory.dtype) for n in self.parameters}
        for name, value in values.items():
            support = self.structure.joint.sites[name].support
            found[name] = biject_to(support).inv(value) if name in self.layout.initial else value
        own = trajectory.reshape(self.rows, -1)[self.rows - self.structure.length :]
        offset = 0
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            found[name] = own[:, offset : offset + math.prod(shape)].reshape(-1, *shape)
            offset += math.prod(shape)
        return {n: found[n].reshape(shapes[n]) for n in shapes}

    def reading(self, parameters: dict[str, Array]) -> "Reading":
        """The model at given values of its parameters, ready for any trajectory."""
        space = StateSpace(self.arrays, self.structure)
        chain = space.chain(parameters)
        start, riders, _ = chain.start(jnp.zeros(chain.initial_dimension))
        given = valued(chain)
        riding: list[Array] = []
        if riders:
            still = {n: jnp.zeros(v.shape) for n, v in self.structure.body.shapes["sites"].items()}

            def move(carry: tuple, t: Array) -> tuple[tuple, list[Array]]:
                moved = given.step(carry[0], carry[1], t, {n: still[n] for n in self.layout.names})
                return (moved.state, moved.riders), carry[1]

            _, riding = jax.lax.scan(move, (start, riders), jnp.arange(self.structure.length))
        return Reading(self, {n: chain.outer[n] for n in self.parameters}, given.consts, given.xs, riding, start)

    def _free(self, values: Array) -> Array:
        """A row of values in unconstrained coordinates, for sites that keep their shape."""
        return self._each(values, lambda support, v: biject_to(support).inv(v))

    def _bound(self, row: Array) -> Array:
        return self._each(row, lambda support, v: biject_to(support)(v))

    def _each(self, row: Array, change: Any) -> Array:
        parts, offset = [], 0
        for shape, support in zip(self.layout.shapes, self.layout.supports, strict=True):
            size = math.prod(shape)
            parts.append(jnp.ravel(change(support, row[offset : offset + size].reshape(shape))))
            offset += size
        return jnp.concatenate(parts)

    def _initial_values(self, row: Array) -> dict[str, Array]:
        if not self.layout.initial:
            return {}
        carried = self._bound(row)[self.layout.carry]
        flat, offset, found = jnp.zeros_like(carried).at[self.layout.first].set(carried), 0, {}
        for name in self.layout.initial:
            shape = self.structure.joint.sites[name].shape
            found[name] = flat[offset : offset + math.prod(shape)].reshape(shape)
            offset += math.prod(shape)
        return found


class Reading(eqx.Module):
    """A series at its parameters.

    Attributes:
        series: the model.
        outer: values of the parameters.
        consts: what the body closes over.
        xs: what it scans over.
        riders: what rides along before each step.
        start: the first carry, where it is not random.
    """

    series: Series
    outer: dict[str, Array]
    consts: list[Array]
    xs: list[Array]
    riders: list[Array]
    start: Array

    def seen(self, trajectory: Array) -> Seen:
        """What the trajectory predicts of the data."""
        sites, terms, _ = self._read(trajectory)
        normal, others = self.series.structure.remembered["kinds"]
        parts = [_whitened(sites[n]) for n in normal]
        empty = jnp.zeros(0, trajectory.dtype)
        mean, variances, data = (jnp.concatenate([empty, *(p[i] for p in parts)]) for i in range(3))
        terms = jnp.concatenate([empty, *(jnp.ravel(sites[n].log_prob) for n in others), *terms])
        return Seen(mean, variances, data, terms)

    def log_likelihood(self, trajectory: Array) -> Array:
        """log p(data | trajectory) with all factors."""
        sites, terms, _ = self._read(trajectory)
        parts = [jnp.sum(o.log_prob) for o in sites.values()] + [jnp.sum(t) for t in terms]
        return sum(parts, jnp.zeros((), trajectory.dtype))

    def log_prior(self, trajectory: Array) -> Array:
        """log p(trajectory) in unconstrained coordinates: initial law and transitions, all steps in parallel."""
        return self._read(trajectory)[2]

    def _read(self, trajectory: Array) -> tuple[dict[str, Observation], list[Array], Array]:
        """Observed sites, factors and the log density of the trajectory."""
        series, s, layout = self.series, self.series.structure, self.series.layout
        values = series.values(trajectory)
        rows = jax.vmap(series._bound)(trajectory.reshape(series.rows, -1))[:, layout.carry]
        before = rows[:-1] if layout.initial else jnp.concatenate([self.start[None], rows[:-1]])
        body = programs(s)[1]

        def one(state: Array, riding: list[Array], x: list[Array], t: Array, now: dict[str, Array]) -> dict[str, Any]:
            found = body(self.consts, carry=join(s, state, riding), x=x, step=t, values=now)
            return {n: found[n] for n in ("observed", "returned", "carry", "log_prior", "factor")}

        inner = {n: values[n] for n in layout.names}
        found = jax.vmap(one)(before, self.riders, self.xs, jnp.arange(s.length), inner)
        last = jax.tree.unflatten(s.carry_tree, [v[-1] for v in found["carry"]])
        outer = {n: values[n] if n in values else self.outer[n] for n in layout.around.inputs["outer"]}
        around = layout.around(arrays=series.arrays, outer=outer, last=last, stacked=found["returned"])
        terms = [found["factor"]] if s.factors else []
        terms += [jnp.ravel(v) for v in around["factors"].values()]
        densities = [*found["log_prior"].values(), *(around["log_prior"][n] for n in layout.initial)]
        prior = sum((jnp.sum(v) for v in densities), jnp.zeros((), trajectory.dtype)) + self._jacobian(trajectory)
        return found["observed"] | around["observed"], terms, prior

    def _jacobian(self, trajectory: Array) -> Array:
        """log |d values / d trajectory|."""
        layout, total, offset = self.series.layout, jnp.zeros((), trajectory.dtype), 0
        flat = trajectory.reshape(self.series.rows, -1)
        for shape, support in zip(layout.shapes, layout.supports, strict=True):
            size, change = math.prod(shape), biject_to(support)
            part = flat[:, offset : offset + size].reshape(-1, *shape)
            total, offset = total + jnp.sum(change.log_abs_det_jacobian(part, change(part))), offset + size
        return total


def _whitened(site: Observation) -> tuple[Array, Array, Array]:
    """Mean, variances and data of a site as vectors; correlated noise by its Cholesky factor."""
    if site.noise.ndim == site.mean.ndim:
        return jnp.ravel(site.mean), jnp.ravel(site.noise), jnp.ravel(site.data)
    present = ~jnp.isnan(site.data)
    both = present[..., :, None] & present[..., None, :]
    noise = jnp.where(both, site.noise, jnp.eye(site.noise.shape[-1], dtype=site.noise.dtype))
    root = jnp.linalg.cholesky(noise)

    def whiten(v: Array) -> Array:
        filled = jnp.where(present, v, 0.0)[..., None]
        return jnp.ravel(jax.scipy.linalg.solve_triangular(root, filled, lower=True))

    gone = jnp.where(present, 0.0, jnp.nan)
    return whiten(site.mean), jnp.ones(site.mean.size, site.mean.dtype), whiten(site.data) + jnp.ravel(gone)


def read_series(problem: InverseProblem) -> Series:
    """Read a model as a density of its trajectory.

    Raises:
        ModelError: no scan, or one whose carry is not what its steps sample; the text says what to write.
    """
    known = problem.structure.remembered
    if "series" not in known:
        read = read_chain(problem.structure, problem.arrays, local=False)
        known["series"] = (read, read_layout(problem, read))
    structure, layout = known["series"]
    series = Series(problem.arrays, structure, layout)
    series.structure.remember("kinds", lambda: _kinds(series))
    return series


def _kinds(series: Series) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Data sites whose mean follows the trajectory, for which a Gaussian of the same mean and variance stands, and the
    others, of which the log density is used.
    """
    families = series.structure.families
    names = sorted(families)
    at = jnp.zeros((series.rows, *series.layout.state))
    direction = jax.random.normal(jax.random.key(3), at.shape, at.dtype)
    zeros = series.problem.constrain(jnp.zeros(series.problem.dimension))
    reading = series.reading({n: zeros[n] for n in series.parameters})

    def moments(trajectory: Array) -> dict[str, tuple[Array, Array]]:
        found = reading._read(trajectory)[0]
        return {n: (found[n].mean, found[n].noise) for n in names if n in found}

    moving = jax.jit(lambda: jax.jvp(moments, (at + 0.1,), (direction,)))()[1]
    normal, others = [], []
    for name in names:
        if name not in moving:
            continue
        mean, noise = (np.asarray(v) for v in moving[name])
        known = np.isfinite(mean).all() and np.isfinite(noise).all() and not _scaled(families[name])
        (normal if known and mean.any() else others).append(name)
    return tuple(normal), tuple(others)


def _scaled(family: tuple[str, str | None]) -> bool:
    return family[1] is not None and "handlers.scale" in family[1]


def needed_parameters(series: Series) -> dict[str, set[str]]:
    """For each data site and factor, the parameters on which it depends beside the trajectory."""
    s, found = series.structure, {}
    around, body = programs(s)

    def of(sources: set[tuple]) -> set[str]:
        names: set[str] = {k[1] for k in sources if k[0] == "outer"}
        for k in sources:
            if k[0] in ("consts", "x"):
                group = "consts" if k[0] == "consts" else "xs"
                names |= {j[1] for j in around.sources(group, k[1]) if j[0] == "outer"}
        return names & set(s.parameters)

    for name in body.shapes["observed"]:
        found[name] = of(body.sources("observed", name))
    if s.factors:
        found[s.factors[0]] = of(body.sources("factor"))
    for group in ("observed", "factors"):
        for name in series.layout.around.shapes[group]:
            sources = series.layout.around.sources(group, name)
            found[name] = of(sources)
    return found


def parameter_values(problem: InverseProblem, names: tuple[str, ...]) -> dict[str, Array]:
    """Values of sites that a handler fixes inside the model, such as `numpyro.handlers.substitute`."""
    zeros = _trace.from_noise(problem.structure.slots, jnp.zeros(problem.dimension))
    trace = _trace.run(problem._call, zeros, fill_missing=False)
    return {n: trace[n]["value"] for n in names if n in trace and trace[n]["type"] in ("sample", "deterministic")}
