"""`online`: data assimilation as data come in, one step at a time, in constant time and memory."""

import hashlib
import inspect
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushforward import _files
from pushforward._errors import ArgumentError, CheckpointError, InferenceError, MethodError, Outcome
from pushforward._infer import _typed_key
from pushforward._stream.call import Call, Rows, unflatten
from pushforward._stream.program import Program
from pushforward._stream.reading import Reading
from pushforward._types import Array, Key, Model
from pushforward.methods import NAMES
from pushforward.methods._state import StateMethod, not_online
from pushforward.model._arguments import _is_labelled, _plain, check_model
from pushforward.model._fingerprint import fingerprint, stable_text

_OWN = ("lag",)


def online(
    model: Model,
    *args: Any,
    method: StateMethod | str,
    key: int | Key = 0,
    lag: int = 0,
    **kwargs: Any,
) -> "Stream":
    """Begin a stream: the filter of a model with one NumPyro `scan`, given its data step by step.

    Each `stream.step(y)` takes the data of one step and returns the filtering law p(x_t given y_1..t), in time and
    memory that do not grow. The model is the one that `infer` takes, with a whole series; here it is called with
    series of length 1, read and compiled at the first step, and never again.

    Args:
        model: the model. What its scan uses must belong to the step: count time in the carry. Data that the body
            indexes by a counter, ``y[t]``, are found, too, since JAX keeps the index at their one row.
        *args: arguments that do not change with time: tables for all steps, sizes, flags.
        method: a state method such as ``pf.Kalman()`` or ``pf.EnKF(members=40)``, or its name. Smoothers filter only.
            With ``augment=True`` free parameters are part of the state.
        key: an integer or a typed JAX key; step t draws from a key of its own, so that a stream can be repeated.
        lag: how many steps back late data may belong to; the stream keeps the beliefs of so many steps, and one more.
        **kwargs: named arguments that do not change with time.

    Returns:
        A `Stream`. Data that the model observes outside its scan count once, with the first step.

    Raises:
        ArgumentError: not a model, parameters that this function keeps for itself, or a wrong option.
        MethodError: not a state method, or one that needs all data at once.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, pushforward as pf
        >>> from numpyro.contrib.control_flow import scan
        >>> def level(y):
        ...     def step(x, y):
        ...         x = numpyro.sample("x", dist.Normal(x, 1))
        ...         numpyro.sample("y", dist.Normal(x, 2), obs=y)
        ...         return x, None
        ...     scan(step, numpyro.sample("x0", dist.Normal(0, 5)), y)
        >>> stream = pf.online(level, method=pf.Kalman(), lag=2)
        >>> for y in (1.0, np.nan, 3.0):
        ...     now = stream.step(y)
        >>> now.step, round(float(now.mean["x"]), 1)
        (2, 2.1)
        >>> now = stream.late(1, 2.5)  # what was missing one step ago
        >>> round(float(now.mean["x"]), 1), stream.count
        (2.3, 3)
    """
    _check_model(model)
    method = _check_method(method)
    if isinstance(lag, bool) or not isinstance(lag, int | np.integer) or lag < 0:
        raise ArgumentError(f"lag= takes a number of steps, 0 or more; got {lag!r}.")
    key, _ = _typed_key(key)
    return Stream(
        Call(model, args, kwargs),
        method,
        (np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))),
        int(lag),
    )


def _check_model(model: Model) -> None:
    if not callable(model):
        check_model(model, (), {})
    try:
        names = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return
    for name in (*_OWN, "method", "key"):
        if name in names:
            raise ArgumentError(
                f"the model has a parameter {name!r}, a name that pf.online keeps for itself. Bind it first: "
                f"functools.partial(model, {name}=...), or rename it."
            )


def _check_method(method: Any) -> StateMethod:
    names = [name for name, kind in NAMES.items() if issubclass(kind, StateMethod)]
    if isinstance(method, str) and method in names:
        method = NAMES[method]()
    if not isinstance(method, StateMethod):
        given = method.__name__ if isinstance(method, type) else repr(method)
        raise MethodError(
            "pf.online takes an instance of a state method, such as method=pf.Kalman() or method=pf.EnKF(members=40), "
            f"or one of {names}; got {given}."
        )
    if not method.online:
        raise not_online(method)
    return method


@dataclass(frozen=True)
class Assimilated:
    """The filtering law after a step, p(x_t given y_1..t).

    Attributes:
        mean: means by site of the step, under the names of the model: latent and deterministic sites, and parameters
            that are part of the state.
        sd: standard deviations, likewise.
        log_likelihood: log p(y_t given y_1..t-1); at the first step with what is observed outside the scan.
        step: number of the step, from 0, as the coordinate of time in a result of `infer`.
        summary: numbers about the step: ``surprise``, the squared innovations over their expectation, about 1 on
            average where model and data agree; others by method.
    """

    mean: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]
    log_likelihood: float
    step: int
    summary: dict[str, float]


