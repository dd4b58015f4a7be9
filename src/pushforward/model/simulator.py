"""`simulator`: a forward model that is no JAX program, callable inside a NumPyro model.

A call is a primitive of JAX. Under `vmap` it stays one call with more leading axes, so a whole ensemble reaches the
host at once; it has no derivative, and says so while the program is traced. Programs of models are searched for it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.interpreters import ad, batching, mlir

from pushforward._errors import ArgumentError, MethodError
from pushforward._types import Array
from pushforward.model._simulator_calls import KINDS, Calls
from pushforward.model.inverse import InverseProblem

WITHOUT_GRADIENT = 'method="eki" (EKI), "pcn" (PreconditionedCrankNicolson) or "tempered_smc" (TemperedSMC)'


class Simulator:
    """What `pf.simulator` returns: a function of arrays, with counts of what went wrong.

    Attributes:
        name: of the function.
        shape: of one output.
        dtype: of the output, None for that of JAX's floats.
        timeout: seconds for one call, or None.
        made: whether there is any simulator, without which no model has to be searched for one.
    """

    made: ClassVar[bool] = False

    def __init__(self, fn: Callable, shape: tuple[int, ...], dtype: Any, executor: Any, timeout: float | None):
        # A compiled program belongs to one `Calls`, known by identity; name and code name the function in checkpoints.
        self.name, self._code = _name(fn), getattr(fn, "__code__", None)
        self.shape, self.dtype, self.timeout = shape, dtype, timeout
        self._calls = Calls(fn, self.name, executor, timeout)
        Simulator.made = True

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The output for one member; NaN where the call fails.

        Args:
            *args: arrays, or pytrees of arrays.
            **kwargs: the same by name.

        Raises:
            ArgumentError: an argument is no array.
            MethodError: the executor takes no work, or the function cannot be sent to its processes.
        """
        dtype = jnp.result_type(float) if self.dtype is None else self.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ArgumentError(
                f"simulator(dtype={dtype}) needs JAX in that precision: set JAX_ENABLE_X64=1, or leave dtype out."
            )
        paths, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [self._array(path, leaf) for path, leaf in paths]
        self._calls.check()
        return _call.bind(*leaves, simulator=self, tree=tree, levels=0, dtype=dtype)

    def _array(self, path: tuple, leaf: Any) -> Array:
        try:
            array = jnp.asarray(leaf)
            if any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
                return array
        except TypeError:
            pass
        raise ArgumentError(
            f"the simulator '{self.name}' takes arrays of numbers; argument {jax.tree_util.keystr(path)} is "
            f"{type(leaf).__name__}. Bind others beforehand: pf.simulator(functools.partial(fn, option=...), shape)."
        )

    def __repr__(self) -> str:
        return f"simulator({self.name}, {self.shape})"

    @property
    def calls(self) -> int:
        """Members run so far."""
        return self._calls.done

    @property
    def batches(self) -> int:
        """Calls from compiled programs so far; each brings a whole batch of members."""
        return self._calls.batches

    @property
    def failures(self) -> dict[str, int]:
        """Failed members by kind: "exception", "timeout", "nonfinite", "shape", "worker"."""
        return dict(self._calls.counts)

    @property
    def messages(self) -> dict[str, list[str]]:
        """The first few texts by kind of failure."""
        return {kind: list(texts) for kind, texts in self._calls.messages.items() if texts}

    def reset(self) -> None:
        """Set calls and failures to zero."""
        self._calls.reset()


