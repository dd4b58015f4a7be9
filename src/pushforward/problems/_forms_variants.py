"""Forms with dynamics or observations of their own, made of a system's numbers; data are drawn from their own law."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from pushforward.problems._forms import Form, System, path, root, transition_root
from pushforward.problems._gaussian import Affine, Block, Joint, Noise, join


def _simulated(s: System, latent: Mapping[str, Block], data: Mapping[str, Block], state) -> Joint:
    """A joint law with data drawn from it."""
    empty = Joint(latent, data, {}, state)
    return Joint(latent, data, empty.draw(np.random.default_rng(s.seed + 1)), state)


def _scales(s: System) -> np.ndarray:
    """Standard deviations of a step, component by component."""
    return np.sqrt(np.diag(s.Q))


def _vector_start(s: System):
    return numpyro.sample("x0", dist.Normal(s.m0, 1.0).to_event(1))


def scalar(s: System) -> Form:
    """One number per step, plain Normals without events: x_t = 0.8 x + 0.1 + sd e, y_t = x_t + r v."""
    scale, r, m0 = float(_scales(s)[0]), float(s.r[0]), float(s.m0[0])

    def model(y=None, steps=None):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.8 * x + 0.1, scale))
            numpyro.sample("y", dist.Normal(x, r), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(m0, 1.0)), y, length=steps)

    noise = Noise()
    x = x0 = noise.normal([m0], np.eye(1))
    xs, ys = [], []
    for _ in range(s.steps):
        x = 0.8 * x + 0.1 + noise.normal(np.zeros(1), [[scale]])
        xs.append(x)
        ys.append(x + noise.normal(np.zeros(1), [[r]]))
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return _with_values(model, exact, y=exact.values["y"][:, 0])


def _with_values(model, exact: Joint, **values) -> Form:
    """A form whose data arguments have the shapes of its sites."""
    return Form(model, values, Joint(exact.latent, exact.data, values, exact.state))


def fixed_start(s: System) -> Form:
    """No initial site: the carry starts at the constant m0."""
    scale = transition_root(s)

    def model(y=None, steps=None):
        def step(x, y):
            x = numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=scale))
            numpyro.sample("y", dist.Normal(s.C @ x, s.r).to_event(1), obs=y)
            return x, None

        scan(step, jnp.asarray(s.m0), y, length=steps)

    noise = Noise()
    x, xs, ys = Affine(s.m0, np.zeros((s.n, 0))), [], []
    for _ in range(s.steps):
        x = s.A @ x + s.b + noise.normal(np.zeros(s.n), scale)
        xs.append(x)
        ys.append(s.C @ x + noise.normal(np.zeros(s.m), np.diag(s.r)))
    exact = _simulated(s, {"x": xs}, {"y": ys}, xs)
    return Form(model, exact.values, exact)


def several_lags(s: System) -> Form:
    """AR(2) in every component, x_t = p1 x_{t-1} - 0.3 x_{t-2} + sd e; the carry is (x_{t-1}, x_{t-2})."""
    p1, scale = np.linspace(0.5, 0.9, s.n), _scales(s)

    def model(y=None, steps=None):
        def step(carry, y):
            one, two = carry
            x = numpyro.sample("x", dist.Normal(p1 * one - 0.3 * two, scale).to_event(1))
            numpyro.sample("y", dist.Normal(s.C @ x, s.r).to_event(1), obs=y)
            return (x, one), None

        start = numpyro.sample("start", dist.Normal(s.m0, 1.0).expand([2, s.n]).to_event(2))
        scan(step, (start[1], start[0]), y, length=steps)

    noise = Noise()
    start = noise.normal(np.tile(s.m0, 2), np.eye(2 * s.n))
    two, one = start[: s.n], start[s.n :]
    xs, ys = [], []
    for _ in range(s.steps):
        one, two = p1 * one + (-0.3) * two + noise.normal(np.zeros(s.n), np.diag(scale)), one
        xs.append(one)
        ys.append(s.C @ one + noise.normal(np.zeros(s.m), np.diag(s.r)))
    exact = _simulated(s, {"start": start, "x": xs}, {"y": ys}, xs)
    return Form(model, exact.values, exact)


def _offsets(s: System) -> np.ndarray:
    """A known input of the observation, shape (steps,)."""
    return np.sin(1.0 + np.arange(s.steps))


def _offset_joint(s: System) -> Joint:
    transition_root(s)
    p = path(s)
    ys = [y + u for y, u in zip(p.y, _offsets(s), strict=True)]
    return _simulated(s, {"x0": p.x0, "x": p.x}, {"y": ys}, p.x)


def counter(s: System) -> Form:
    """The carry is a dict with an integer counter, by which the body looks up a known offset of the data."""
    scale, offsets = transition_root(s), _offsets(s)

    def model(y=None, steps=None):
        def step(carry, y):
            x, t = carry["x"], carry["t"]
            x = numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=scale))
            numpyro.sample("y", dist.Normal(s.C @ x + jnp.asarray(offsets)[t], s.r).to_event(1), obs=y)
            return {"x": x, "t": t + 1}, None

        x0 = numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))
        scan(step, {"x": x0, "t": jnp.asarray(0)}, y, length=steps)

    exact = _offset_joint(s)
    return Form(model, exact.values, exact)


def covariates(s: System) -> Form:
    """xs is a dict of covariates u and data: y_t = C x_t + u_t + r v."""
    scale = transition_root(s)

    def model(u, y=None):
        def step(x, row):
            x = numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=scale))
            numpyro.sample("y", dist.Normal(s.C @ x + row["u"], s.r).to_event(1), obs=row["y"])
            return x, None

        x0 = numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))
        scan(step, x0, {"u": u, "y": y})

    exact = _offset_joint(s)
    return Form(model, {"u": _offsets(s), **exact.values}, exact)


def irregular_times(s: System) -> Form:
    """An Ornstein-Uhlenbeck process at irregular times, exactly discretised; the gaps are in xs."""
    rate, scale = np.linspace(0.3, 1.5, s.n), _scales(s)
    gap = 0.2 + 0.3 * (7 * np.arange(s.steps) % 5)

    def model(gap, y=None):
        def step(x, row):
            gap, y = row
            decay = jnp.exp(-rate * gap)
            law = dist.Normal(s.b + decay * (x - s.b), scale * jnp.sqrt(1 - decay**2))
            x = numpyro.sample("x", law.to_event(1))
            numpyro.sample("y", dist.Normal(s.C @ x, s.r).to_event(1), obs=y)
            return x, None

        scan(step, _vector_start(s), (gap, y))

    noise = Noise()
    x = x0 = noise.normal(s.m0, np.eye(s.n))
    xs, ys = [], []
    for h in gap:
        decay = np.exp(-rate * h)
        x = decay * x + (1 - decay) * s.b + noise.normal(np.zeros(s.n), np.diag(scale * np.sqrt(1 - decay**2)))
        xs.append(x)
        ys.append(s.C @ x + noise.normal(np.zeros(s.m), np.diag(s.r)))
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return Form(model, {"gap": gap, **exact.values}, exact)


def plate(s: System) -> Form:
    """A plate of n independent scalar chains inside the step, each with a datum."""
    slope, scale = np.linspace(0.5, 0.9, s.n), _scales(s)

    def model(y=None, steps=None):
        def step(x, y):
            with numpyro.plate("block", s.n):
                x = numpyro.sample("x", dist.Normal(slope * x, scale))
                numpyro.sample("y", dist.Normal(x, 0.4), obs=y)
            return x, None

        with numpyro.plate("block", s.n):
            x0 = numpyro.sample("x0", dist.Normal(s.m0, 1.0))
        scan(step, x0, y, length=steps)

    noise = Noise()
    x = x0 = noise.normal(s.m0, np.eye(s.n))
    xs, ys = [], []
    for _ in range(s.steps):
        x = slope * x + noise.normal(np.zeros(s.n), np.diag(scale))
        xs.append(x)
        ys.append(x + noise.normal(np.zeros(s.n), 0.4 * np.eye(s.n)))
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return Form(model, exact.values, exact)


def plate_of_vectors(s: System) -> Form:
    """A plate of two independent copies of the system inside the step: x has shape (2, n), y shape (2, m)."""
    scale = transition_root(s)

    def model(y=None, steps=None):
        def step(x, y):
            with numpyro.plate("block", 2):
                x = numpyro.sample("x", dist.MultivariateNormal(x @ s.A.T + s.b, scale_tril=scale))
                numpyro.sample("y", dist.Normal(x @ s.C.T, s.r).to_event(1), obs=y)
            return x, None

        with numpyro.plate("block", 2):
            x0 = numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))
        scan(step, x0, y, length=steps)

    noise = Noise()
    x = x0 = join(*(noise.normal(s.m0, root(s.P0)) for _ in range(2)))
    xs, ys = [], []
    for _ in range(s.steps):
        x = join(*(s.A @ part + s.b + noise.normal(np.zeros(s.n), scale) for part in (x[: s.n], x[s.n :])))
        xs.append(x)
        looks = (s.C @ part + noise.normal(np.zeros(s.m), np.diag(s.r)) for part in (x[: s.n], x[s.n :]))
        ys.append(join(*looks))
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return _with_values(model, exact, y=exact.values["y"].reshape(s.steps, 2, s.m))


def deterministic_carry(s: System) -> Form:
    """Positions move by the velocities before them, p' = p + 0.5 v, without noise; x = (p, v), singular noise."""
    look, scale = np.concatenate([s.C, 0.5 * s.C], axis=1), _scales(s)

    def model(y=None, steps=None):
        def step(carry, y):
            p, v = carry
            p = p + 0.5 * v
            v = numpyro.sample("v", dist.Normal(0.7 * v + s.b, scale).to_event(1))
            x = numpyro.deterministic("x", jnp.concatenate([p, v]))
            numpyro.sample("y", dist.Normal(look @ x, s.r).to_event(1), obs=y)
            return (p, v), None

        p0 = numpyro.sample("p0", dist.Normal(s.m0, 1.0).to_event(1))
        v0 = numpyro.sample("v0", dist.Normal(0.0, 0.5).expand([s.n]).to_event(1))
        scan(step, (p0, v0), y, length=steps)

    noise = Noise()
    p = p0 = noise.normal(s.m0, np.eye(s.n))
    v = v0 = noise.normal(np.zeros(s.n), 0.5 * np.eye(s.n))
    vs, xs, ys = [], [], []
    for _ in range(s.steps):
        p, v = p + 0.5 * v, 0.7 * v + s.b + noise.normal(np.zeros(s.n), np.diag(scale))
        vs.append(v)
        xs.append(join(p, v))
        ys.append(look @ xs[-1] + noise.normal(np.zeros(s.m), np.diag(s.r)))
    exact = _simulated(s, {"p0": p0, "v0": v0, "v": vs}, {"y": ys}, xs)
    return Form(model, exact.values, exact)


