"""How `pf.learn` finds its estimates: options of its methods."""

from typing import ClassVar

import equinox as eqx

from pushforward._errors import MethodError
from pushforward.learned._likelihood_training import OPTIMIZERS


class Learner(eqx.Module):
    """Base of the methods of `pf.learn`; subclasses are final."""

    steps: eqx.AbstractVar[int]


class Likelihood(Learner):
    """Maximum likelihood through a filter: climbs log p(data given unknowns) along its gradient.

    The gradient is that of the filter itself (auto-differentiable Kalman and ensemble filters; Chen, Sanz-Alonso and
    Willett 2022, doi:10.1137/21M1434477). It is exact with `pf.Kalman()` on a linear-Gaussian model, and tends to the
    exact one at N^-1/2 with `pf.EnKF(members=N)`. Priors of latent parameters give scale and start alone.

    Args:
        steps: at most.
        learning_rate: of Adam in units of the prior's spread; it falls to zero along half a cosine.
        optimizer: "adam"; "lbfgs", for likelihoods without noise; "auto", L-BFGS with Kalman filters and sums over
            discrete states, else Adam.
        noise: "common", every step with the same random numbers, so that a deterministic function is climbed; "fresh",
            new ones in each step, where few members would be learned by heart.
        tolerance: gain, in nats, below which L-BFGS ends, and within which of the top Adam must end.

    Example:
        >>> import pushforward as pf
        >>> pf.Likelihood(steps=100).optimizer
        'auto'
    """

    steps: int = 300
    learning_rate: float = 0.05
    optimizer: str = "auto"
    noise: str = "common"
    tolerance: float = 0.05

    prior: ClassVar[bool] = False

    def __check_init__(self):
        _check_climb(self)


class MAP(Learner):
    """The same with the log prior of latent parameters added: the posterior mode in the user's own coordinates.

    Args:
        steps: see `Likelihood`.
        learning_rate: see `Likelihood`.
        optimizer: see `Likelihood`.
        noise: see `Likelihood`.
        tolerance: see `Likelihood`.

    Example:
        >>> import pushforward as pf
        >>> pf.MAP(optimizer="lbfgs").steps
        300
    """

    steps: int = 300
    learning_rate: float = 0.05
    optimizer: str = "auto"
    noise: str = "common"
    tolerance: float = 0.05

    prior: ClassVar[bool] = True

    def __check_init__(self):
        _check_climb(self)


class EM(Learner):
    """Expectation-maximisation (Dempster, Laird and Rubin 1977; Shumway and Stoffer 1982).

    Each round smooths at the present parameters and then maximises the expected log density of states and data. With
    `pf.Kalman()` the expectation is exact, and the log likelihood never falls; with other linearisations it is an
    approximation, with smoothing draws of `pf.EnKF(...)` or `pf.ParticleFilter(...)` Monte Carlo EM. It needs no
    gradient of the filter, and converges slowly where the states are poorly observed.

    Args:
        steps: rounds at most.
        inner: steps of L-BFGS in each maximisation.
        draws: smoothed trajectories per round, where the expectation is taken over draws.
        tolerance: gain of a round, in nats, below which, three times in a row, it ends; with filters that draw, whose
            likelihoods are noisy, all rounds are taken.

    Example:
        >>> import pushforward as pf
        >>> pf.EM(steps=20).inner
        15
    """

    steps: int = 100
    inner: int = 15
    draws: int = 50
    tolerance: float = 1e-3

    def __check_init__(self):
        _check_integers(self, steps=self.steps, inner=self.inner, draws=self.draws)
        _check_positive(self, tolerance=self.tolerance)


class Increments(Learner):
    """Model error from analysis increments: fits the step between the means of a filter, then filters again.

    With m_t the filter's mean given data up to t, the analysis increment m_t - f(m_{t-1}) is what the model misses,
    and noise. Each round maximises the log density of the steps m_{t-1} -> m_t over the unknowns (for Normal steps,
    least squares), as a regression of the increments on the state by whatever correction the model contains, such as a
    linear map of features or a network (Farchi et al. 2021, doi:10.1002/qj.4116). Cheaper than `Likelihood` for large
    networks, since no gradient goes through the filter; biased where the means are, towards the model. Fix scales of
    noise: they would be fitted to increments, which are smaller than the noise.

    Args:
        steps: rounds of filtering and regression.
        inner: steps of L-BFGS in each regression.
        tolerance: gain of a round, in nats, below which, three times in a row, it ends; with filters that draw, whose
            likelihoods are noisy, all rounds are taken.

    Example:
        >>> import pushforward as pf
        >>> pf.Increments(steps=3).inner
        50
    """

    steps: int = 5
    inner: int = 50
    tolerance: float = 1e-3

    def __check_init__(self):
        _check_integers(self, steps=self.steps, inner=self.inner)
        _check_positive(self, tolerance=self.tolerance)


NAMES: dict[str, type[Learner]] = {"likelihood": Likelihood, "map": MAP, "em": EM, "increments": Increments}


def _check_climb(method: Likelihood | MAP) -> None:
    _check_integers(method, steps=method.steps)
    _check_positive(method, learning_rate=method.learning_rate, tolerance=method.tolerance)
    for name, choices in (("optimizer", OPTIMIZERS), ("noise", ("common", "fresh"))):
        value = getattr(method, name)
        if value not in choices:
            raise MethodError(f"{type(method).__name__}({name}=...) takes one of {list(choices)}; got {value!r}.")
    if method.noise == "fresh" and method.optimizer == "lbfgs":
        raise MethodError(
            f"{type(method).__name__}(optimizer='lbfgs', noise='fresh') do not go together: L-BFGS compares values of "
            "one function. Write optimizer='adam', or noise='common'."
        )


def _check_integers(owner: Learner, **options: int) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MethodError(f"{type(owner).__name__}({name}=...) takes an integer of at least 1; got {value!r}.")


def _check_positive(owner: Learner, **options: float) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise MethodError(f"{type(owner).__name__}({name}=...) takes a positive number; got {value!r}.")
