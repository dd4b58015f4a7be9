"""Functions that stand for simulators, in a module that their processes load quickly."""

import hashlib
import os
import subprocess
import sys
import time

import numpy as np


def linear(slope, offset, x):
    """A straight line; slope and offset are numbers, x is shared."""
    return slope * x + offset


def process_of(value):
    """The process that ran it; `value` gives the shape."""
    return np.full(np.shape(value), float(os.getpid()))


def troubled(code):
    """Fails in the way that its argument says; 0 is well."""
    match int(code):
        case 1:
            raise ValueError("the solver did not converge")
        case 2:
            return np.array([1.0, np.nan])
        case 3:
            return np.zeros(3)
        case 4:
            time.sleep(60)
        case 5:
            os._exit(7)
        case 6:
            sys.exit("licence not found")
        case 7:
            return [1.0, [2.0, 3.0]]
        case 8:
            raise Unsendable("a", "b")
        case 9:
            return np.array([1.0, 1e300])
        case 10:
            print("chatter on stdout", flush=True)
    return np.array([1.0, 2.0])


class Unsendable(Exception):
    """An exception that a pickle does not bring back."""

    def __init__(self, first, second):
        super().__init__(first)


def with_grandchild(value):
    """Starts a command that outlasts the limit, and leaves its process id in a file."""
    command = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.environ["PUSHFORWARD_TEST_FILE"], "a") as file:
        file.write(f"{os.getpid()} {command.pid}\n")
    command.wait()
    return value


def flaky_line(slope, offset, x):
    """`linear`, but 10 % of all inputs raise, 5 % give NaN and 5 % sleep for an hour; which, their digits decide."""
    time.sleep(0.02)
    lot = fate(slope, offset)
    if lot == "exception":
        raise ValueError("the solver did not converge")
    if lot == "timeout":
        time.sleep(3600)
    return np.full(np.shape(x), np.nan) if lot == "nonfinite" else linear(slope, offset, x)


def fate(slope, offset):
    """How `flaky_line` ends for an input: a kind of failure, or "success"."""
    digest = hashlib.blake2b(np.asarray([slope, offset], np.float64).tobytes(), digest_size=8).digest()
    lot = int.from_bytes(digest) / 2**64
    return "exception" if lot < 0.10 else "nonfinite" if lot < 0.15 else "timeout" if lot < 0.20 else "success"


def crash_of_negatives(slope, offset, x):
    """Ends its process where the slope is negative."""
    return troubled(5) if slope < 0 else linear(slope, offset, x)


class _SlowToLoad:
    def __call__(self, value):
        return value

    def __reduce__(self):
        return _loaded_slowly, ()


def _loaded_slowly():
    time.sleep(0.6)
    return slow_to_load


slow_to_load = _SlowToLoad()