def _dense_model(s: System, noise_root):
    scale = transition_root(s)

    def model(y=None, steps=None):
        def step(x, y):
            x = numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=scale))
            numpyro.sample("y", dist.MultivariateNormal(s.C @ x, scale_tril=noise_root), obs=y)
            return x, None

        x0 = numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))
        scan(step, x0, y, length=steps)

    return model


def dense_noise(s: System) -> Form:
    """Correlated noise of the data: MultivariateNormal with R = diag(r) (0.5 I + 0.5 11^T) diag(r)."""
    noise_root = root(s.r[:, None] * (0.5 * np.eye(s.m) + 0.5) * s.r)
    noise = Noise()
    x = x0 = noise.normal(s.m0, root(s.P0))
    xs, ys = [], []
    for _ in range(s.steps):
        x = s.A @ x + s.b + noise.normal(np.zeros(s.n), transition_root(s))
        xs.append(x)
        ys.append(s.C @ x + noise.normal(np.zeros(s.m), noise_root))
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return Form(_dense_model(s, noise_root), exact.values, exact)


def dense_noise_missing(s: System) -> Form:
    """`dense_noise` with NaN in entries (the first datum of every third step) and in a row (the last)."""
    full = dense_noise(s)
    y = np.array(full.joint.values["y"])
    y[1::3, 0] = np.nan
    y[-1] = np.nan
    return _with_values(full.model, full.joint, y=y)


