"""The particle filter and smoother."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.methods._base import Draws, check_boolean, check_choice, check_integer
from pushforward.methods._filter_stats import predicted
from pushforward.methods._guided import Auxiliary, Linearized, Newton, Optimal
from pushforward.methods._loops import checkpointed_scan
from pushforward.methods._particle_parts import (
    RESAMPLINGS,
    BackwardMoves,
    Jitter,
    LiuWest,
    NoJitter,
    ParticleSmoother,
    Regularization,
    Resampling,
    Systematic,
    Transport,
)
from pushforward.methods._particle_smoothing import (
    History,
    Paths,
    distinct_first,
    draw_last,
    joined_of,
    kept,
    riders_at,
    simulate,
    sites_of,
    split_moments,
    trace,
)
from pushforward.methods._particles import Cloud, ParticleSteps, Record
from pushforward.methods._proposals import Bootstrap, Proposal
from pushforward.methods._rao_blackwell import RaoBlackwell
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.model import by_value
from pushforward.model.state_space import Chain, StateSpace

PROPOSALS = {
    "bootstrap": Bootstrap,
    "optimal": Optimal,
    "linearized": Linearized,
    "newton": Newton,
    "auxiliary": Auxiliary,
    "rao_blackwell": RaoBlackwell,
}

_FEW = 10.0
_ROW = "number of the particle"


class ParticleFilter(StateMethod):
    """Particle filter (Gordon, Salmond and Smith 1993): the state's law as weighted draws that the model moves.

    Takes any transition and observation law, discrete states included. Its likelihood estimate is unbiased (without
    `regularization`), its error falls as N^-1/2. It needs a number of particles that grows exponentially with the
    number of data that a step informs by: beyond about ten use `pf.EnKF` or a guided proposal.

    Args:
        particles: number of particles N.
        proposal: how particles move: `pf.Bootstrap()`, or a name.
        resampling: `pf.Systematic()`, `pf.Stratified()`, `pf.Residual()`, `pf.Multinomial()`, and for gradients
            `pf.StopGradient()` and `pf.Transport()`; or a name such as "stratified".
        regularization: `pf.Jitter(scale)` moves copies apart; `pf.LiuWest()` moves parameters in the state.
        smoother: `pf.BackwardMoves()`, `pf.BackwardSimulation()` or `pf.AncestorTracing()`.
        store: "draws", "moments" or "last"; see `pf.Kalman`.
        augment: whether free parameters join the state.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def counts(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        ...         numpyro.sample("y", dist.Poisson(np.e**x), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 1)), y)
        >>> tree = pf.infer(counts, method=pf.ParticleFilter(200), y=np.array([1, 0, 2, 5]), draws=100)
        >>> tree["posterior"]["x"].shape
        (1, 100, 4)
    """

    particles: int = 1000
    proposal: Proposal = Bootstrap()
    resampling: Resampling = Systematic()
    regularization: Regularization = NoJitter()
    smoother: ParticleSmoother = BackwardMoves()
    store: str = "draws"
    augment: bool = False
    densities: ClassVar[bool] = True

    def __init__(
        self,
        particles: int = 1000,
        *,
        proposal: Proposal | str = Bootstrap(),
        resampling: Resampling | str = Systematic(),
        regularization: Regularization = NoJitter(),
        smoother: ParticleSmoother = BackwardMoves(),
        store: str = "draws",
        augment: bool = False,
    ):
        if isinstance(proposal, str):
            check_choice("ParticleFilter", tuple(PROPOSALS), proposal=proposal)
            proposal = PROPOSALS[proposal]()
        if isinstance(resampling, str):
            check_choice("ParticleFilter", tuple(RESAMPLINGS), resampling=resampling)
            resampling = RESAMPLINGS[resampling]()
        self.particles = particles
        self.proposal: Proposal = proposal  # type: ignore[reportAttributeAccessIssue]
        self.resampling: Resampling = resampling  # type: ignore[reportAttributeAccessIssue]
        self.regularization, self.smoother, self.store, self.augment = regularization, smoother, store, augment

    def __check_init__(self):
        check_integer("ParticleFilter", 2, particles=self.particles)
        check_choice("ParticleFilter", STORES, store=self.store)
        check_boolean("ParticleFilter", augment=self.augment)
        kinds = {
            "proposal": (Proposal, "pf.Bootstrap()"),
            "resampling": (Resampling, "pf.Systematic()"),
            "regularization": (Regularization, "pf.Jitter(1.0)"),
            "smoother": (ParticleSmoother, "pf.BackwardMoves(moves=5)"),
        }
        for name, (kind, example) in kinds.items():
            if not isinstance(getattr(self, name), kind):
                given = getattr(self, name)
                raise MethodError(f"ParticleFilter({name}=...) takes an instance such as {example}; got {given!r}.")
        if isinstance(self.resampling, Transport) and isinstance(self.regularization, Jitter):
            raise MethodError(
                "ParticleFilter(resampling=pf.Transport(), regularization=pf.Jitter()) do not go together: transport "
                "leaves no copies to move apart. Leave regularization= out."
            )
        if isinstance(self.regularization, LiuWest) and not self.augment:
            raise MethodError(
                "ParticleFilter(regularization=pf.LiuWest()) moves parameters in the state. Add augment=True, or use "
                "pf.Jitter() for states."
            )

    @property
    def steps(self) -> ParticleSteps:
        """The parts that a step uses."""
        return ParticleSteps(self.particles, self.proposal, self.resampling, self.regularization)

    @property
    def differentiable(self) -> bool:  # type: ignore[reportIncompatibleVariableOverride]
        """Whether the likelihood estimate has a gradient that means something."""
        return self.resampling.differentiable

    def why_not(self, problem: Any) -> str | None:
        """Initial sites need an exact map from noise; transport needs real states; the proposal has conditions, too."""
        s = problem.structure
        inexact = [n for n in s.initial if n in s.inexact]
        if inexact:
            kind = s.joint.sites[inexact[0]].distribution
            return (
                f"initial site '{inexact[0]}' ({kind}) has no exact map from noise; use pf.NUTS() on the joint density"
            )
        if isinstance(self.resampling, Transport) and s.discrete:
            return "pf.Transport() averages particles, and the state has discrete entries; use pf.StopGradient()"
        # Asked here, before the model is traced: reading the body again must not happen inside a trace.
        if not problem.joined and s.latent:
            by_value.memory(s)
        if not self.proposal.has_density and not isinstance(self.regularization, NoJitter):
            return f"{self.proposal!r} gives particles moments, which {self.regularization!r} would move apart"
        if not self.proposal.has_density and isinstance(self.resampling, Transport):
            return f"{self.proposal!r} gives particles moments, which pf.Transport() would average; use pf.Systematic()"
        return self.proposal.why_not(problem)

    def why_not_alone(self, problem: StateSpace) -> str | None:
        """Smoothing draws by transition densities need a carry that later values determine."""
        if self.store != "draws" or not self.smoother.needs_density or not self.proposal.has_density:
            return None
        if self._has_density(problem):
            return None
        way = "smoother=pf.AncestorTracing() (few distinct paths), store='moments' or store='last'"
        if problem.joined:
            return f"parameters in the state have no transition density, which {self.smoother!r} needs. Use {way}"
        return (
            "the carry does not follow from the sites sampled in the step, so that it has no transition density, which "
            f"{self.smoother!r} needs. Sample the state itself (x = numpyro.sample('x', dist.Normal(f(x), sd)), not a "
            f"multiple of a noise site), or use {way}"
        )

    def _has_density(self, space: StateSpace) -> bool:
        return not space.joined and bool(space.structure.latent) and by_value.memory(space.structure) is not None

    def members_of(self, draws: int) -> int:
        """See `StateMethod.members_of`."""
        return self.particles

    def log_likelihood(self, chain: Chain, key: Key) -> Array:
        """Log of an estimate of the likelihood that is unbiased (without `regularization`)."""
        first, second = jax.random.split(key)
        steps = self.steps
        start, _ = steps.start(chain, first)

        def move(cloud: Cloud, t: Array) -> tuple[Cloud, None]:
            return steps.step(chain, cloud, t, steps.random(chain, jax.random.fold_in(second, t)))[0], None

        length = chain.structure.length
        if self.differentiable:
            return checkpointed_scan(move, start, length).log_likelihood
        return jax.lax.scan(move, start, jnp.arange(length))[0].log_likelihood

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`; the particles are those of `log_likelihood` at the same key."""
        first, second = jax.random.split(key)
        start, noise = self.steps.start(chain, first)
        third, fourth, fifth = jax.random.split(jax.random.fold_in(first, 1), 3)
        keep = "last" if draws == 1 else store

        def move(carry: tuple[Cloud, dict], t: Array) -> tuple[tuple[Cloud, dict], tuple]:
            random = self.steps.random(chain, jax.random.fold_in(second, t))
            after, record = self.steps.step(chain, carry[0], t, random)
            stats = {"ess": after.ess, "log_likelihood_increment": record.increment}
            past = History(carry[0], record.ancestors, record.sites) if store == "draws" else ()
            own = jax.random.fold_in(third, t)
            if keep == "draws" and self._predicts:
                groups = kept(after, _numbered(record), own, draws, keep)
                rows, own = groups[1].pop(_ROW), jax.random.fold_in(own, 1)
                groups[1].update(_predicted(chain, carry[0], record.ancestors, random.normals, rows, t, own))
            else:
                groups = kept(after, record, own, draws, keep)
            return (after, record.sites), (groups, stats, past)

        shapes = jax.eval_shape(move, (start, {}), jnp.asarray(0))[0][1]
        blank = {n: jnp.zeros(v.shape, v.dtype) for n, v in shapes.items()}
        (end, sites), (groups, stats, history) = jax.lax.scan(move, (start, blank), jnp.arange(chain.structure.length))
        laws = [jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), g) for g in groups]
        evidence = end.log_likelihood + chain.static_log_likelihood()
        rows = draw_last(end, fourth, draws)
        summary = {"ess_lowest": jnp.min(stats["ess"]), "failed_step": end.failed}
        if store != "draws":
            posterior = {n: v[rows] for n, v in sites.items()} | joined_of(chain, end.state[rows])
            parts = (
                posterior,
                {},
                {},
                (self.proposal.states(end.state, end.memory)[rows], riders_at(chain, end, rows)),
            )
        elif self.proposal.has_density:
            paths, numbers = self._paths(chain, history, rows, fifth)
            parts, summary = self._sites(chain, start, noise, paths, end, fifth), summary | numbers
        else:
            *parts, summary["distinct_ancestors"] = self.proposal.smoothed(chain, noise, history, end, rows, fifth)
        posterior, log_prior, log_likelihood, last = parts
        return StateDraws(posterior, laws[0], laws[1], log_prior, log_likelihood, last, evidence, summary, stats)

    @property
    def _predicts(self) -> bool:
        """Whether particles move from where their predecessors were, so that data can be drawn at the same moves."""
        moved = not isinstance(self.regularization, NoJitter) or isinstance(self.resampling, Transport)
        return self.proposal.has_density and not moved

    def begin(self, chain: Chain, key: Key) -> tuple[Cloud, Array]:
        """See `StateMethod.begin`."""
        cloud, _ = self.steps.start(chain, key)
        return cloud, cloud.log_likelihood

    def advance(self, chain: Chain, belief: Cloud, key: Key) -> tuple[Cloud, Increment]:
        """See `StateMethod.advance`."""
        after, record = self.steps.step(chain, belief, jnp.asarray(0), self.steps.random(chain, key))
        alive = jnp.isfinite(after.log_weights)[:, None]
        after = eqx.tree_at(lambda c: c.state, after, jnp.where(alive, after.state, 0.0))
        sites = record.sites | joined_of(chain, after.state)
        mean, sd = split_moments(sites, after.weights)
        return after, Increment(mean, sd, record.increment, {"ess": after.ess})

    def _paths(self, chain: Chain, history: History, last: Array, key: Key) -> tuple[Paths, dict[str, Array]]:
        """Trajectories through the history, and numbers about them."""
        space = StateSpace(chain.arrays, chain.structure, chain.joined)
        if last.shape[0] == 1 or not self.smoother.needs_density or not self._has_density(space):
            paths = trace(history, last)
            return paths, {"distinct_ancestors": distinct_first(paths)}
        paths = simulate(chain, self.smoother, history, last, key)
        return paths, {"backward_acceptance": paths.acceptance}

    def _sites(self, chain: Chain, start: Cloud, noise: Array, paths: Paths, end: Cloud, key: Key) -> tuple:
        """Sites, log densities and last carry; where particles were moved, sites are those of the filter itself."""
        moved = not isinstance(self.regularization, NoJitter) or isinstance(self.resampling, Transport)
        if not (moved or chain.joined):
            return sites_of(chain, start, noise, paths, key)
        values = {n: jnp.moveaxis(v, 0, 1) for n, v in paths.values.items()}
        begun = jax.vmap(lambda z: chain.around(z)["values"])(noise[paths.first])
        s = chain.structure
        follows = {n for n in begun if {k[0] for k in s.around.sources("values", n)} & {"last", "stacked"}}
        begun = {n: v for n, v in begun.items() if n not in follows and n not in s.late}
        last = (end.state[paths.last], riders_at(chain, end, paths.last))
        return begun | joined_of(chain, last[0]) | values, {}, {}, last

    def failure(self, draws: Draws) -> str | None:
        """The step at which all weights were zero."""
        step = int(draws.summary.get("failed_step", -1))
        if step < 0:
            return None
        where = f"step {step} of the scan (counted from 0)"
        return (
            f"all weights are zero at {where}: its data have no density at any of the {self.particles} particles, "
            "or the model gave NaN there. Look at the data and the observation's support at that step, "
            "give more particles, or a proposal that sees the data (pf.Newton(), pf.Linearized())."
        )

    def warnings(self, draws: Draws) -> list[str]:
        """Collapse, and few distinct ancestors."""
        notes = []
        lowest = float(draws.summary.get("ess_lowest", self.particles))
        if lowest < min(_FEW, 0.5 * self.particles):
            notes.append(
                f"the effective sample size fell to {lowest:.3g} of {self.particles} particles: the filter has "
                "collapsed there, and its evidence may be far too low or noisy. Give more particles, or "
                "a guided proposal (pf.Newton(), pf.Linearized()); with many data per step use pf.EnKF()."
            )
        distinct = float(draws.summary.get("distinct_ancestors", jnp.inf))
        more = "smoother=pf.BackwardMoves() gives" if self.proposal.has_density else "More particles give"
        if distinct < 100 and draws.positions and jax.tree.leaves(draws.positions)[0].shape[1] > distinct:
            notes.append(
                f"the trajectories go back to {distinct:.0f} distinct initial particles, so that early states "
                f"have few distinct values. {more} more."
            )
        return notes


def _numbered(record: Record) -> Record:
    """The record with the number of each particle beside its predicted sites, so that draws of them say which."""
    return eqx.tree_at(lambda r: r.predicted, record, record.predicted | {_ROW: jnp.arange(len(record.ancestors))})


def _predicted(
    chain: Chain, before: Cloud, ancestors: Array, normals: Array, rows: Array, t: Array, key: Key
) -> dict[str, Array]:
    """Data drawn at the one-step predictions of particles `rows`; their noise is the first of each proposal's."""
    chosen = ancestors[rows]
    riders = [r[chosen] for r in before.riders] if chain.structure.discrete else before.riders
    return predicted(chain, before.state[chosen], riders, t, normals[rows, : chain.noise_dimension], key)[1]
