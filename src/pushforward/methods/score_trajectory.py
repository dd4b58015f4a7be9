"""`ScoreTrajectory`: a generative model of whole trajectories, learned once, conditioned on any data."""

import hashlib
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import MethodError, ModelError, Outcome
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned.score_model import ScoreModel
from pushforward.learned.score_networks import ScoreNetwork
from pushforward.learned.score_training import ScoreTraining
from pushforward.methods import _score_fit
from pushforward.methods._base import Draws, Method, check_integer, content, count
from pushforward.methods._score_correction import TransitionHMC
from pushforward.methods._score_guidance import GUIDANCES, AutomaticGuidance, Guidance
from pushforward.methods._score_samplers import SAMPLERS, Heun, Sampler, option
from pushforward.methods._score_sampling import sample
from pushforward.methods._score_source import SourceSpace
from pushforward.methods._score_twisted import Twisted
from pushforward.model._arguments import bound
from pushforward.model._fingerprint import stable_text
from pushforward.model._trace import conditioned
from pushforward.model.inverse import InverseProblem, read_problem
from pushforward.model.series import Series, needed_parameters, parameter_values, read_series

_NETWORKS = _score_fit.NETWORKS
_GUIDING = (Guidance, SourceSpace, Twisted)


class TrainedScore(eqx.Module):
    """What training leaves.

    Attributes:
        model: the learned prior of trajectories.
        sites: latent sites of a step, with the shapes of their unconstrained values.
        initial: whether trajectories begin with the initial state.
        conditions: names of the parameters that the network is given.
        losses: training and held-out loss by judgement, (2, blocks).
    """

    model: ScoreModel
    sites: dict[str, tuple[int, ...]]
    initial: bool
    conditions: tuple[str, ...]
    losses: Array