class _Entry(NamedTuple):
    """What late data of a step need: the belief before it (None: the first), its rows, and the log evidence before."""

    belief: list[Array] | None
    rows: Rows
    evidence: float


class Stream(_files.Stored):
    """A filter that takes in one step of data after another; `pf.online` makes it.

    After an error a stream is as it was before the call, so that a run goes on. `pf.save(path, stream)` writes it
    between two steps and ``pf.load(path, model=model)`` continues it, in another process, to the identical bits.

    Attributes:
        count: number of steps taken in.
        log_evidence: log p(all data so far), exact or estimated as the method has it.
        lag: how many steps back late data may belong to.
        method: the state method.
        latest: what the latest step returned, or None; not kept by `pf.save`.
    """

    def __init__(self, call: Call, method: StateMethod, key: tuple[np.ndarray, str], lag: int):
        self.method, self.lag = method, lag
        self.count, self.log_evidence = 0, 0.0
        self.latest: Assimilated | None = None
        self._call, self._key, self._wide = call, key, jax.config.jax_enable_x64  # type: ignore[reportAttributeAccessIssue]
        self._digest = _digest(call.model)
        self._recent: deque[_Entry] = deque(maxlen=lag + 1)
        self._belief: list[Array] | None = None
        self._reading: Reading | None = None
        self._program: Program | None = None

    def __repr__(self) -> str:
        name = getattr(self._call.model, "__name__", "model")
        return f"Stream({name}, method={self.method!r}, count={self.count}, lag={self.lag})"

    def step(self, *values: Any, **named: Any) -> Assimilated:
        """Take in the data of the next step.

        Args:
            *values: the value of the model's one parameter without a value, or, where all have defaults, of the first
                one not given yet. Values have no axis of time and may be any pytree of arrays; NaN means missing.
            **named: values by name of the parameter. Data that are left out are missing; inputs that are not data
                cannot be left out. The first step names all that the stream will ever give.

        Returns:
            The filtering law after this step.

        Raises:
            ArgumentError: values that go to no parameter, or to several; a stream in another precision.
            DataError: other shapes than at the first step, or data that no step may use.
            ModelError: a model that a stream cannot read.
            MethodError: a method that does not fit the model, or free parameters.
            InferenceError: the belief is no longer finite; the stream keeps the one before.
        """
        given = self._given(values, named, "stream.step()")
        reading, program = self._prepared(given)
        rows = reading.rows(given, self.count)
        reading.check(rows, self.count)
        entry = _Entry(self._belief, rows, self.log_evidence)
        belief, found, evidence = self._advanced(reading, program, entry, self.count)
        self._reading, self._program, self._belief = reading, program, belief
        self._recent.append(entry)
        self.count, self.log_evidence, self.latest = self.count + 1, evidence, found
        return found

    def late(self, lag: int, /, *values: Any, **named: Any) -> Assimilated:
        """Take in data of an earlier step, and go through the steps since then again.

        Entries that were missing are filled, and entries that were there are replaced; NaN leaves them as they are.
        The belief becomes, to the bit, that of a stream which had the data in time.

        Args:
            lag: how many steps ago: 1 for the step before the latest, 0 for the latest.
            *values: as in `step`.
            **named: as in `step`; what is left out stays as it was.

        Returns:
            The filtering law after the latest step.

        Raises:
            ArgumentError: a lag above that of the stream or the number of its steps, or no data.
        """
        kept = len(self._recent)
        if isinstance(lag, bool) or not isinstance(lag, int | np.integer) or not 0 <= lag < kept:
            reason = f"has taken in {self.count} steps" if lag in range(self.lag + 1) else f"keeps lag={self.lag}"
            raise ArgumentError(
                f"late data of {lag!r} steps ago cannot be used: the stream {reason}. Begin it with "
                "pf.online(..., lag=...) of as many steps as data may be late; 1 is the step before the latest."
            )
        given = self._given(values, named, "stream.late(lag)")
        if not given:
            raise ArgumentError(f"late data of {lag} steps ago are missing. Write stream.late({lag}, y).")
        reading, program = self._prepared(given)
        entries, place = list(self._recent), kept - 1 - int(lag)
        first = self.count - kept
        rows = reading.late(entries[place].rows, given, first + place)
        reading.check(rows, first + place)
        belief, evidence = entries[place].belief, entries[place].evidence
        found = self.latest
        for i in range(place, kept):
            entries[i] = _Entry(belief, rows if i == place else entries[i].rows, evidence)
            belief, found, evidence = self._advanced(reading, program, entries[i], first + i)
        assert found is not None
        self._recent = deque(entries, maxlen=self.lag + 1)
        self._belief, self.log_evidence, self.latest = belief, evidence, found
        return found

    def _given(self, values: tuple[Any, ...], named: dict[str, Any], where: str) -> dict[str, Any]:
        if jax.config.jax_enable_x64 != self._wide:  # type: ignore[reportAttributeAccessIssue]
            raise ArgumentError(
                f"the stream began in {'float64' if self._wide else 'float32'}, and JAX is now in the other precision. "
                "Set JAX_ENABLE_X64 once, before the stream begins."
            )
        if self._reading is not None and not named and len(values) == 1 and len(self._reading.fields) == 1:
            return {self._reading.fields[0].name: values[0]}
        given = self._call.named(values, named, where)
        if not given and self._reading is None:
            raise ArgumentError(
                "the first step needs data, from which the stream learns their shape: stream.step(y). Give NaN in "
                "their shape where nothing was measured."
            )
        return given

    def _prepared(self, given: dict[str, Any]) -> tuple[Reading, Program]:
        if self._reading is not None and self._program is not None:
            return self._reading, self._program
        reading = Reading(self._call, self.method, given)
        return reading, Program(self.method, reading.space, self._key)

    def _advanced(
        self, reading: Reading, program: Program, entry: _Entry, count: int
    ) -> tuple[list[Array], Assimilated, float]:
        arrays, belief, extra = reading.arrays(entry.rows), entry.belief, 0.0
        if belief is None:
            belief, extra = program.begin(arrays)
        after, moments, value, finite = program.advance(arrays, belief, count)
        value += extra
        if not (finite and np.isfinite(value)):
            kept = f"keeps its belief after step {count - 1}" if count else "has not begun"
            raise InferenceError(
                f"{type(self.method).__name__}: step {count} gave a log likelihood of {value:.6g} and a state that is "
                f"{'finite' if finite else 'not finite'}: it has diverged, or its data are impossible. The stream "
                f"{kept}, so that you can go on: give the step again with other data, or call stream.step() for a "
                "step without data.",
                Outcome.NONFINITE,
            )
        summary = {name: float(v) for name, v in moments["summary"].items()}
        found = Assimilated(moments["mean"], moments["sd"], value, count, summary)
        return after, found, entry.evidence + value

    def stored(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """See `Stored.stored`."""
        reading = self._reading
        call = (_numpy(self._call.args), _numpy(self._call.kwargs))
        rows = None
        if reading is not None:
            rows = _numpy(unflatten(reading.fields, tuple(r[0] for r in self._recent[-1].rows)))
        try:
            encoded = [_files._encode(part, arrays) for part in (call, rows)]
        except ArgumentError as error:
            raise ArgumentError(
                f"a stream is saved with its arguments, which must be numbers, text, arrays, or plain lists, tuples "
                f"and dicts of them: {error} Bind others to the model, functools.partial(model, name=...)."
            ) from error
        recent = [(list(e.belief) if e.belief is not None else None, list(e.rows), e.evidence) for e in self._recent]
        return {
            "model": self._digest,
            "precision": _precision(),
            "method": _files._encode(self.method, arrays),
            "call": encoded[0],
            "row": encoded[1],
            "key": _files._encode(self._key, arrays),
            "belief": _files._encode(self._belief, arrays),
            "recent": _files._encode(recent, arrays),
            "count": self.count,
            "log_evidence": self.log_evidence,
            "lag": self.lag,
        }

    @classmethod
    def restored(cls, value: dict[str, Any], arrays: list[np.ndarray], model: Any) -> "Stream":
        """See `Stored.restored`."""
        if value["model"] != _digest(model):
            raise CheckpointError(
                "the file holds a stream of another model: its code, or what it takes from outside (globals, closures, "
                "bound arguments), differs. Pass the model that the stream began with."
            )
        if value["precision"] != _precision():
            raise CheckpointError(
                f"the stream was saved in {value['precision']}, and JAX is in {_precision()}. Set JAX_ENABLE_X64 as it "
                "was."
            )
        parts = {n: _files._decode(value[n], arrays) for n in ("method", "call", "row", "key", "belief", "recent")}
        args, kwargs = parts["call"]
        key = (np.asarray(parts["key"][0]), parts["key"][1])
        stream = cls(Call(model, args, kwargs), parts["method"], key, int(value["lag"]))
        stream.count, stream.log_evidence = int(value["count"]), float(value["log_evidence"])
        if stream.count:
            given = jax.tree.map(np.asarray, parts["row"])
            reading, program = stream._prepared(given)
            stream._reading, stream._program, stream._belief = reading, program, parts["belief"]
            for belief, rows, evidence in parts["recent"]:
                stream._recent.append(_Entry(belief, tuple(map(np.asarray, rows)), evidence))
            _check_belief(program, stream._belief)
        return stream


def _check_belief(program: Program, belief: list[Array] | None) -> None:
    has, needs = ([(tuple(v.shape), str(v.dtype)) for v in part or ()] for part in (belief, program.belief))
    if has != needs:
        raise CheckpointError(
            "the stream was saved by another version of pushforward, whose belief has other parts. Begin it anew, or "
            "continue it with the version that wrote it."
        )


def _numpy(tree: Any) -> Any:
    """The same with arrays for what pandas and xarray hold."""
    return jax.tree.map(_plain, tree, is_leaf=_is_labelled)


def _precision() -> str:
    return jnp.result_type(float).name


def _digest(model: Model) -> str:
    text = stable_text(fingerprint(model))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
