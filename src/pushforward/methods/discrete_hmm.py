"""`DiscreteHMM`: exact inference for a scan with finitely many hidden states."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pushforward._errors import MethodError
from pushforward._types import Array, Key
from pushforward.math import hidden_markov
from pushforward.methods._base import Draws, check_boolean, check_choice
from pushforward.methods._loops import checkpointed_scan
from pushforward.methods._state import STORES, Increment, StateDraws, StateMethod
from pushforward.model import finite
from pushforward.model.finite import Finite, Potentials, Table
from pushforward.model.state_space import Chain, Moved, join

_STORED = 1_000_000
"""Entries of potentials up to which the gradient of the log likelihood keeps them."""


class Belief(NamedTuple):
    """What is known after some steps: the carries by state, and log p(state given the data so far)."""

    table: Table
    log_filter: Array


class DiscreteHMM(StateMethod):
    """Exact filter, smoother and joint draws of a scan with finitely many hidden states.

    For hidden Markov and regime-switching models. The latent sites of the step are discrete with finite support, and
    the carry follows from their latest values; together they take K values (plates and batches multiply, so that
    three Bernoulli sites make 8). The cost is O(T K^2), O(T K^(k+1)) where the carry remembers k steps. The forward
    algorithm (Baum et al. 1970) gives log p(data) with its gradient, and draws of trajectories go backward (Chib 1996).
    Continuous states need `pf.ParticleFilter`.

    Args:
        store: "draws" of trajectories; "moments": means and standard deviations in time of the sites that the states
            determine; "last": draws of the last state.
        augment: must stay False: finitely many states have no place for parameters. A model with parameters needs
            ``infer(model, method=pf.NUTS(), states=pf.DiscreteHMM())``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def weather(y):
        ...     stay = jnp.array([[0.9, 0.1], [0.3, 0.7]])
        ...     def step(rain, y):
        ...         rain = numpyro.sample("rain", dist.Categorical(stay[rain]))
        ...         numpyro.sample("y", dist.Normal(jnp.array([0.0, 3.0])[rain], 1), obs=y)
        ...         return rain, None
        ...     scan(step, 0, y)
        >>> tree = pf.infer(weather, method=pf.DiscreteHMM(), y=np.array([0.2, 2.5, np.nan, 3.1]))
        >>> tree["posterior"]["rain"].shape
        (1, 1000, 4)
    """

    augments: ClassVar[bool] = False
    store: str = "draws"
    augment: bool = False

    def __init__(self, *, store: str = "draws", augment: bool = False):
        self.store, self.augment = store, augment

    def __check_init__(self):
        check_choice("DiscreteHMM", STORES, store=self.store)
        check_boolean("DiscreteHMM", augment=self.augment)
        if self.augment:
            raise MethodError(
                "DiscreteHMM(augment=True): a state of finitely many values has no place for parameters. Write "
                "infer(model, method=pf.NUTS(), states=pf.DiscreteHMM()) to infer both."
            )

    def why_not(self, problem: Any) -> str | None:
        """The latent sites must take finitely many values, and the carry must follow from the latest of them."""
        return finite.why_not(problem)

    def log_likelihood(self, chain: Chain, key: Key | None = None) -> Array:
        """log p(data of the trajectory given parameters), exact; `key` is not used."""
        hidden = finite.finite(chain)
        belief, first = _begin(hidden)

        def move(carry: tuple[Belief, Array], t: Array) -> tuple[tuple[Belief, Array], None]:
            after, _, increment = _advance(hidden, carry[0], t)
            return (after, carry[1] + increment), None

        length, pairs = chain.structure.length, hidden.support.states * hidden.support.slots
        if length * pairs <= _STORED:
            return jax.lax.scan(move, (belief, first), jnp.arange(length))[0][1]
        return checkpointed_scan(move, (belief, first), length)[1]

    def trajectories(self, chain: Chain, key: Key, draws: int, store: str = "draws") -> StateDraws:
        """See `StateMethod.trajectories`."""
        hidden = finite.finite(chain)
        start, first = _begin(hidden)
        times, keep = jnp.arange(chain.structure.length), store == "draws"

        def move(carry: tuple, t: Array) -> tuple[tuple, Any]:
            before, total, failed, _ = carry
            after, potentials, increment = _advance(hidden, before, t)
            failed = jnp.where((failed < 0) & (increment == -jnp.inf), t, failed)
            kept = before if keep else _moments(hidden, before, potentials, t) if store == "moments" else ()
            return (after, total + increment, failed, before), (kept, increment)

        failed = jnp.where(first == -jnp.inf, 0, -1)
        (end, total, failed, before), (kept, increments) = jax.lax.scan(move, (start, first, failed, start), times)
        evidence, summary = total + chain.static_log_likelihood(), {"impossible_step": failed}
        stats = {"log_likelihood_increment": increments}
        if keep:
            return _drawn(hidden, kept, end, key, draws, (evidence, summary, stats))
        filtering, one_step = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), kept) if kept else ({}, {})
        last = times[-1]
        (states, values), _ = _pairs(hidden, before, hidden.potentials(before.table, last), end.log_filter, key, draws)
        moved = _run(hidden, before.table, last, states, values, jax.random.fold_in(key, 1))
        carry = moved.state, moved.riders
        return StateDraws(moved.sites, filtering, one_step, {}, {}, carry, evidence, summary, stats)

    def begin(self, chain: Chain, key: Key) -> tuple[Belief, Array]:
        """See `StateMethod.begin`."""
        return _begin(finite.finite(chain))

    def advance(self, chain: Chain, belief: Belief, key: Key) -> tuple[Belief, Increment]:
        """See `StateMethod.advance`; exact means and standard deviations of the sites that the states determine."""
        hidden, step = finite.finite(chain), jnp.asarray(0)
        after, potentials, increment = _advance(hidden, belief, step)
        filtering, _ = _moments(hidden, belief, potentials, step)
        mean, sd = ({n: v[i] for n, v in filtering.items()} for i in (0, 1))
        return after, Increment(mean, sd, increment, {})

    def failure(self, draws: Draws) -> str | None:
        """The step that no state explains."""
        step = int(draws.summary.get("impossible_step", -1))
        if step < 0:
            return None
        return (
            f"the data of step {step} (counted from 0) are impossible in every state that the data before allow. Look "
            "for transition probabilities of 0 and for data outside the support of their law."
        )


def _begin(hidden: Finite) -> tuple[Belief, Array]:
    table, density = hidden.start()
    log_filter, total = hidden_markov.normalize(density)
    return Belief(table, log_filter), total


def _advance(hidden: Finite, before: Belief, t: Array) -> tuple[Belief, Potentials, Array]:
    """The belief after one step, the potentials of the step and log p(its data given those before)."""
    potentials = hidden.potentials(before.table, t)
    log_filter, increment = hidden_markov.forward_step(before.log_filter, _shaped(hidden, potentials))
    return Belief(hidden.onward(before.table, t), log_filter), potentials, increment


def _shaped(hidden: Finite, potentials: Potentials) -> Array:
    """Log potentials of a step by (value forgotten, values kept, new value)."""
    k = hidden.support.slots
    return (potentials.prior + potentials.data).reshape(k, -1, k)


def _moments(hidden: Finite, before: Belief, potentials: Potentials, t: Array) -> tuple[dict, dict]:
    """Mean and standard deviation of the sites of a step given the data so far and one step earlier, stacked."""
    free = {("noise", n) for n in hidden.support.free}
    body = finite.programs(hidden.chain.structure)[1]
    names = [n for n in body.shapes["sites"] if not body.sources("sites", n) & free]

    def at(carry: tuple, value: Array) -> dict[str, Array]:
        sites = hidden.step(carry, t, value).sites
        return {n: jnp.asarray(sites[n], jnp.result_type(float)) for n in names}

    found = hidden.pairs(before.table, slice(None), at)
    forecast = before.log_filter[:, None] + potentials.prior

    def moments(log_weights: Array) -> dict[str, Array]:
        weights = jnp.exp(log_weights - hidden_markov.log_sum(log_weights))

        def of(value: Array) -> Array:
            # What cannot happen may be infinite or NaN.
            value = jnp.where((weights > 0).reshape(*weights.shape, *[1] * (value.ndim - 2)), value, 0.0)
            mean = jnp.tensordot(weights, value, 2)
            return jnp.stack([mean, jnp.sqrt(jnp.tensordot(weights, (value - mean) ** 2, 2))])

        return jax.tree.map(of, found)

    return moments(forecast + potentials.data), moments(forecast)


def _run(hidden: Finite, table: Table, t: Array, states: Array, values: Array, key: Key) -> Moved:
    """One step from draws of states (draw,) to draws of values (draw,)."""
    noise = jax.random.normal(key, (len(states), hidden.noise_dimension))
    return jax.vmap(lambda m, b, z: hidden.step(hidden.row(table, m), t, b, z))(states, values, noise)


def _pairs(
    hidden: Finite, before: Belief, potentials: Potentials, log_after: Array, key: Key, draws: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Independent draws of (state before a step, value) given the data so far, and given those one step earlier."""
    slots, joint = hidden.support.slots, _shaped(hidden, potentials)
    u = jax.random.uniform(key, (4, draws), before.log_filter.dtype)
    pick = jax.vmap(hidden_markov.pick, (0, None))
    after = pick(u[0], log_after)
    filtering = hidden_markov.draw_step(u[1], after, before.log_filter, joint), after % slots
    earlier = pick(u[2], before.log_filter)
    return filtering, (earlier, jax.vmap(hidden_markov.pick)(u[3], potentials.prior[earlier]))