class ScoreTrajectory(Method):
    """Score-based data assimilation: learn the law of trajectories once, then draw them given any observations.

    A network learns the denoiser of trajectories, ``D(x, s) = E[x0 | x = x0 + s noise]``, from simulations of the
    model's `scan` (its observed sites are not looked at) or from an archive. Given data, the score of the prior at each
    level of noise is joined by that of the data (`guidance`), read from the observed sites of the model at hand, and a
    sampler runs from noise to trajectories, all their states at once. Another observation operator needs no training.

    Use it for dynamics that are learned, expensive, or large. Where they are known and small, `pf.ParticleFilter` has
    less error; where they are known and smooth, ``correction=pf.TransitionHMC()`` moves the draws to the exact
    posterior.

    The state is what the step samples and carries on: ``x = numpyro.sample("x", ...); return x, None``. Free parameters
    are drawn from their prior in training and integrated out, unless they are `conditions` of `fit`, to be fixed later.

    Args:
        network: "mlp", "unet", "field" or "transformer", an instance such as `pf.TemporalUNet(channels=(32, 64))`, or
            a module of your own, called as ``network(x, condition, given)`` with states x of shape (length, *state),
            ``condition = log(s) / 4`` and the conditions (p,), that returns the shape of x.
        window: number of consecutive states that the network sees, odd; results of windows are composed to
            trajectories of any length, without correlation over more than half of it. 0 for whole trajectories.
        guidance: how data enter: "auto", "averaged", "surrogate", "mmps", "gamma", "none", an instance, or
            `pf.SourceSpace()`, which samples the noise of the sampler instead, exactly for the learned prior, or
            `pf.Twisted()`, draws with weights, which are exact for it as they grow many.
        sampler: "heun", "multistep", "ddim", "ancestral", or an instance such as `pf.Heun(steps=32)`.
        correction: None, or `pf.TransitionHMC()`, moves of the draws on the model's own joint density.
        simulations: number of trajectories to learn from.
        training: `pf.ScoreTraining(...)`.
        trained: what `fit` sets.

    Source: Rozet and Louppe 2023, "Score-based data assimilation", arXiv:2306.10574; preconditioning and samplers,
    Karras et al. 2022, arXiv:2206.00364.

    Example:
        >>> import pushforward as pf
        >>> pf.ScoreTrajectory("mlp", window=5, sampler=pf.Heun(steps=32)).window
        5
    """

    network: Any = "unet"
    window: int = 0
    guidance: Guidance | SourceSpace | Twisted = eqx.field(
        default_factory=AutomaticGuidance,
        converter=option("ScoreTrajectory", "guidance", GUIDANCES, _GUIDING, "pf.SourceSpace()"),
    )
    sampler: Sampler = eqx.field(
        default_factory=Heun,
        converter=option("ScoreTrajectory", "sampler", SAMPLERS, Sampler, "an instance such as pf.Heun(steps=32)"),
    )
    correction: TransitionHMC | None = None
    simulations: int = 1024
    training: ScoreTraining = eqx.field(default_factory=ScoreTraining)
    trained: TrainedScore | None = None

    def __check_init__(self):
        check_integer("ScoreTrajectory", 0, window=self.window)
        check_integer("ScoreTrajectory", 20, simulations=self.simulations)
        if self.window and self.window % 2 == 0:
            raise MethodError(
                f"ScoreTrajectory(window=...) takes an odd number of states, so that one is in the middle, or 0; got "
                f"{self.window}."
            )
        if isinstance(self.network, str) and self.network not in _NETWORKS:
            raise MethodError(
                f"ScoreTrajectory(network=...) takes one of {list(_NETWORKS)}, an instance or a module; got "
                f"{self.network!r}."
            )
        if not isinstance(self.network, str) and not (isinstance(self.network, eqx.Module) and _callable(self.network)):
            raise MethodError(
                f"ScoreTrajectory(network=...) takes an Equinox module that is called as network(x, condition, given); "
                f"got {type(self.network).__name__}."
            )
        if self.correction is not None and not isinstance(self.correction, TransitionHMC):
            raise MethodError(
                f"ScoreTrajectory(correction=...) takes None or pf.TransitionHMC(); got {self.correction!r}."
            )
        if not isinstance(self.training, ScoreTraining):
            raise MethodError(
                f"ScoreTrajectory(training=...) takes pf.ScoreTraining(steps=5000); got {self.training!r}."
            )

    @property
    def observed(self) -> tuple[str, ...] | None:
        """Data sites that must be named: none, since any observation of the trajectory will do."""
        return None

    def fit(
        self,
        model: Model,
        *args: Any,
        observed: tuple[str, ...] | None = None,
        trajectories: Any = None,
        conditions: tuple[str, ...] | str = (),
        key: int | Key = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Train on trajectories of a model.

        Args:
            model: a NumPyro model with one scan.
            *args: its positional arguments.
            observed: names of the data sites, for a model that is called without its data.
            trajectories: None to simulate them; or an array (n, rows, *state), or a dictionary of arrays by site name
                (n, steps, ...), of the sites of the scan, of any number of rows that a window fits in; or an iterable
                of such, each of which is trained on in turn, for archives that do not fit memory (shuffled; the first
                of them gives the scales and, in part, the judge).
            conditions: names of parameters of the model that the network is given.
            key: an integer or a typed JAX key.
            checkpoint: file to which the training writes its state, and from which it resumes.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments.

        Returns:
            The same method, trained: `infer` takes it, `pf.save` writes it.

        Raises:
            ModelError: no scan, or one whose carry is not what its step samples.
            DataError: trajectories that are not finite, or too short for the window.
            MethodError: a network that does not fit the states.
        """
        typed = jax.random.key(key) if isinstance(key, int) else key
        problem = read_problem(model, args, kwargs, observed)
        missing = _score_fit.with_missing_data(problem)
        if missing:
            problem = read_problem(conditioned(model), (missing, args, kwargs))
        names = (conditions,) if isinstance(conditions, str) else tuple(conditions)
        path = None if checkpoint is None else Path(checkpoint)
        runner = Runner(progress=progress, checkpoint=path, identity="", label="ScoreTrajectory")
        if path is not None:
            given = {n: v for n, v in bound(model, args, kwargs).items() if v is not None}
            parts = (content(self), content(given), names, _score_fit.digest(trajectories))
            text = stable_text(parts) + str(np.asarray(jax.random.key_data(typed)))
            runner.identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        trained = self._fitted(problem, typed, runner, trajectories, names)
        return eqx.tree_at(lambda m: m.trained, self, trained, is_leaf=lambda v: v is None)

    def why_not(self, problem: InverseProblem) -> str | None:
        """See `Method.why_not`."""
        try:
            series = read_series(problem)
        except ModelError as error:
            return str(error).rstrip(".")
        reason = self._why_not_trained(series) if self.trained is not None else None
        reason = reason or self._why_not_parameters(series)
        if reason:
            return reason
        if self.correction is not None and series.parameters:
            return (
                f"the correction moves trajectories at known parameters, and {list(series.parameters)} are free. Fix "
                "them with numpyro.handlers.substitute, or leave correction= out"
            )
        return None

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        series, trained, simulated = read_series(problem), self.trained, 0
        first, second, third = jax.random.split(key, 3)
        if trained is None:
            trained, simulated = self._fitted(problem, first, runner, None, ()), self.simulations
        values = parameter_values(problem, trained.conditions)
        given = _vector(values, trained.conditions)
        zeros = problem.constrain(jnp.zeros(problem.dimension))
        free = {n: zeros[n] for n in series.parameters}
        summary: dict[str, Any] = {"loss": np.nanmin(np.asarray(trained.losses)[1])}
        summary |= {f"given_{n}": np.asarray(values[n]) for n in trained.conditions}
        if isinstance(self.guidance, SourceSpace | Twisted):
            _check_reach(self.guidance, trained.model, series.rows)
            found, numbers = self.guidance.draw(series, trained.model, self.sampler, free, given, second, draws, runner)
            summary |= numbers
        else:
            chosen = self.guidance
            if isinstance(chosen, AutomaticGuidance):
                chosen = chosen.chosen(trained.model, series.rows)
            _check_reach(chosen, trained.model, series.rows)
            found = runner.call(sample, series, trained.model, chosen, self.sampler, free, given, second, draws)
        gradients = 0
        if self.correction is not None:
            found, numbers = self.correction.corrected(series, found, third, runner)
            summary, gradients = summary | numbers, self.correction.gradients(draws)
        positions = runner.call(_positions, series, found)
        finite = all(bool(jnp.isfinite(v).all()) for v in positions.values())
        outcome = Outcome.SUCCESS if finite else Outcome.NONFINITE
        names = (*series.layout.initial, *series.layout.names)
        sites = None if not series.parameters else names
        summary["network_evaluations"] = np.asarray(float(draws * self.sampler.evaluations))
        return Draws(positions, {}, summary, np.asarray(int(outcome)), count(simulated), count(gradients), None, sites)

    def failure(self, draws: Draws) -> str | None:
        """See `Method.failure`."""
        if int(draws.outcome) != int(Outcome.NONFINITE):
            return None
        return (
            "trajectories are not finite: sampling exploded. Use guidance='surrogate', which is stable, look at the "
            "loss in the attributes (near 1 means that nothing was learned), or train with more steps."
        )

    def warnings(self, draws: Draws) -> list[str]:
        """A prior that was not learned, and moves that were seldom accepted."""
        notes = []
        loss = float(draws.summary["loss"])
        if loss > 0.9:
            notes.append(
                f"the held-out loss of the network is {loss:.2f}, where 1 is that of one that knows nothing. Train "
                "with more steps, another learning rate or network."
            )
        if self.correction is not None and float(draws.summary["acceptance_rate"]) < 0.3:
            notes.append(
                f"moves of the correction were accepted in {float(draws.summary['acceptance_rate']):.0%} of cases: "
                "the draws are not yet of the posterior. Give more moves, or fewer leapfrog steps."
            )
        return notes

    def _fitted(
        self, problem: InverseProblem, key: Key, runner: Runner, trajectories: Any, conditions: tuple[str, ...]
    ) -> TrainedScore:
        series = read_series(problem)
        _check_conditions(series, conditions)
        network = _NETWORKS[self.network]() if isinstance(self.network, str) else self.network
        model, losses = _score_fit.fit(
            series, network, self.window, self.training, self.simulations, trajectories, conditions, key, runner
        )
        sites = dict(zip(series.layout.names, series.layout.shapes, strict=True))
        return TrainedScore(model, sites, bool(series.layout.initial), conditions, jnp.asarray(losses))

    def _why_not_trained(self, series: Series) -> str | None:
        """Why trajectories of this series are not those of the training."""
        trained, layout = self.trained, series.layout
        assert trained is not None
        sites = dict(zip(layout.names, layout.shapes, strict=True))
        if {n: tuple(v) for n, v in trained.sites.items()} != sites:
            return f"it was trained on trajectories of {trained.sites} (site: shape of a step), and these are {sites}"
        shape = trained.model.shape
        length = shape.shape[0]
        if shape.windowed and series.rows < length:
            return f"a trajectory has {series.rows} states, fewer than the {length} of a window"
        flexible = not isinstance(shape.network, ScoreNetwork) or shape.network.any_length
        if not shape.windowed and series.rows != length and not flexible:
            return (
                f"it was trained on trajectories of {length} states, and this one has {series.rows}. Use window=, or "
                "network='unet', which take any length"
            )
        free = [n for n in trained.conditions if n in series.parameters]
        if free:
            return (
                f"the network was trained given {free[0]!r}, which is free here. Fix it: "
                f"numpyro.handlers.substitute(model, data={{{free[0]!r}: value}})"
            )
        lacking = [n for n in trained.conditions if n not in series.structure.joint.sites]
        if lacking:
            return f"the network was trained given {lacking[0]!r}, which is no site of this model"
        return None

    def _why_not_parameters(self, series: Series) -> str | None:
        """A data site that needs a free parameter, which the network has integrated out."""
        for site, names in needed_parameters(series).items():
            if names:
                name = min(names)
                return (
                    f"the observed site '{site}' needs the parameter '{name}', which is free and of which a trajectory "
                    f"says nothing. Fix it, numpyro.handlers.substitute(model, data={{'{name}': value}}), after "
                    f"training with .fit(..., conditions=('{name}',)) if the dynamics depend on it"
                )
        return None


def _check_reach(chosen: Guidance | SourceSpace | Twisted, model: ScoreModel, rows: int) -> None:
    reason = chosen.why_not(model, rows)
    if reason:
        raise MethodError(f"ScoreTrajectory does not fit this model: {reason}.")


def _callable(network: eqx.Module) -> bool:
    return isinstance(network, ScoreNetwork) or callable(network)


def _check_conditions(series: Series, conditions: tuple[str, ...]) -> None:
    unknown = [n for n in conditions if n not in series.parameters]
    if unknown:
        raise MethodError(
            f"fit(conditions=...) names {unknown[0]!r}; the model's free parameters are {list(series.parameters)}."
        )


def _vector(values: dict[str, Array], names: tuple[str, ...]) -> Array:
    return jnp.concatenate([jnp.zeros(0), *(jnp.ravel(jnp.asarray(values[n], float)) for n in names)])


def _positions(series: Series, trajectories: Array) -> dict[str, Array]:
    """Unconstrained coordinates of all latent sites, (1, draw, ...)."""
    return {n: v[None] for n, v in jax.vmap(series.positions)(trajectories).items()}
