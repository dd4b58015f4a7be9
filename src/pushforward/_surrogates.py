"""`surrogate=` of `infer`: a method runs on the emulator's posterior, and its draws become groups without the model."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pushforward import _evaluate, posterior
from pushforward._errors import ArgumentError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned.emulator import EmulatedLikelihood
from pushforward.learned.fitted import Fitted, check_model_of, check_same
from pushforward.learned.surrogate import Surrogate
from pushforward.methods import _delayed_acceptance
from pushforward.methods._base import Draws, Method, count
from pushforward.methods._state import StateMethod
from pushforward.methods.nuts import NUTS, UNCORRECTED
from pushforward.model.emulated import computable, emulated, fixed_arguments
from pushforward.model.inverse import InverseProblem


@dataclass
class StandIn:
    """A model with a surrogate in its place.

    Attributes:
        surrogate: fitted.
        exact: the model.
        likelihood: the emulator's.
        problem: the emulator's posterior, whose one latent site is z.
        simulations: runs of the model that were made for this result.
    """

    surrogate: Surrogate
    fitted: Fitted
    exact: InverseProblem
    likelihood: EmulatedLikelihood
    problem: InverseProblem
    simulations: int

    def run(self, method: Method, key: Key, draws: int, runner: Runner) -> Draws:
        """Draws of z, with the runs of the model counted."""
        if isinstance(method, NUTS) and method.corrected:
            found = _delayed_acceptance.run(method, self.problem, self.exact, key, draws, runner)
            runs = float(found.evaluations)
        else:
            found, runs = method.run(self.problem, key, draws, runner), 0.0
        positions = found.positions["z"] if isinstance(found.positions, dict) else found.positions
        changed = {"positions": positions, "evaluations": count(self.simulations + runs)}
        return Draws(**(vars(found) | changed | {"gradient_evaluations": count(0)}))

    def groups(self, found: Draws, labels: posterior.Labels, runner: Runner, notes: list[str]) -> dict[str, Any]:
        """The groups of the result but `constant_data`."""
        kept, left = computable(self.exact)
        if left:
            notes.append(f"{list(left)} need the simulator and were left out; pf.predict(tree, model, ...) runs it.")
        notes.append(
            "log_likelihood was left out: the surrogate gives that of all data together. "
            "pf.add_log_likelihood(tree, model, ...) runs the model."
        )
        arguments = (self.exact, self.problem, self.likelihood, found.positions, kept, runner.mesh)
        values = runner.call(_values, *arguments)
        found.summary["surrogate_sd"] = float(np.sqrt(np.mean(np.asarray(values["square"]))))
        parts = {name: values[name] for name in ("posterior", "log_prior")}
        parts["sample_stats"] = {"lp": values["lp"]} | found.stats
        groups = {name: posterior.group(part, labels) for name, part in parts.items()}
        return groups | {"observed_data": posterior.group(self.exact.observed_values(), labels, sampled=False)}

    def attributes(self) -> dict[str, Any]:
        """What the result says of the surrogate."""
        error = self.fitted.error
        return {
            "surrogate": repr(self.surrogate),
            "surrogate_kind": self.surrogate.kind,
            "surrogate_error": dict(error.rmse),
            "surrogate_runs": error.training + error.held_out + error.failed,
        }

    def warnings(self, method: Method, found: Draws) -> list[str]:
        """The emulator's error, not the noise, makes the posterior."""
        sd = found.summary["surrogate_sd"]
        if sd <= 1 or (isinstance(method, NUTS) and method.corrected):
            return []
        return [
            f"where the draws are, the surrogate's own sd is {sd:.2g} times the noise, so its error decides how wide "
            "the posterior is. Give it runs near the posterior, such as members of an EKI run, or use "
            "method=pf.NUTS(corrected=True)."
        ]


def read(
    surrogate: Any,
    method: Any,
    states: Any,
    predictive: bool,
    problem: InverseProblem,
    call: tuple[Model, tuple, dict],
    key: Key,
) -> StandIn | None:
    """The surrogate in place of a model, fitted if need be; None where there is none.

    Raises:
        ArgumentError: `surrogate` is something else.
        MethodError: it does not go with the other options, or was fitted to another model.
    """
    if surrogate is None:
        if isinstance(method, NUTS) and method.corrected:
            raise MethodError(UNCORRECTED)
        return None
    _check(surrogate, method, states, predictive)
    model, args, kwargs = call
    check_model_of(problem)
    simulations = 0
    if surrogate.fitted is None:
        surrogate = surrogate.fit(model, *args, key=jax.random.fold_in(key, 6), progress=False, **kwargs)
        simulations = surrogate.fitted.simulations
    fitted = surrogate.fitted
    check_same(fitted, problem, fixed_arguments(problem, model, args, kwargs))
    likelihood = Runner(progress=False).call(_likelihood, fitted.emulator, tuple(fitted.shapes), problem)
    return StandIn(surrogate, fitted, problem, likelihood, emulated(problem, likelihood), simulations)


def _check(surrogate: Any, method: Any, states: Any, predictive: bool) -> None:
    if not isinstance(surrogate, Surrogate):
        raise ArgumentError(
            "surrogate= takes pf.Surrogate(...), fitted by .fit(model, ...) or not; got "
            f"{surrogate.__name__ if isinstance(surrogate, type) else type(surrogate).__name__}."
        )
    if states is not None:
        raise MethodError(
            "states= and surrogate= were both given: the first integrates a trajectory out, the second emulates the "
            "predictions of a model. Leave one of them out."
        )
    if predictive:
        raise MethodError(
            "predictive=True runs the model at each draw, which surrogate= is there to avoid. Leave it out, and write "
            "pf.predict(tree, model, ...) for as many draws as you can afford."
        )


def check_method(method: Method, stand_in: StandIn | None) -> None:
    """Refuse methods that need more of a model than its log density.

    Raises:
        MethodError: what to write.
    """
    if stand_in is not None and (isinstance(method, StateMethod) or not method.needs_density):
        raise MethodError(
            f"surrogate= gives a log density, and {type(method).__name__} needs the model itself. Use "
            "method=pf.NUTS(), pf.TemperedSMC() or another sampler, or leave surrogate= out."
        )


def _likelihood(emulator: Any, names: tuple[str, ...], problem: InverseProblem) -> EmulatedLikelihood:
    noise, data = problem.forward(jnp.zeros(problem.dimension)).noise, problem.observed_values()
    return emulator.likelihood({n: noise[n] for n in names}, {n: data[n] for n in names})


def _values(
    exact: InverseProblem,
    problem: InverseProblem,
    likelihood: EmulatedLikelihood,
    positions: Array,
    kept: tuple[str, ...],
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Sites, densities and the emulator's mean squared sd (in units of the noise) at draws (chain, draw, d)."""

    def one(z: Array) -> dict[str, Any]:
        found = exact.evaluate(z)
        deviation = likelihood.emulator.deviation(likelihood.emulator.coefficients(z)[1])
        return {
            "posterior": found.sites | {n: found.deterministics[n] for n in kept},
            "log_prior": found.log_prior,
            "lp": problem.log_density(z),
            "square": jnp.mean(deviation**2),
        }

    chains, draws = positions.shape[:2]
    flat = _evaluate.many(one, positions.reshape(-1, positions.shape[-1]), mesh)
    return jax.tree.map(lambda x: x.reshape(chains, draws, *x.shape[1:]), flat)
