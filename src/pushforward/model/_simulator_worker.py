"""What a worker of a pool runs for one call of a simulator: the call itself, or a child process with a time limit."""

import atexit
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pushforward._errors import MethodError
from pushforward.model import _simulator_child
from pushforward.model._simulator_child import Answer, answer, described

_START_SECONDS = 300.0
"""A child may take this long to start and to import what the function needs."""
_KEPT = 8
_loaded: "OrderedDict[str, Function]" = OrderedDict()
_idle: "list[_Child]" = []
_lock = threading.Lock()


class Function:
    """A simulator's function on its way to a worker: pools of this process call it, others pickle it.

    With cloudpickle it is pickled by value where it has no module that others could import.

    Args:
        fn: the function.
        payload: its pickle, where it is known.
        name: for messages.
    """

    def __init__(self, fn: Callable, payload: bytes | None = None, name: str = ""):
        self.fn, self._payload, self.name = fn, payload, name
        self._digest = ""

    def payload(self) -> bytes:
        """The pickle of the function.

        Raises:
            MethodError: it has none.
        """
        if self._payload is None:
            self._payload = _pickled(self.fn, self.name)
        return self._payload

    def digest(self) -> str:
        """A name for the contents of the pickle."""
        if not self._digest:
            self._digest = hashlib.blake2b(self.payload(), digest_size=16).hexdigest()
        return self._digest

    def __reduce__(self) -> tuple:
        return load, (self.payload(), self.digest(), self.name)


def load(payload: bytes, digest: str, name: str) -> Function:
    """The function of a pickle; one that cannot be loaded says so when called, because raising here ends a worker."""
    if digest in _loaded:
        return _loaded[digest]
    try:
        fn = pickle.loads(payload)
    except BaseException as error:
        text = f"a worker could not load the function: {described(error)}"

        def fn(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(text)

    function = _loaded[digest] = Function(fn, payload, name)
    if len(_loaded) > _KEPT:
        _loaded.popitem(last=False)
    return function


def _pickled(fn: Callable, name: str) -> bytes:
    try:
        import cloudpickle as pickler
    except ImportError:
        pickler = pickle
    try:
        return pickler.dumps(fn)
    except Exception as error:
        way = (
            "" if pickler is not pickle else " Installing cloudpickle lets functions of notebooks and lambdas be sent."
        )
        raise MethodError(
            f"the simulator's function '{name}' cannot be sent to another process: {described(error)}. Define it in a "
            "module, and open files, connections and locks inside it; or use a ThreadPoolExecutor without timeout=."
            + way
        ) from error


def call(function: Function, arguments: tuple[tuple, dict], timeout: float | None) -> Answer:
    """One call of a simulator with one member's arguments."""
    if timeout is None:
        return answer(function.fn, arguments)
    child = None
    try:
        child = _take()
        said = child.ask(function, arguments, timeout)
    except TimeoutError as error:
        said = "timeout", str(error)
    except MethodError as error:  # it could be sent when the model was traced
        said = "worker", str(error)
    except (OSError, EOFError, pickle.UnpicklingError):
        code = "" if child is None else f" with code {child.end()}"
        said = "worker", f"the child process of the call ended{code}: it was killed, or the function ended it"
    if child is not None:
        _give(child)
    return said


class _Child:
    """A child process that runs calls one after another, and is killed when one takes too long."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-P", _simulator_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # what the function starts dies with it
        )
        self._digest = ""
        self._late = False

    def ask(self, function: Function, arguments: tuple, timeout: float) -> Answer:
        """The answer to one call, with the function loaded first where it is new, on time of its own."""
        if self._digest != function.digest():
            said = self._exchange(("load", function.payload(), sys.path), _START_SECONDS)
            if said[0] != "value":
                return said
            self._digest = function.digest()
        return self._exchange(("call", pickle.dumps(arguments), timeout), timeout)

    def _exchange(self, message: tuple, limit: float) -> Answer:
        sending, receiving = self._process.stdin, self._process.stdout
        assert sending is not None
        assert receiving is not None
        timer = threading.Timer(limit, self._stop)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump(message, sending, protocol=pickle.HIGHEST_PROTOCOL)
            sending.flush()
            return pickle.load(receiving)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            if self._late:
                raise TimeoutError(f"not done after {limit:g} s") from error
            raise
        finally:
            timer.cancel()
            timer.join()

    def _stop(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        if self._process.poll() is not None:
            return
        if hasattr(os, "killpg"):
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    @property
    def usable(self) -> bool:
        return not self._late and self._process.poll() is None

    def end(self) -> int:
        """Kill it if it lives, and return its exit code."""
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass
        if self._late or not self._gone():
            self._kill()
        return self._process.wait()

    def _gone(self) -> bool:
        """Whether it ends by itself, now that its streams are closed."""
        try:
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        return True


def _take() -> _Child:
    """A child without work, or a new one."""
    while True:
        with _lock:
            child = _idle.pop() if _idle else None
        if child is None:
            return _Child()
        if child.usable:
            return child
        child.end()


def _give(child: _Child) -> None:
    if not child.usable:
        child.end()
        return
    with _lock:
        _idle.append(child)


def end_children() -> None:
    """End all children without work."""
    with _lock:
        children, _idle[:] = list(_idle), []
    for child in children:
        child.end()


atexit.register(end_children)
