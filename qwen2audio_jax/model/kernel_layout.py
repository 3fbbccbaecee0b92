"""Kernel layout: kernels turned to [out, in] where the processor's products read them faster so.

The matrix units of CPUs (AMX) take a bfloat16 kernel in that order; in the checkpoint's, [in, out], each product lays
it out anew. Decode steps on processors with AVX2 alone are 1.2 to 1.4 times as fast so; those with AVX-512 products of
bfloat16 read the checkpoint's order faster, and other ones with AVX-512 have not been measured and keep it. A kernel
that is turned has a name of its own, by which `bind` knows it; the checkpoint does not change.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

KERNEL, TURNED = "kernel", "turned_kernel"
CPU_INFO = Path("/proc/cpuinfo")


def prefers_turned(mesh: Mesh, *, dtype: str) -> bool:
    """Whether the mesh's devices read kernels of this dtype faster as [out, in]."""
    if dtype != "bfloat16" or mesh.devices.flat[0].platform != "cpu":
        return False
    return "amx_bf16" in _processor_flags(CPU_INFO) or has_avx2_alone()


def has_avx2_alone() -> bool:
    """Whether the processor has AVX2 and no AVX-512; false where `CPU_INFO` is not there to say."""
    flags = _processor_flags(CPU_INFO)
    return "avx2" in flags and "avx512f" not in flags


@cache
def _processor_flags(info: Path) -> frozenset[str]:
    if not info.exists():
        return frozenset()
    line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())


def turned_name(parameter: str) -> str:
    """The path of a kernel that is turned ("decoder/lm_head/turned_kernel"), by its own."""
    return f"{parameter.rpartition('/')[0]}/{TURNED}"


def turn_in_place(params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights with the float kernels of linear maps turned, each old one freed before the next is turned."""
    flat = flatten_dict(dict(params), sep="/")
    for name in list(flat):
        kernel = flat[name]
        if name.endswith(f"/{KERNEL}") and kernel.ndim == 2 and jnp.issubdtype(kernel.dtype, jnp.floating):
            flat[turned_name(name)] = _turn_and_free(flat.pop(name))
    return unflatten_dict(flat, sep="/")


def _turn_and_free(kernel: jax.Array) -> jax.Array:
    sharding = kernel.sharding
    if isinstance(sharding, NamedSharding):
        inputs, outputs = (*sharding.spec, None, None)[:2]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(outputs, inputs))
    turned = jax.block_until_ready(jax.jit(jnp.transpose, out_shardings=sharding)(kernel))
    kernel.delete()
    return turned