def simulator(
    fn: Callable, shape: int | tuple[int, ...], *, dtype: Any = None, executor: Any = None, timeout: float | None = None
) -> Simulator:
    """Make a Python function callable inside a NumPyro model: a Fortran code, a command, a service, a PDE solver.

    The function gets numpy arrays of one member and returns numbers of the given shape. Under `vmap`, as in all methods
    here, one call brings the whole batch, and its members run at the same time on the executor. Runs may be repeated or
    left out (``log_likelihood`` of the result runs the model once more for each draw), so the function must depend on
    its arguments alone. It has no gradient: use EKI, PreconditionedCrankNicolson (pcn) or TemperedSMC.

    What goes wrong costs one member, not the run: an exception, a wrong shape, NaN or infinity, a timeout or a worker
    that ended twice makes that member's output NaN, which ensemble methods leave out and samplers reject. Counts are in
    `failures`, the first texts in `messages`, the number of calls in `calls`; `reset()` sets them to zero.

    Args:
        fn: function of one member's arguments. In this process it must not call JAX, which waits for it.
        shape: of what it returns.
        dtype: of the output, a floating type; that of JAX's floats by default.
        executor: where members run: any pool with the interface of `concurrent.futures.Executor`, such as
            ``ThreadPoolExecutor()`` for codes that wait or release Python's lock,
            ``ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))`` for others,
            ``mpi4py.futures.MPIPoolExecutor()``, or Dask's ``Client(...).get_executor()``. Its processes need
            `pushforward` installed. By default members run one after another in this process.
        timeout: seconds for one call. Each call then runs in a child process of its worker, which is killed when time
            is up, with all that it started. Start-up of the child does not count.
            Functions of scripts and notebooks need `cloudpickle` for that, which comes with Dask.

    Returns:
        A `Simulator`, called with arrays; it returns an array of `shape`.

    Raises:
        ArgumentError: an argument is wrong.
        MethodError: a process pool that forks this process, which is unsafe beside JAX's threads.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, pushforward as pf
        >>> def decay(rate, times):
        ...     return np.exp(-rate * times)
        >>> forward = pf.simulator(decay, (3,))
        >>> rates, times = jnp.array([0.0, 1.0]), jnp.arange(3.0)
        >>> jax.vmap(forward, (0, None))(rates, times).shape, forward.calls, forward.batches
        ((2, 3), 2, 1)
    """
    if not callable(fn):
        raise ArgumentError(f"simulator(fn, shape): fn is a function of arrays; got {type(fn).__name__}.")
    if isinstance(fn, Simulator):
        raise ArgumentError("simulator(fn, shape): fn is a simulator already; call it as it is.")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise ArgumentError(f"simulator(timeout=...) takes seconds above 0; got {timeout!r}.")
    _check_executor(executor)
    return Simulator(fn, _shape(shape), _dtype(dtype), executor, None if timeout is None else float(timeout))


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0 for n in sizes):
        raise ArgumentError(f"simulator(fn, shape): shape is that of one output, such as (10,) or (); got {shape!r}.")
    return tuple(map(int, sizes))


def _dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError(
            f"simulator(dtype=...) takes a floating type, because NaN marks the members that failed; got {dtype!r}. "
            "Return whole numbers as floats."
        )
    return found


def _check_executor(executor: Any) -> None:
    if executor is None:
        return
    if not callable(getattr(executor, "submit", None)) or isinstance(executor, type):
        raise ArgumentError(
            "simulator(executor=...) takes a pool with a method submit, such as "
            f"concurrent.futures.ThreadPoolExecutor(); got {executor!r}. Dask's client has one: client.get_executor()."
        )
    if type(executor).__module__.startswith("distributed") and hasattr(executor, "get_executor"):
        raise ArgumentError("simulator(executor=client): write executor=client.get_executor().")
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise MethodError(
            "simulator(executor=ProcessPoolExecutor(...)): this pool forks the process, and JAX's threads do not "
            'survive that. Write ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")), and guard your '
            'script by if __name__ == "__main__":.'
        )


def _name(fn: Callable) -> str:
    while hasattr(fn, "func"):  # functools.partial
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__qualname__).rpartition("<locals>.")[2]


# Operands have `levels` leading axes, one for each `vmap` around the call, of length 1 where they are not batched.
_call = jex.Primitive("pushforward_simulator")


def _host(*leaves: Array, simulator: Simulator, tree: Any, levels: int, dtype: Any) -> Array:
    batch = np.broadcast_shapes(*(leaf.shape[:levels] for leaf in leaves))

    def run(*values: Any) -> np.ndarray:
        # Arrays of JAX arrive here on a thread of its own; any computation on them would wait for this very thread.
        arguments = jax.tree.unflatten(tree, [np.asarray(v) for v in values])
        return simulator._calls.rows(arguments, levels, simulator.shape, np.dtype(dtype))

    result = jax.ShapeDtypeStruct((*batch, *simulator.shape), dtype)
    return jax.pure_callback(run, result, *leaves, vmap_method="sequential")


def _abstract(*leaves: Any, simulator: Simulator, tree: Any, levels: int, dtype: Any) -> jax.core.ShapedArray:
    batch = np.broadcast_shapes(*(leaf.shape[:levels] for leaf in leaves))
    return jax.core.ShapedArray((*batch, *simulator.shape), np.dtype(dtype))


