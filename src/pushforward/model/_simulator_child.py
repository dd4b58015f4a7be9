"""The child process in which a simulator's call runs when it has a time limit, and what any call answers.

A running call cannot be stopped from inside its own process, so it runs in one that can be killed. This file is
started by its path, imports nothing but the standard library (a child that is killed must be replaced quickly), and
needs neither `fork` (unsafe beside JAX's threads) nor `multiprocessing` (whose daemons, Dask's workers among them, may
have no children).

Messages are pickles on the standard streams: ("load", function, sys.path), then ("call", arguments, limit).
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

IDLE_SECONDS = 60.0
"""A child without work ends itself after this time."""
_GRACE = 5.0
"""By how much a child outlives its limit where the process that should kill it is gone."""

Answer = tuple[str, Any]
"""("value", array), or the kind of a failure and its text."""


def answer(fn: Callable, arguments: tuple[tuple, dict]) -> Answer:
    """Call a simulator with one member's arguments; what it raises becomes text, which every pool can carry."""
    import numpy as np

    try:
        value = fn(*arguments[0], **arguments[1])
    except BaseException as error:  # Fortran wrappers and command lines end with SystemExit
        return "exception", described(error)
    try:
        array = np.asarray(value)
    except Exception as error:
        return "shape", f"returned {type(value).__name__}, which is no array: {described(error)}"
    if array.dtype.kind not in "biuf":
        return "shape", f"returned {type(value).__name__} of dtype {array.dtype}, which is not real numbers"
    return "value", array


def described(error: BaseException) -> str:
    """Type and text of an exception, one line, cut where it is long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _alarm(seconds: float) -> None:
    """Let the kernel end this process after so many seconds (0: never), even while C code holds it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _serve() -> None:
    # The simulator may print and read: it gets stderr for stdout, and an empty stdin.
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    fn: Callable | None = None
    while True:
        _alarm(IDLE_SECONDS)
        try:
            message = pickle.load(incoming)
        except EOFError:
            return
        _alarm(0.0)
        if message[0] == "load":
            sys.path[:] = message[2]
            try:
                fn, said = pickle.loads(message[1]), ("value", None)
            except BaseException as error:
                said = ("worker", f"a child process could not load the function: {described(error)}")
        else:
            assert fn is not None
            _alarm(message[2] + _GRACE)
            try:
                said = answer(fn, pickle.loads(message[1]))
            except BaseException as error:
                said = ("worker", f"a child process could not load the arguments: {described(error)}")
            _alarm(0.0)
        pickle.dump(said, outgoing, protocol=pickle.HIGHEST_PROTOCOL)
        outgoing.flush()


if __name__ == "__main__":
    _serve()
