"""`describe`: what was read of a model, and which methods fit."""

from typing import Any

from pushforward._errors import ModelError
from pushforward._types import Model
from pushforward.methods import NAMES
from pushforward.methods._base import Method
from pushforward.methods._pseudo_marginal import OverStates
from pushforward.methods._state import StateMethod
from pushforward.model._reading import Site
from pushforward.model.inverse import InverseProblem, read_problem
from pushforward.model.simulator import holds_simulator
from pushforward.model.state_space import StateSpace, read_state_space


class Description:
    """What was read of a model; printing it shows two tables.

    Attributes:
        sites: site records by name.
        dimension: length of the noise vector ``z``.
        methods: by name, None where the method fits, else why it does not.
        gaussian: None where the likelihood is Gaussian with fixed noise, else why not.
        chain: the `scan` as state methods read it, or None.
    """

    def __init__(self, problem: InverseProblem):
        self.sites = problem.sites
        self.dimension = problem.dimension
        self.gaussian = problem.why_not_gaussian() if problem.structure.data else "no site is data"
        self.chain, reason = _chain(problem)
        self.methods = {name: _misfit(kind(), problem, self.chain, reason) for name, kind in NAMES.items()}

    def __repr__(self) -> str:
        rows = [("site", "role", "distribution", "shape", "dims", "coordinates")]
        for site in self.sites.values():
            dims = ", ".join(d for d in site.dims if d)
            rows.append(
                (site.name, _role(site, self.chain), site.distribution, str(site.shape), dims, site.coordinates)
            )
        lines = [_table(rows), "", f"noise: z ~ N(0, I) of length {self.dimension}"]
        if self.chain is not None:
            discrete = [n for n in self.chain.structure.joint.discrete if n in self.chain.structure.latent]
            also = f" and discrete {discrete}" if discrete else ""
            lines.append(f"state: {self.chain.state_dimension} numbers{also} over {self.chain.steps} steps")
        lines.append("likelihood: " + ("Gaussian with fixed noise" if self.gaussian is None else self.gaussian))
        lines += ["", _table([("method", "fits"), *((n, "yes" if w is None else w) for n, w in self.methods.items())])]
        return "\n".join(lines)


def _chain(problem: InverseProblem) -> tuple[StateSpace | None, str]:
    """The scan of a model, or why state methods cannot read it."""
    if not any("time" in site.dims for site in problem.sites.values()):
        return None, "the model has no numpyro scan"
    try:
        return read_state_space(problem), ""
    except ModelError as error:
        return None, str(error).splitlines()[0]


def _misfit(method: Method, problem: InverseProblem, chain: StateSpace | None, reason: str) -> str | None:
    if not isinstance(method, StateMethod):
        if isinstance(method, OverStates):
            return reason or "with states=: it infers the parameters over a state method"
        if method.gradients and method.needs_density and holds_simulator(problem):
            return "the model calls a simulator, which has no gradient"
        return problem.why_not_continuous or method.why_not(problem)
    if chain is None:
        return reason
    misfit = method.why_not(chain)
    if misfit is None and chain.structure.parameters:
        return f"with states=: the parameters {list(chain.structure.parameters)} need a method of their own"
    return misfit


def _role(site: Site, chain: StateSpace | None) -> str:
    if chain is None or site.role != "parameter":
        return site.role
    s = chain.structure
    return "initial state" if site.name in s.initial else "state" if site.name in s.latent else site.role


def describe(model: Model, *args: Any, observed: tuple[str, ...] | None = None, **kwargs: Any) -> Description:
    """Say what was read of a model: sites, roles, coordinates, and which methods fit.

    Nothing is run but one abstract trace.

    Args:
        model: a NumPyro model.
        *args: its positional arguments.
        observed: names of the data sites, where no argument observes them.
        **kwargs: its named arguments.

    Returns:
        A `Description`; print it.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pushforward as pf
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> pf.describe(model, y=1.0).dimension
        1
    """
    return Description(read_problem(model, args, kwargs, observed))


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