def _batched(leaves: Any, axes: Any, *, simulator: Simulator, tree: Any, levels: int, dtype: Any) -> tuple:
    moved = [
        jnp.expand_dims(leaf, 0) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return _call.bind(*moved, simulator=simulator, tree=tree, levels=levels + 1, dtype=dtype), 0


def _derivative(*values: Any, simulator: Simulator, **parameters: Any) -> Any:
    raise MethodError(
        f"the simulator '{simulator.name}' has no gradient: use EKI, PreconditionedCrankNicolson (pcn) or TemperedSMC. "
        "Where its arguments do not matter to the gradient, wrap them in jax.lax.stop_gradient."
    )


_call.def_impl(_host)
_call.def_abstract_eval(_abstract)
mlir.register_lowering(_call, mlir.lower_fun(_host, multiple_results=False))
batching.primitive_batchers[_call] = _batched
ad.primitive_jvps[_call] = _derivative


def simulators(problem: InverseProblem) -> tuple[Simulator, ...]:
    """The simulators that a model calls, at any depth of its program."""
    remembered = problem.structure.remembered
    if not Simulator.made:
        return ()
    if "simulators" not in remembered:
        with numpyro.validation_enabled(False):
            program = jax.make_jaxpr(lambda z: _values(problem, z))(jnp.zeros(problem.dimension))
        remembered["simulators"] = tuple(dict.fromkeys(_found(program.jaxpr)))
    return remembered["simulators"]


def holds_simulator(problem: InverseProblem) -> bool:
    """Whether latent sites reach a simulator, so that the model has no gradient."""
    remembered = problem.structure.remembered
    if "holds_simulator" not in remembered:
        remembered["holds_simulator"] = bool(simulators(problem)) and not _differentiable(problem)
    return remembered["holds_simulator"]


def _differentiable(problem: InverseProblem) -> bool:
    z = jnp.zeros(problem.dimension)
    try:
        jax.eval_shape(lambda z: jax.jvp(lambda z: _values(problem, z), (z,), (z,)), z)
    except MethodError:
        return False
    return True


def _values(problem: InverseProblem, z: Array) -> list[Array]:
    """All numbers that the model computes: values of sites and parameters of their distributions."""
    with numpyro.validation_enabled(False):
        trace = problem._with_laws(z)
    found = jax.tree.leaves([(site["value"], site.get("fn")) for site in trace.values()])
    return [jnp.asarray(v) for v in found if eqx.is_inexact_array(v)]


def _found(program: Any) -> list[Simulator]:
    found = []
    for equation in program.eqns:
        if equation.primitive is _call:
            found.append(equation.params["simulator"])
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                found += _found(getattr(inner, "jaxpr", inner))
    return found


def _is_program(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)


class Watch:
    """Looks after the simulators of a model during one run.

    Args:
        problem: the model.

    Raises:
        MethodError: a pool takes no work.
    """

    def __init__(self, problem: InverseProblem):
        self._before = [(s, s.calls, s.failures) for s in simulators(problem)]
        for simulator, *_ in self._before:
            simulator._calls.check()

    def check(self) -> None:
        """See that all pools still live.

        Raises:
            MethodError: one ended during the run.
        """
        for simulator, *_ in self._before:
            if simulator._calls.dead:
                raise MethodError(simulator._calls.dead)

    def counts(self) -> dict[str, dict[str, int]]:
        """Calls and failures by kind, for each simulator by name."""
        return {
            simulator.name: {"calls": simulator.calls - calls} | {k: simulator.failures[k] - failures[k] for k in KINDS}
            for simulator, calls, failures in self._before
        }

    def notes(self) -> list[str]:
        """What failed, one sentence for each simulator."""
        said = []
        for simulator, calls, failures in self._before:
            new = {k: simulator.failures[k] - failures[k] for k in KINDS if simulator.failures[k] > failures[k]}
            if new:
                kind = max(new, key=lambda k: new[k])
                counts = ", ".join(f"{k} {n}" for k, n in new.items())
                text = (simulator.messages.get(kind) or [""])[0]
                said.append(
                    f"{sum(new.values())} of {simulator.calls - calls} calls of the simulator '{simulator.name}' "
                    f"failed ({counts}), the first {kind}: {text}."
                )
        return said
