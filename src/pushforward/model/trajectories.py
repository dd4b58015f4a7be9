"""From draws of states and noise to the user's sites: the body of the scan is run again on each."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pushforward._types import Array
from pushforward.model.state_space import Chain, join


class Sites(eqx.Module):
    """Values by site name and densities of draws of a trajectory.

    Attributes:
        values: latent and deterministic sites; those of the scan have axes (draw, time, ...).
        log_prior: log density of latent sites, element by element.
        log_likelihood: log density of observed sites, element by element.
    """

    values: dict[str, Array]
    log_prior: dict[str, Array]
    log_likelihood: dict[str, Array]


def along(chain: Chain, riders: list[Array], states: Array, noise: Array, times: Array) -> dict[str, Any]:
    """Run the body at each time and draw.

    Args:
        chain: the model at its parameters.
        riders: what rides along before each time, leading axis time.
        states: states before each time, shape (time, draw, n).
        noise: noise of each time, shape (time, draw, q).
        times: numbers of the steps, shape (time,).

    Returns:
        What the body gives, with axes (time, draw, ...).
    """

    def at_time(item: tuple) -> dict[str, Any]:
        riding, state, e, t = item

        def one(x: Array, z: Array) -> dict[str, Any]:
            moved = chain.step(x, riding, t, z)
            return {
                "values": moved.sites,
                "log_prior": moved.log_prior,
                "log_likelihood": moved.observed.log_prob,
                "returned": moved.returned,
            }

        return jax.vmap(one)(state, e)

    return jax.lax.map(at_time, (riders, states, noise, times))


def posterior(
    chain: Chain, riders: list[Array], initial: Array, states: Array, noise: Array, last: tuple, late: Array
) -> Sites:
    """All sites of the model at draws of trajectories.

    Args:
        chain: the model at its parameters.
        riders: what rides along before each step, leading axis time.
        initial: noise z_0, shape (draw, k).
        states: states before each step, shape (time, draw, n).
        noise: noise of the steps, shape (time, draw, q).
        last: the last state (draw, n) and what rides along with it (draw, ...).
        late: noise of sites after the scan, shape (draw, l).
    """
    found = jax.tree.map(
        lambda v: jnp.moveaxis(v, 0, 1), along(chain, riders, states, noise, jnp.arange(states.shape[0]))
    )
    outside = around(chain, initial, found["returned"], last, late)
    parts = (outside[name] | found[name] for name in ("values", "log_prior", "log_likelihood"))
    return Sites(*parts)


def around(chain: Chain, initial: Array, returned: Any, last: tuple, late: Array) -> dict[str, dict[str, Array]]:
    """Values and log densities of the sites outside the scan, with a leading axis draw."""
    s = chain.structure
    state, riders = last

    def one(z: Array, back: Any, x: Array, riding: list[Array], w: Array) -> dict[str, dict[str, Array]]:
        carry = jax.tree.unflatten(s.carry_tree, join(s, x[chain.joined_size :], riding))
        found = chain.around(z, back, carry, w)
        likelihood = {n: found["observed"][n].log_prob for n in (*s.first, *s.static)}
        return {"values": found["values"], "log_prior": found["log_prior"], "log_likelihood": likelihood}

    return jax.vmap(one)(initial, returned, state, riders, late)