def _drawn(
    hidden: Finite, kept: Belief, end: Belief, key: Key, draws: int, found: tuple[Array, dict, dict]
) -> StateDraws:
    """Trajectories drawn backward, with draws of the filtering and one-step laws of each step."""
    chain, slots = hidden.chain, hidden.support.slots
    first, second, third = jax.random.split(key, 3)
    log_after = jnp.concatenate([kept.log_filter[1:], end.log_filter[None]])
    final = jax.vmap(hidden_markov.pick, (0, None))(
        jax.random.uniform(first, (draws,), log_after.dtype), end.log_filter
    )

    parts = [slice(i * draws, (i + 1) * draws) for i in range(3)]

    def back(after: Array, item: tuple[Array, Belief, Array]) -> tuple[Array, tuple]:
        t, before, law = item
        keys = jax.random.split(jax.random.fold_in(second, t), 3)
        potentials = hidden.potentials(before.table, t)
        u = jax.random.uniform(keys[0], (draws,), law.dtype)
        states = hidden_markov.draw_step(u, after, before.log_filter, _shaped(hidden, potentials))
        laws = ((states, after % slots), *_pairs(hidden, before, potentials, law, keys[1], draws))
        # One run of the body for all three laws halves the time to compile.
        places, values = (jnp.concatenate(part) for part in zip(*laws, strict=True))
        moved = _run(hidden, before.table, t, places, values, keys[2])
        smooth, *others = (jax.tree.map(lambda v, part=part: v[part], moved) for part in parts)
        kept = smooth.sites, smooth.log_prior, smooth.observed.log_prob, smooth.returned
        return states, (kept, *(m.sites for m in others))

    items = (jnp.arange(chain.structure.length), kept, log_after)
    states, series = jax.lax.scan(back, final, items, reverse=True)
    smooth, filtering, one_step = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), series)
    last = jax.vmap(lambda m: hidden.row(end.table, m))(final)
    late = jax.random.normal(third, (draws, chain.late_dimension))
    outside = _outside(hidden, states % slots, smooth[3], last, late)
    values, prior, likelihood = (a | b for a, b in zip(outside, smooth[:3], strict=True))
    evidence, summary, stats = found
    return StateDraws(values, filtering, one_step, prior, likelihood, last, evidence, summary, stats)


def _outside(hidden: Finite, numbers: Array, returned: Any, last: tuple, late: Array) -> tuple[dict, dict, dict]:
    """Values, log prior and log likelihood of the sites outside the scan, leading axis draw."""
    s = hidden.chain.structure

    def one(number: Array, back: Any, state: Array, riders: list[Array], w: Array) -> tuple[dict, dict, dict]:
        carry = jax.tree.unflatten(s.carry_tree, join(s, state, riders))
        found = hidden.outside(number, back, carry, w)
        return found["values"], found["log_prior"], {n: found["observed"][n].log_prob for n in (*s.first, *s.static)}

    state, riders = last
    return jax.vmap(one)(numbers, returned, state, riders, late)
