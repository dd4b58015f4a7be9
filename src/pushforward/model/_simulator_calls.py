"""Running one batch of a simulator's calls: members to a pool and back, failures to rows of NaN and to counts."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from pushforward._errors import MethodError
from pushforward.model._simulator_child import Answer, described
from pushforward.model._simulator_worker import Function, call

KINDS: tuple[str, ...] = ("exception", "timeout", "nonfinite", "shape", "worker")
"""Kinds of failures; "worker" is a process or pool that ended under a call."""
_MESSAGES = 3


class Calls:
    """The changing part of a simulator: its pool, counts and messages. All methods may be called from any thread.

    It has slots and no dictionary, so that the fingerprint of a model counts it by identity: compiled programs hold it.
    """

    __slots__ = (
        "__weakref__",
        "batches",
        "counts",
        "dead",
        "done",
        "executor",
        "fn",
        "lock",
        "messages",
        "name",
        "timeout",
    )

    def __init__(self, fn: Callable, name: str, executor: Any, timeout: float | None):
        self.fn, self.name, self.executor, self.timeout = fn, name, executor, timeout
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero and forget messages."""
        with self.lock:
            self.done = self.batches = 0
            self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)
            self.messages: dict[str, list[str]] = {kind: [] for kind in KINDS}
            self.dead = ""

    def check(self) -> None:
        """See that the pool takes work, and that the function can be sent where it has to be.

        Raises:
            MethodError: what is wrong and what to do.
        """
        if self.timeout is not None or not isinstance(self.executor, ThreadPoolExecutor | None):
            Function(self.fn, name=self.name).payload()
        if self.executor is None:
            return
        try:
            self.executor.submit(int).cancel()
        except Exception as error:
            raise MethodError(self._dead(error)) from error
        with self.lock:
            self.dead = ""

    def rows(self, arguments: Any, levels: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Outputs of a whole batch, (*batch, *shape); NaN for members that failed.

        Args:
            arguments: pytree (args, kwargs) of numpy arrays, each with `levels` leading axes of the batch, of length 1
                where the argument is the same for all.
            levels: number of leading axes.
            shape: of one output.
            dtype: of the result.
        """
        batch = np.broadcast_shapes(*(leaf.shape[:levels] for leaf in jax.tree.leaves(arguments)))
        count = math.prod(batch)
        result = np.full((count, *shape), np.nan, dtype)
        answers = self._answers(lambda i: _member(arguments, np.unravel_index(i, batch) if batch else ()), count)
        for i, (kind, value) in enumerate(answers):
            kind, value = _checked(value, shape, dtype) if kind == "value" else (kind, value)
            if kind == "value":
                result[i] = value
            else:
                self._failed(kind, value)
        with self.lock:
            self.done, self.batches = self.done + count, self.batches + 1
        return result.reshape((*batch, *shape))

    def _answers(self, member: Callable[[int], tuple], count: int) -> Iterator[Answer]:
        function = Function(self.fn, name=self.name)
        if self.executor is None:
            for i in range(count):
                said = call(function, member(i), self.timeout)
                yield call(function, member(i), self.timeout) if said[0] == "worker" else said
            return
        answers = self._submitted(function, member, range(count))
        # A worker that ends takes with it what it was doing, and in a process pool what all others were doing.
        again = [i for i, said in answers.items() if said[0] == "worker"]
        if again:
            answers |= self._submitted(function, member, again)
        yield from (answers[i] for i in range(count))

    def _submitted(self, function: Function, member: Callable[[int], tuple], which: Any) -> dict[int, Answer]:
        """Answers of a pool by member."""
        futures, answers = {}, {}
        for i in which:
            try:
                futures[i] = self.executor.submit(call, function, member(i), self.timeout)
            except Exception as error:
                with self.lock:
                    self.dead = self._dead(error)
                answers[i] = "worker", described(error)
        for i, future in futures.items():
            try:
                answers[i] = future.result()
            except BaseException as error:  # of the pool: those of the function come back as text
                answers[i] = "worker", described(error)
        return answers

    def _failed(self, kind: str, text: str) -> None:
        with self.lock:
            self.counts[kind] += 1
            if len(self.messages[kind]) < _MESSAGES:
                self.messages[kind].append(text)

    def _dead(self, error: Exception) -> str:
        return (
            f"the executor of the simulator '{self.name}' takes no more work ({described(error)}). It was shut "
            "down, or a worker ended under a call (out of memory, a crash of the function), which ends a process pool. "
            "Make a new executor and a new pf.simulator with it, and keep the executor open while infer runs. Where "
            "the function may crash, give timeout=: each call then has a child process, and a crash costs one member."
        )


def _member(arguments: Any, index: tuple) -> tuple[tuple, dict]:
    """One member's own copy of the arguments: compiled codes write into what they are given."""

    def one(leaf: np.ndarray) -> np.ndarray:
        return np.array(leaf[tuple(0 if n == 1 else i for i, n in zip(index, leaf.shape, strict=False))])

    return jax.tree.map(one, arguments)


def _checked(value: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> Answer:
    """The value in the wanted dtype, or why it is none."""
    if value.shape != shape:
        return "shape", f"returned shape {value.shape}, where shape={shape} was promised"
    if not np.isfinite(value).all():
        return "nonfinite", f"returned {int((~np.isfinite(value)).sum())} of {value.size} numbers as NaN or infinity"
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast.astype(float)).all():
        return "nonfinite", f"returned numbers up to {np.abs(value).max():.3g}, beyond {dtype}"
    return "value", cast
