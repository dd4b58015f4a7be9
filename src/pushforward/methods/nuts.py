"""`NUTS`: the reference method, on NumPyro's own kernel."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from numpyro.infer.hmc import hmc
from numpyro.infer.util import ParamInfo

from pushforward import parallel
from pushforward._errors import MethodError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key
from pushforward.learned.flows import Transport
from pushforward.methods._base import Draws, Method, check_boolean, check_choice, check_fraction, check_integer, count
from pushforward.methods.flow_vi import check_transport, transport_option
from pushforward.model.inverse import InverseProblem

_COORDINATES = ("numpyro", "z")
_MASSES = ("diagonal", "dense")
_START_TRIES = 100
_LEAST_ACCEPTANCE = 0.1
UNCORRECTED = (
    "NUTS(corrected=True) corrects a surrogate by runs of the model, and there is no surrogate. Write "
    "infer(model, method=pf.NUTS(corrected=True), surrogate=pf.Surrogate().fit(model, ...)), or leave corrected= out."
)


class NUTS(Method):
    """The No-U-Turn sampler (Hoffman and Gelman 2014), several chains at once; NumPyro's kernel.

    Use it as the reference that other methods are compared with. In "numpyro" coordinates the density
    is NumPyro's own, independent of this library's prior map. In "z" hierarchical models are
    non-centred, which removes most divergences of funnels. With `transport` the chains move in the coordinates of a
    flow that was fitted to the posterior, where it is close to N(0, I) (Hoffman et al. 2019, "NeuTra"); they stay
    exact, however good the flow.

    Args:
        chains: independent chains, run together.
        warmup: steps of each chain that adapt step size and mass matrix, and are dropped.
        coordinates: "numpyro" for NumPyro's unconstrained space, "z" for noise space.
        target_acceptance: acceptance rate that the step size is tuned to; raise it against divergences.
        mass_matrix: "diagonal" or "dense".
        max_tree_depth: a trajectory has at most 2^max_tree_depth steps.
        transport: `pf.FlowVI().fit(model, ...)`, whose coordinates then take the place of `coordinates`.
        corrected: with ``surrogate=``, whether the model itself decides on each draw, by delayed acceptance (Christen
            and Fox 2005): the exact posterior for one run of the model, without its gradient, for each draw.

    Example:
        >>> import pushforward as pf
        >>> pf.NUTS(chains=2, coordinates="z").warmup
        1000
    """

    chains: int = 4
    warmup: int = 1000
    coordinates: str = "numpyro"
    target_acceptance: float = 0.8
    mass_matrix: str = "diagonal"
    max_tree_depth: int = 10
    transport: Transport | None = eqx.field(default=None, converter=transport_option)
    corrected: bool = False

    shards = "chains"
    gradients = True

    def __check_init__(self):
        check_integer("NUTS", 1, chains=self.chains, max_tree_depth=self.max_tree_depth)
        check_integer("NUTS", 0, warmup=self.warmup)
        check_fraction("NUTS", target_acceptance=self.target_acceptance)
        check_choice("NUTS", _COORDINATES, coordinates=self.coordinates)
        check_choice("NUTS", _MASSES, mass_matrix=self.mass_matrix)
        check_boolean("NUTS", corrected=self.corrected)

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        if self.corrected:
            raise MethodError(UNCORRECTED)
        if self.transport is not None:
            check_transport("NUTS", self.transport, problem)
        state = runner.call(_start, self, problem, key, draws, runner.mesh)
        if not bool(jnp.all(state.started)):
            return _draws(self, state, Outcome.NONFINITE_START, runner)
        state = runner.loop(_advance, state, self.warmup + draws, self, problem, runner.mesh)
        return _draws(self, state, Outcome.SUCCESS, runner)

    def warnings(self, draws: Draws) -> list[str]:
        """Divergences and truncated trajectories."""
        notes = []
        diverging = int(jnp.sum(draws.stats["diverging"]))
        if diverging:
            numpyro = self.coordinates == "numpyro" and self.transport is None
            remedy = "coordinates='z', or " if numpyro else ""
            notes.append(
                f"{diverging} of {draws.stats['diverging'].size} draws diverged: the posterior has regions that the "
                f"step size cannot follow, and the draws may miss them. Try {remedy}a target_acceptance above "
                f"{self.target_acceptance}."
            )
        deep = int(jnp.sum(draws.stats["reached_max_treedepth"]))
        if deep > 0.05 * draws.stats["diverging"].size:
            notes.append(
                f"{deep} trajectories were cut at max_tree_depth = {self.max_tree_depth}: slow, not wrong. "
                "Scale the parameters, or use mass_matrix='dense'."
            )
        rate = float(draws.summary.get("second_stage_acceptance_rate", 1.0))
        if rate < _LEAST_ACCEPTANCE:
            notes.append(
                f"the model accepted {rate:.3f} of the surrogate's proposals: the draws are strongly correlated. Fit "
                "the surrogate to more runs, near the posterior."
            )
        return notes


class _State(eqx.Module):
    """Kernel state and draws so far; the leading axis of every array is the chain."""

    kernel: Any
    positions: Any
    stats: dict[str, Array]
    leapfrogs: Array
    started: Array
    key: Key


def _potential(method: NUTS, problem: InverseProblem) -> Any:
    transport = method.transport
    if transport is not None:

        def bent(e: Array) -> Array:
            z, log_det = transport.bend(e)
            return -problem.log_density(z) - log_det

        return bent
    if method.coordinates == "z":
        return lambda z: -problem.log_density(z)
    return problem.potential


def _prototype(method: NUTS, problem: InverseProblem) -> Any:
    if method.coordinates == "z" or method.transport is not None:
        return jnp.zeros(problem.dimension)
    return {name: jnp.zeros(shape) for name, shape in problem.unconstrained_shapes().items()}


def _start(method: NUTS, problem: InverseProblem, key: Key, draws: int, mesh: Mesh | None) -> _State:
    prototype = _prototype(method, problem)

    def one(chain_key: Key) -> _State:
        start_key, kernel_key = jax.random.split(chain_key)
        # A stochastic likelihood keeps the noise of its chain: common random numbers.
        own = problem.with_key(chain_key)
        info, found = _find_start(_potential(method, own), prototype, start_key)
        initialise, _ = _kernel(method, own)
        kernel = initialise(info, kernel_key)
        buffer = jax.tree.map(lambda x: jnp.zeros((draws, *x.shape), x.dtype), info.z)
        real, whole = jnp.zeros(draws), jnp.zeros(draws, int)
        stats = {
            "diverging": jnp.zeros(draws, bool),
            "acceptance_rate": real,
            "n_steps": whole,
            "tree_depth": whole,
            "reached_max_treedepth": jnp.zeros(draws, bool),
            "energy": real,
            "step_size": real,
            "lp": real,
        }
        return _State(kernel, buffer, stats, jnp.zeros((), int), found, chain_key)

    return parallel.vmap(one, mesh)(jax.random.split(key, method.chains))


def _find_start(potential: Any, prototype: Any, key: Key) -> tuple[ParamInfo, Array]:
    """A point with finite potential and gradient, uniform on (-2, 2) per coordinate as in NumPyro and Stan."""
    evaluate = jax.value_and_grad(potential)
    leaves, tree = jax.tree.flatten(prototype)

    def propose(i: Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, i), max(len(leaves), 1))
        drawn = [jax.random.uniform(k, x.shape, x.dtype, -2.0, 2.0) for k, x in zip(keys, leaves, strict=False)]
        return jax.tree.unflatten(tree, drawn)

    def search(carry: tuple) -> tuple:
        i, *_ = carry
        z = propose(i)
        energy, gradient = evaluate(z)
        finite = jnp.isfinite(energy)
        for leaf in jax.tree.leaves(gradient):
            finite &= jnp.all(jnp.isfinite(leaf))
        return i + 1, z, energy, gradient, finite

    first = (jnp.zeros((), int), prototype, jnp.full((), jnp.inf), prototype, jnp.zeros((), bool))
    last = jax.lax.while_loop(lambda c: (c[0] < _START_TRIES) & ~c[4], search, first)
    return ParamInfo(*last[1:4]), last[4]


def _kernel(method: NUTS, problem: InverseProblem) -> tuple[Any, Any]:
    """NumPyro's functional kernel: `initialise(info, key)` and `step(state)`."""
    initialise, step = hmc(_potential(method, problem), algo="NUTS")

    def start(info: ParamInfo, key: Key) -> Any:
        return initialise(
            info,
            method.warmup,
            dense_mass=method.mass_matrix == "dense",
            target_accept_prob=method.target_acceptance,
            max_tree_depth=method.max_tree_depth,
            rng_key=key,
        )

    return start, step


