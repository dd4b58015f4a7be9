"""Running compiled work: each function is compiled once per shape, timed, shown and checkpointed.

A method receives a `Runner` and calls `runner.call(fn, ...)` for work in one piece, or
`runner.loop(advance, ...)` for long work in chunks. Neither changes the result: bounds of chunks are
traced numbers, so one chunk or twenty give the same draws.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pushforward import _files

_CHUNKS = 25
_COMPILED_SIZE = 256
_compiled: "OrderedDict[Any, Callable]" = OrderedDict()


class Runner:
    """Compiles, times, reports progress and writes checkpoints for one run of a method.

    Attributes:
        mesh: devices that share the leading axis of the work, or None.
        compile_seconds: seconds spent on tracing and compiling so far.
        run_seconds: seconds spent on running so far.
    """

    def __init__(
        self,
        *,
        progress: bool = False,
        checkpoint: Path | None = None,
        identity: str = "",
        mesh: Mesh | None = None,
        label: str = "",
    ):
        self.mesh, self.label = mesh, label
        self.progress, self.checkpoint, self.identity = progress, checkpoint, identity
        self.compile_seconds = self.run_seconds = 0.0

    def call(self, fn: Callable, *args: Any) -> Any:
        """`fn(*args)`, compiled once per shapes and static contents of `args`."""
        compiled, leaves, seconds = _compile(fn, args)
        self.compile_seconds += seconds
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*leaves))
        self.run_seconds += time.perf_counter() - start
        return result

    def loop(
        self,
        advance: Callable,
        state: Any,
        total: int,
        *args: Any,
        every: int | None = None,
        feed: Callable[[int], Any] | None = None,
    ) -> Any:
        """Run `state = advance(state, start, stop, *args)` over `total` steps in chunks.

        Args:
            advance: pure function that carries the state from step `start` to step `stop`.
            state: pytree of arrays.
            total: number of steps.
            args: further arguments of `advance`.
            every: steps between two checkpoints.
            feed: what `advance` is given of each step before `args`; steps are then run one by one.
        """
        start, state = self.resume(state)
        chunks = _CHUNKS if self.progress or self.checkpoint else 1
        size = every if every and self.checkpoint else max(1, -(-total // chunks))
        size = 1 if feed else size
        with progress_bar(self.progress, self.label, start, total) as bar:
            while start < total:
                stop = min(start + size, total)
                fed = (feed(start),) if feed else ()
                state = self.call(advance, state, jnp.asarray(start), jnp.asarray(stop), *fed, *args)
                self.save(stop, state)
                bar.update(stop - start)
                start = stop
        return state

    def resume(self, state: Any) -> tuple[int, Any]:
        """The step and the state that the checkpoint holds, or 0 and the state given."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, state
        return _files.read_checkpoint(self.checkpoint, self.identity, state)

    def save(self, step: int, state: Any) -> None:
        """Write the state after a step to the checkpoint, if there is one."""
        if self.checkpoint is not None:
            _files.write_checkpoint(self.checkpoint, self.identity, step, state)


def _compile(fn: Callable, args: tuple) -> tuple[Callable, list, float]:
    dynamic, static = eqx.partition(args, eqx.is_array)
    leaves, tree = jax.tree.flatten(dynamic)
    fixed, fixed_tree = jax.tree.flatten(static)
    shapes = tuple((x.shape, x.dtype, getattr(x, "weak_type", False), getattr(x, "sharding", None)) for x in leaves)
    cache_key = (fn, tree, fixed_tree, tuple(fixed), shapes, jnp.result_type(float))
    if cache_key in _compiled:
        _compiled.move_to_end(cache_key)
        return _compiled[cache_key], leaves, 0.0
    start = time.perf_counter()

    def flat(*values: jax.Array) -> Any:
        return fn(*eqx.combine(jax.tree.unflatten(tree, values), static))

    compiled = jax.jit(flat).lower(*leaves).compile()
    _compiled[cache_key] = compiled
    if len(_compiled) > _COMPILED_SIZE:
        _compiled.popitem(last=False)
    return compiled, leaves, time.perf_counter() - start


class _Silent:
    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, steps: int) -> None:
        return None


def progress_bar(progress: bool, label: str, start: int, total: int) -> Any:
    if not progress:
        return _Silent()
    from tqdm import tqdm

    return tqdm(initial=start, total=total, desc=label, leave=True, mininterval=0.3)
