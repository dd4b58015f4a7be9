"""Ways to write one linear Gaussian system in NumPyro; all give the data `y` the same density."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from pushforward.problems._forms import Form, System, at_least_two, path, root, transition_root
from pushforward.problems._gaussian import Affine, Joint, Noise


def _start(s: System):
    return numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))


def _move(s: System, x):
    return numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=transition_root(s)))


def _move_noise(s: System, x):
    e = numpyro.sample("e", dist.Normal(0.0, 1.0).expand([s.q]).to_event(1))
    return numpyro.deterministic("x", s.A @ x + s.b + s.B @ e)


def _look(s: System, x, y):
    return numpyro.sample("y", dist.Normal(s.C @ x, s.r).to_event(1), obs=y)


def _centred_joint(s: System, y=None) -> Joint:
    transition_root(s)
    p = path(s)
    return Joint({"x0": p.x0, "x": p.x}, {"y": p.y}, {"y": s.y if y is None else y}, p.x)


def _noise_joint(s: System) -> Joint:
    p = path(s)
    return Joint({"x0": p.x0, "e": p.e}, {"y": p.y}, {"y": s.y}, p.x)


def _centred_model(s: System):
    def model(y=None, steps=None):
        def step(x, y):
            x = _move(s, x)
            _look(s, x, y)
            return x, None

        scan(step, _start(s), y, length=steps)

    return model


def centred(s: System) -> Form:
    """x_t ~ MultivariateNormal(A x + b, Q)."""
    return Form(_centred_model(s), {"y": s.y}, _centred_joint(s))


def noncentred(s: System) -> Form:
    """The latent site is the noise e; x is deterministic. The only kind of form that allows q < n."""

    def model(y=None, steps=None):
        def step(x, y):
            x = _move_noise(s, x)
            _look(s, x, y)
            return x, None

        scan(step, _start(s), y, length=steps)

    return Form(model, {"y": s.y}, _noise_joint(s))


def observe_then_move(s: System) -> Form:
    """The incoming carry is observed, then moved: site x of step t is the state that y of step t + 1 observes.

    The site x0 has the law of the system's x_1, which keeps the law of the data.
    """
    scale = root(s.A @ s.P0 @ s.A.T + s.Q)

    def model(y=None, steps=None):
        def step(x, y):
            _look(s, x, y)
            return _move(s, x), None

        x0 = numpyro.sample("x0", dist.MultivariateNormal(s.A @ s.m0 + s.b, scale_tril=scale))
        scan(step, x0, y, length=steps)

    transition_root(s)
    p = path(s, extra=1)
    latent = {"x0": p.x[0], "x": p.x[1:]}
    return Form(model, {"y": s.y}, Joint(latent, {"y": p.y[:-1]}, {"y": s.y}, p.x[1:]))


def two_sites(s: System) -> Form:
    """Two latent sites per step, the second given the first; x is their concatenation."""
    at_least_two(s, n=s.n)
    transition_root(s)
    k = s.n // 2
    slope = np.linalg.solve(s.Q[:k, :k], s.Q[:k, k:]).T
    first, second = root(s.Q[:k, :k]), root(s.Q[k:, k:] - slope @ s.Q[:k, k:])

    def model(y=None, steps=None):
        def step(x, y):
            mean = s.A @ x + s.b
            u = numpyro.sample("u", dist.MultivariateNormal(mean[:k], scale_tril=first))
            v = numpyro.sample("v", dist.MultivariateNormal(mean[k:] + slope @ (u - mean[:k]), scale_tril=second))
            x = numpyro.deterministic("x", jnp.concatenate([u, v]))
            _look(s, x, y)
            return x, None

        scan(step, _start(s), y, length=steps)

    p = path(s)
    latent = {"x0": p.x0, "u": [x[:k] for x in p.x], "v": [x[k:] for x in p.x]}
    return Form(model, {"y": s.y}, Joint(latent, {"y": p.y}, {"y": s.y}, p.x))


def outside_carry(s: System) -> Form:
    """A latent site w that is not carried: a part of the noise of the data, of 0.6 their standard deviation."""
    transition_root(s)

    def model(y=None, steps=None):
        def step(x, y):
            x = _move(s, x)
            w = numpyro.sample("w", dist.Normal(0.0, 0.6 * s.r).to_event(1))
            numpyro.sample("y", dist.Normal(s.C @ x + w, 0.8 * s.r).to_event(1), obs=y)
            return x, None

        scan(step, _start(s), y, length=steps)

    noise = Noise()
    x = x0 = noise.normal(s.m0, root(s.P0))
    xs, ws, ys = [], [], []
    for _ in range(s.steps):
        x = s.A @ x + s.b + noise.normal(np.zeros(s.n), root(s.Q))
        w = noise.normal(np.zeros(s.m), 0.6 * np.diag(s.r))
        xs.append(x)
        ws.append(w)
        ys.append(s.C @ x + w + noise.normal(np.zeros(s.m), 0.8 * np.diag(s.r)))
    return Form(model, {"y": s.y}, Joint({"x0": x0, "x": xs, "w": ws}, {"y": ys}, {"y": s.y}, xs))


def several_observed(s: System) -> Form:
    """The data of a step are two sites, y_first and y_rest."""
    at_least_two(s, m=s.m)

    def model(y_first=None, y_rest=None, steps=None):
        def step(x, ys):
            y_first, y_rest = ys
            x = _move(s, x)
            numpyro.sample("y_first", dist.Normal(s.C[0] @ x, s.r[0]), obs=y_first)
            numpyro.sample("y_rest", dist.Normal(s.C[1:] @ x, s.r[1:]).to_event(1), obs=y_rest)
            return x, None

        scan(step, _start(s), (y_first, y_rest), length=steps)

    transition_root(s)
    p = path(s)
    data = {"y_first": [y[:1] for y in p.y], "y_rest": [y[1:] for y in p.y]}
    values = {"y_first": s.y[:, 0], "y_rest": s.y[:, 1:]}
    return Form(model, values, Joint({"x0": p.x0, "x": p.x}, data, values, p.x))


def data_in_closure(s: System) -> Form:
    """The data are no xs: the body indexes them by a counter in the carry."""

    def model(y):
        def step(carry, _):
            x, t = carry
            x = _move(s, x)
            _look(s, x, jnp.asarray(y)[t])
            return (x, t + 1), None

        scan(step, (_start(s), 0), None, length=len(y))

    return Form(model, {"y": s.y}, _centred_joint(s))


def likelihood_after(s: System) -> Form:
    """The scan returns the states; the data are one site after it."""

    def model(y=None, steps=s.steps):
        def step(x, _):
            x = _move(s, x)
            return x, x

        _, xs = scan(step, _start(s), None, length=steps)
        numpyro.sample("y", dist.Normal(xs @ s.C.T, s.r).to_event(1), obs=y)

    # Seen in time order: the exact law knows each row's step.
    return Form(model, {"y": s.y}, _centred_joint(s))


def conditioned(s: System) -> Form:
    """The model has no data argument; `handlers.condition` gives the data.

    NumPyro indexes them by a tracer inside the scan, so that they must be JAX arrays.
    """
    inner = _centred_model(s)

    def model(steps):
        handlers.condition(inner, data={"y": jnp.asarray(s.y)})(steps=steps)

    return Form(model, {"steps": s.steps}, _centred_joint(s))


def missing(s: System) -> Form:
    """NaN in rows (the third, the last) and in entries (the first datum of steps 2, 6, 10 and so on)."""
    y = np.array(s.y)
    y[1::4, 0] = np.nan
    y[[min(2, s.steps - 1), -1]] = np.nan
    return Form(_centred_model(s), {"y": y}, _centred_joint(s, y))


def masked(s: System) -> Form:
    """`handlers.mask` inside the body drops every third step; the values there are wild."""
    present = np.arange(s.steps) % 3 != 1
    y = np.where(present[:, None], s.y, 1e3)

    def model(y=None, present=None):
        def step(x, row):
            y, present = row
            x = _move(s, x)
            with handlers.mask(mask=present):
                _look(s, x, y)
            return x, None

        scan(step, _start(s), (y, present))

    exact = _centred_joint(s, np.where(present[:, None], s.y, np.nan))
    return Form(model, {"y": y, "present": present}, exact)


def observed_start(s: System) -> Form:
    """A site y0 before the scan observes the initial state: N(C x0, r^2)."""
    transition_root(s)

    def model(y0=None, y=None, steps=None):
        def step(x, y):
            x = _move(s, x)
            _look(s, x, y)
            return x, None

        x0 = _start(s)
        numpyro.sample("y0", dist.Normal(s.C @ x0, s.r).to_event(1), obs=y0)
        scan(step, x0, y, length=steps)

    p = path(s)
    size = p.y[-1].root.shape[1]
    own = Affine(np.zeros(s.m), np.concatenate([np.zeros((s.m, size)), np.diag(s.r)], axis=1))
    values = {"y0": s.C @ s.m0 + 0.5, "y": s.y}
    return Form(model, values, Joint({"x0": p.x0, "x": p.x}, {"y0": s.C @ p.x0 + own, "y": p.y}, values, p.x))


def deterministic_sites(s: System) -> Form:
    """Deterministic sites in the scan (signal = C x) and after it (last, total)."""

    def model(y=None, steps=None):
        def step(x, y):
            x = _move(s, x)
            signal = numpyro.deterministic("signal", s.C @ x)
            numpyro.sample("y", dist.Normal(signal, s.r).to_event(1), obs=y)
            return x, x

        last, xs = scan(step, _start(s), y, length=steps)
        numpyro.deterministic("last", last)
        numpyro.deterministic("total", jnp.sum(xs, axis=0))

    return Form(model, {"y": s.y}, _centred_joint(s))


BUILDERS = {
    build.__name__: build
    for build in (
        centred,
        noncentred,
        observe_then_move,
        two_sites,
        outside_carry,
        several_observed,
        data_in_closure,
        likelihood_after,
        conditioned,
        missing,
        masked,
        observed_start,
        deterministic_sites,
    )
}
