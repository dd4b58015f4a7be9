"""The only file that mentions devices and sharding.

Chains, members, particles and draws are one leading axis. With a mesh that axis is split over all of
its devices by JAX's SPMD engine; each device runs its own share, so chains wait for no other device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pushforward._errors import ArgumentError


def check_mesh(mesh: Any) -> Mesh | None:
    """Return the mesh, or the mesh of a sequence of devices."""
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    try:
        devices = np.asarray(mesh)
        if devices.size and all(isinstance(d, jax.Device) for d in devices.flat):
            return Mesh(devices.reshape(-1), ("members",))
    except (TypeError, ValueError):
        pass
    raise ArgumentError(
        f"mesh= takes a jax.sharding.Mesh or a list of devices such as jax.devices(); got {type(mesh).__name__}."
    )


def vmap(fn: Callable, mesh: Mesh | None) -> Callable:
    """`jax.vmap` over the leading axis of all arguments, split over the mesh's devices if there is one.

    What `fn` closes over is copied to every device. A leading axis that the number of devices does
    not divide is padded with copies of its last entry, which are dropped again.
    """
    if mesh is None:
        return jax.vmap(fn)
    axes, size = PartitionSpec(mesh.axis_names), mesh.size
    split = jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)

    def mapped(*args: Any) -> Any:
        length = jax.tree.leaves(args)[0].shape[0]
        padding = -length % size

        def pad(x: jax.Array) -> jax.Array:
            return jnp.concatenate([x, jnp.repeat(x[-1:], padding, 0)]) if padding else x

        result = split(*jax.tree.map(pad, args))
        return jax.tree.map(lambda x: x[:length], result) if padding else result

    return mapped


def device_count(mesh: Mesh | None) -> int:
    """Number of devices that share the work."""
    return 1 if mesh is None else mesh.size


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Copy arrays to every device of the mesh, or put a sharded result back on one device."""
    if mesh is None:
        return tree
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, PartitionSpec()))