def _stepper(method: NUTS, problem: InverseProblem, kernel: Any) -> Any:
    """The step of a chain that has begun."""
    initialise, step = _kernel(method, problem)
    # NumPyro's step closes over what initialise sets; its own result is not needed here.
    initialise(ParamInfo(kernel.z, kernel.potential_energy, kernel.z_grad), kernel.rng_key)
    return step


def _advance(
    state: _State, start: Array, stop: Array, method: NUTS, problem: InverseProblem, mesh: Mesh | None
) -> _State:
    def chain(one: _State) -> _State:
        step = _stepper(method, problem.with_key(one.key), one.kernel)
        return jax.lax.fori_loop(start, stop, lambda i, s: _record(method, s, step(s.kernel), i), one)

    return parallel.vmap(chain, mesh)(state)


def _record(method: NUTS, state: _State, kernel: Any, i: Array) -> _State:
    size = state.stats["lp"].shape[0]
    slot = jnp.where(i < method.warmup, size, i - method.warmup)
    # A trajectory of depth k has between 2^(k-1) and 2^k - 1 steps.
    depth = jnp.ceil(jnp.log2(kernel.num_steps + 1.0)).astype(int)
    now = {
        "diverging": kernel.diverging,
        "acceptance_rate": kernel.accept_prob,
        "n_steps": kernel.num_steps,
        "tree_depth": depth,
        "reached_max_treedepth": depth >= method.max_tree_depth,
        "energy": kernel.energy,
        "step_size": kernel.adapt_state.step_size,
        "lp": -kernel.potential_energy,
    }
    positions = jax.tree.map(lambda b, x: b.at[slot].set(x, mode="drop"), state.positions, kernel.z)
    stats = {k: b.at[slot].set(now[k], mode="drop") for k, b in state.stats.items()}
    return _State(kernel, positions, stats, state.leapfrogs + kernel.num_steps, state.started, state.key)


def _draws(method: NUTS, state: _State, outcome: Outcome, runner: Runner) -> Draws:
    steps = count(jnp.sum(state.leapfrogs))
    positions, stats = state.positions, state.stats
    if method.transport is not None:
        positions = runner.call(_pushed, method.transport, positions)
        # The kernel's density is that of the flow's coordinates; `infer` adds the one of the model.
        stats = {name: values for name, values in stats.items() if name != "lp"}
    return Draws(positions, stats, {}, jnp.asarray(int(outcome)), steps, steps)


def _pushed(transport: Transport, e: Array) -> Array:
    """z of draws of e, both (chain, draw, d)."""
    return jax.vmap(jax.vmap(lambda one: transport.bend(one)[0]))(e)
