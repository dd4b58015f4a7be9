"""Linear Gaussian state-space models in many forms, each with its exact answer.

    x_0 ~ N(m0, P0),    x_t = A x_{t-1} + b + B e_t,    y_t = C x_t + r v_t,    t = 1..steps,

with e_t and v_t independent N(0, 1). A user may write this as a NumPyro `scan` in many ways; `FORMS` holds them,
and `joint` gives the exact law of states and data, hence log evidence, filtering and smoothing moments, by
conditioning one dense Gaussian (no recursion). Forms in `SAME_LAW` give `System.y` the same density; the others
are systems of their own (other dynamics or other observations), with data simulated from their own law.

Source: constructed here. Textbook: Särkkä and Svensson (2023), Bayesian Filtering and Smoothing, 2nd edition, CUP.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pushforward.problems import _forms_same_law, _forms_variants
from pushforward.problems._forms import Form, System, system
from pushforward.problems._gaussian import Joint, Moments

__all__ = ["FORMS", "SAME_LAW", "Joint", "Moments", "System", "form_names", "joint", "system"]

_BUILDERS: dict[str, Callable[[System], Form]] = {**_forms_same_law.BUILDERS, **_forms_variants.BUILDERS}

SAME_LAW = tuple(_forms_same_law.BUILDERS)
"""Forms under which `System.y` has one and the same density (up to missing data and data added beside it)."""


def _as_call(build: Callable[[System], Form]) -> Callable[[System], tuple[Callable[..., Any], tuple, dict[str, Any]]]:
    def form(s: System):
        built = build(s)
        return built.model, (), dict(built.inputs)

    form.__doc__ = build.__doc__
    return form


FORMS: Mapping[str, Callable[[System], tuple[Callable[..., Any], tuple, dict[str, Any]]]] = MappingProxyType(
    {name: _as_call(build) for name, build in _BUILDERS.items()}
)
"""name -> function(system) -> (model, args, kwargs); the state is the site "x" in all of them."""


def joint(s: System, form: str) -> Joint:
    """The exact joint law of latent sites, states and data of a form, holding the data that `FORMS` passes.

    Args:
        s: a system.
        form: a name in `FORMS`.

    Example:
        >>> s = system(n=2, m=2, q=2, steps=5, seed=0)
        >>> exact = joint(s, "centred")
        >>> exact.filtering().mean.shape, exact.smoothing().covariance.shape
        ((5, 2), (5, 2, 2))
        >>> abs(exact.log_evidence() - joint(s, "likelihood_after").log_evidence()) < 1e-10
        True

    Raises:
        ValueError: no form has that name, or the form cannot express this system.
    """
    if form not in _BUILDERS:
        raise ValueError(f"no form is called {form!r}; the names are {', '.join(_BUILDERS)}")
    return _BUILDERS[form](s).joint


def form_names(s: System) -> tuple[str, ...]:
    """The forms that can express this system: those with densities need q = n, those that split need n, m >= 2."""
    names = []
    for name, build in _BUILDERS.items():
        try:
            build(s)
        except ValueError:
            continue
        names.append(name)
    return tuple(names)