def feedback(s: System) -> Form:
    """The observed value is carried: y_t = C x_t + 0.4 y_{t-1} + r v, with y_0 = 0."""
    scale = transition_root(s)

    def model(y=None, steps=None):
        def step(carry, y):
            x, before = carry
            x = numpyro.sample("x", dist.MultivariateNormal(s.A @ x + s.b, scale_tril=scale))
            y = numpyro.sample("y", dist.Normal(s.C @ x + 0.4 * before, s.r).to_event(1), obs=y)
            return (x, jnp.asarray(y)), None

        x0 = numpyro.sample("x0", dist.MultivariateNormal(s.m0, scale_tril=root(s.P0)))
        scan(step, (x0, jnp.zeros(s.m)), y, length=steps)

    noise = Noise()
    x = x0 = noise.normal(s.m0, root(s.P0))
    y = Affine(np.zeros(s.m), np.zeros((s.m, 0)))
    xs, ys = [], []
    for _ in range(s.steps):
        x = s.A @ x + s.b + noise.normal(np.zeros(s.n), scale)
        y = s.C @ x + 0.4 * y + noise.normal(np.zeros(s.m), np.diag(s.r))
        xs.append(x)
        ys.append(y)
    exact = _simulated(s, {"x0": x0, "x": xs}, {"y": ys}, xs)
    return Form(model, exact.values, exact)


BUILDERS = {
    build.__name__: build
    for build in (
        scalar,
        fixed_start,
        several_lags,
        counter,
        covariates,
        irregular_times,
        plate,
        plate_of_vectors,
        deterministic_carry,
        dense_noise,
        dense_noise_missing,
        feedback,
    )
}
