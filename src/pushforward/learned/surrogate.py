"""`Surrogate`: an emulator of a model's predictions, with its error on held-out runs."""

import hashlib
import warnings
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pushforward._errors import DataError, MethodError
from pushforward._runner import Runner
from pushforward._types import Array, Key, Model
from pushforward.learned import _rows, regressors
from pushforward.learned.emulator import Components, Emulator
from pushforward.learned.fitted import Fitted, HeldOut, check_model_of, judged, noise_of, noise_sd, part_of, prior_at
from pushforward.learned.fitting import Training
from pushforward.math.gaussian_process import KERNELS
from pushforward.model._fingerprint import fingerprint, stable_text
from pushforward.model.emulated import fixed_arguments
from pushforward.model.inverse import InverseProblem, read_problem

KINDS = {
    "gaussian_process": "up to some 1000 runs; the most exact for few runs and few parameters",
    "random_features": "the same model in O(runs): thousands of runs",
    "neural_network": "thousands of runs, many parameters, functions that are not equally smooth everywhere",
}
_FEWEST = 10


class Surrogate(eqx.Module):
    """An emulator of a model's predictions, to sample with in place of the model (calibrate, emulate, sample).

    It learns the means of the observed sites as functions of the noise z, where the prior is N(0, I), from runs that
    are there already (members of `EKI`, which lie where the posterior is) or from draws of the prior. Outputs are
    whitened by the sd of their noise and projected on principal components, each of which gets a regression with a
    predictive variance. ``pf.infer(model, method=pf.NUTS(), surrogate=fitted)`` samples with the emulator, whose error
    is added to the noise, so that a poor emulator gives a wide posterior, not a wrong one;
    ``pf.NUTS(corrected=True)`` is exact whatever the emulator, at one run of the model for each draw.

    The likelihood must be Gaussian with a noise that does not depend on latent sites. Data, missing data and noise may
    differ from those of the training.

    Use it where a run of the model takes seconds or more. It is no better than its runs: where the posterior has mass
    and there is no run, the error is large, and `infer` says so.

    Args:
        kind: "gaussian_process", "random_features" or "neural_network".
        simulations: runs of the model at draws of the prior, where `fit` is given none.
        components: number of principal components, or as a float the share of variance (in units of the noise) that
            they hold; what is left counts as error.
        held_out: share of the runs that judge and are not learned from.
        kernel: "squared_exponential" or "matern52" (rougher), for the first two kinds.
        features: number of random features.
        training: `pf.Training(...)` of the networks.
        fitted: what `fit` sets.

    Reference:
        Cleary, Garbuno-Inigo, Lan, Schneider, Stuart (2021), Calibrate, emulate, sample,
        doi:10.1016/j.jcp.2020.109716.

    Example:
        >>> import pushforward as pf
        >>> pf.Surrogate("random_features", simulations=1000).features
        300
    """

    kind: str = "gaussian_process"
    simulations: int = 200
    components: int | float = 0.99999
    held_out: float = 0.2
    kernel: str = "squared_exponential"
    features: int = 300
    training: Training = eqx.field(default_factory=lambda: Training(epochs=2000, batch_size=32, patience=50))
    fitted: Fitted | None = None

    def __check_init__(self):
        _check_choice(KINDS, kind=self.kind)
        _check_choice(KERNELS, kernel=self.kernel)
        for name, least in (("simulations", _FEWEST), ("features", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MethodError(f"Surrogate({name}=...) takes an integer of at least {least}; got {value!r}.")
        share = isinstance(self.components, float) and 0 < self.components <= 1
        count = isinstance(self.components, int) and not isinstance(self.components, bool) and self.components >= 1
        if not share and not count:
            raise MethodError(
                "Surrogate(components=...) takes a number of components of at least 1, or a float up to 1.0, the share "
                f"of variance that they hold; got {self.components!r}."
            )
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise MethodError(f"Surrogate(held_out=...) takes a number between 0 and 1; got {self.held_out!r}.")
        if not isinstance(self.training, Training) or self.training.source != "buffer":
            raise MethodError(f'Surrogate(training=...) takes pf.Training(source="buffer"); got {self.training!r}.')

    def __repr__(self) -> str:
        options = f"Surrogate({self.kind!r}, simulations={self.simulations}, components={self.components}"
        return f"{options}, not fitted)" if self.fitted is None else f"{options}, error=[{self.fitted.error!r}])"

    @property
    def error(self) -> HeldOut:
        """How it does on held-out runs.

        Raises:
            MethodError: it is not fitted.
        """
        return self._fit_of().error

    def predict(self, z: Array) -> dict[str, tuple[Array, Array]]:
        """Mean and sd of the predicted data at z (d,), by site, in the data's own units.

        Raises:
            MethodError: it is not fitted.
        """
        fitted = self._fit_of()
        mean, sd = fitted.emulator.predict(jnp.asarray(z))
        return {n: (part_of(mean, fitted.shapes, n), part_of(sd, fitted.shapes, n)) for n in fitted.shapes}

    def fit(
        self,
        model: Model,
        *args: Any,
        observed: tuple[str, ...] | None = None,
        runs: Any = None,
        key: int | Key = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Learn the predictions of a model.

        Args:
            model: a NumPyro model.
            *args: its positional arguments.
            observed: names of the data sites, for a model that is called without its data.
            runs: a result of ``pf.infer(model, method=pf.EKI(...))``, or a list of such results, whose members are
                learned from; None to run the model at `simulations` draws of the prior.
            key: an integer or a typed JAX key.
            checkpoint: file to which runs of the model are written, and from which an interrupted `fit` resumes.
            progress: whether to show a progress bar.
            **kwargs: the model's named arguments.

        Returns:
            The same surrogate, fitted: `infer` takes it, `pf.save` writes it.

        Raises:
            MethodError: a likelihood that is not Gaussian, or whose noise depends on latent sites.
            DataError: too few runs that did not fail, or outputs that are all the same.
            ArgumentError: `runs` is no result of EKI.
        """
        typed = jax.random.key(key) if isinstance(key, int) else key
        problem = read_problem(model, args, kwargs, observed)
        check_model_of(problem)
        fixed = fixed_arguments(problem, model, args, kwargs)
        runner = self._runner(problem, fixed, typed, checkpoint, progress)
        data = problem.observed_values()
        names = tuple(n for n in problem.sites if n in problem.structure.data)
        first, second = jax.random.split(typed)
        if runs is None:
            z, outputs = _rows.from_prior(problem, names, self.simulations, first, runner)
        else:
            z, outputs = _rows.from_runs(problem, names, runs)
        quiet = Runner(progress=False)
        noise = quiet.call(noise_of, problem)
        shapes = {n: tuple(np.shape(data[n])) if n in data else tuple(problem.sites[n].shape) for n in names}
        scale = np.concatenate([noise_sd(noise[n], shapes[n], n) for n in names])
        emulator, error = self._emulator(z, outputs, scale, shapes, second, quiet)
        prior = quiet.call(prior_at, problem)
        fitted = Fitted(emulator, error, shapes, prior, fixed, len(z) if runs is None else 0)
        poor = {n: e for n, e in error.rmse.items() if e > 1}
        if poor:
            name = max(poor, key=lambda n: poor[n])
            warnings.warn(
                f"Surrogate: the held-out error of '{name}' is {poor[name]:.2g} times its noise, so the emulator, not "
                "the data, decides how wide the posterior is. Give more runs, runs=(a result of EKI), which lie where "
                "the posterior is, or another kind=.",
                UserWarning,
                stacklevel=2,
            )
        return eqx.tree_at(lambda s: s.fitted, self, fitted, is_leaf=lambda v: v is None)

    def _fit_of(self) -> Fitted:
        if self.fitted is None:
            raise MethodError("the surrogate is not fitted. Write pf.Surrogate(...).fit(model, ...).")
        return self.fitted

    def _runner(self, problem: InverseProblem, fixed: Any, key: Key, checkpoint: Any, progress: bool) -> Runner:
        path = None if checkpoint is None else Path(checkpoint)
        parts = (self.simulations, problem.structure.arguments.static, fixed, fingerprint(problem.structure.model))
        text = stable_text(parts) + str(np.asarray(jax.random.key_data(key)))
        identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Runner(progress=progress and path is not None, checkpoint=path, identity=identity, label="Surrogate")

    def _emulator(
        self, z: np.ndarray, outputs: np.ndarray, scale: np.ndarray, shapes: dict, key: Key, runner: Runner
    ) -> tuple[Emulator, HeldOut]:
        """Fit to most of the runs, judge by the others."""
        finite = np.isfinite(outputs).all(-1) & np.isfinite(z).all(-1)
        failed = int(np.sum(~finite))
        z, outputs = z[finite], outputs[finite]
        held = max(2, round(self.held_out * len(z)))
        if len(z) - held < _FEWEST - 2:
            raise DataError(
                f"{len(z)} runs with finite outputs are too few to learn from and to judge by ({failed} failed); at "
                f"least {_FEWEST} are needed, and {held} of these are held out. Give more simulations= or runs=."
            )
        order_key, fit_key = jax.random.split(key)
        order = np.asarray(jax.random.permutation(order_key, len(z)))
        apart, used = order[:held], order[held:]
        if self.kind == "gaussian_process" and len(used) > regressors.MOST_ROWS:
            raise MethodError(
                f'Surrogate("gaussian_process") takes at most {regressors.MOST_ROWS} runs, its cost is cubic; these '
                f'are {len(used)}. Write Surrogate("random_features").'
            )
        components = Components.of(outputs[used], scale, self.components)
        location, spread = z[used].mean(0), z[used].std(0)
        spread = np.where(spread > 0, spread, 1.0)
        scores = components.scores(outputs[used])
        if z.shape[1] > regressors.ARD:
            sizes = np.linalg.norm(np.asarray(components.directions), axis=0)
            spread = spread / regressors.relevance((z[used] - location) / spread, scores * sizes)
        x, y = jnp.asarray((z[used] - location) / spread, float), jnp.asarray(scores, float)
        emulator = Emulator(components, self._regressor(x, y, fit_key, runner), *map(jnp.asarray, (location, spread)))
        emulator = jax.tree.map(lambda v: v.astype(jnp.result_type(float)) if eqx.is_inexact_array(v) else v, emulator)
        mean, sd = (np.asarray(v, float) for v in runner.call(_predicted, emulator, jnp.asarray(z[apart], float)))
        return emulator, judged(outputs[apart] - mean, sd, scale, shapes, len(used), failed, y.shape[1])

    def _regressor(self, x: Array, y: Array, key: Key, runner: Runner) -> regressors.Regressor:
        if self.kind == "gaussian_process":
            return regressors.fit_gaussian_process(x, y, self.kernel, key, runner)
        if self.kind == "random_features":
            return regressors.fit_random_features(x, y, self.kernel, self.features, key, runner)
        return regressors.fit_networks(x, y, self.training, key, runner)


def _predicted(emulator: Emulator, z: Array) -> tuple[Array, Array]:
    return jax.lax.map(emulator.predict, z, batch_size=256)


def _check_choice(choices: dict[str, str], **options: Any) -> None:
    for name, value in options.items():
        if value not in choices:
            raise MethodError(f"Surrogate({name}=...) takes one of {list(choices)}; got {value!r}.")
