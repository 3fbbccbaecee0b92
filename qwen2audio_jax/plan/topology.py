"""Machine topologies by name: chip, shape, and a mesh to compile for."""

import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
from filelock import FileLock
from jax.sharding import AbstractMesh, AxisType, Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.installed import pip_install
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset
from qwen2audio_jax.parallel.sharding import check_mesh, make_mesh
from qwen2audio_jax.plan.chips import CHIPS, Chip, find_chip

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Slices of the chips with a two-dimensional network (v5e, v6e)."""
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
"""Slices of the chips with a three-dimensional one (v4, v5p)."""
MOST_GPUS = 1024

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
"""Environment of a process that compiles for TPUs without having one: jax computes on the CPU, and libtpu does not
query the network about its machine."""


@dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
        name: as `parse_topology` takes it, aliases resolved.
        chip: the type of all its chips.
        chips: number of chips.
        shape: of a TPU slice, such as "2x4"; empty for GPUs.
    """

    name: str
    chip: Chip
    chips: int
    shape: str


def _slices(chip: Chip) -> tuple[str, ...]:
    return DEEP if chip.libtpu_options else FLAT


def parse_topology(text: str) -> Topology:
    """A machine by its name: "v5e:2x4", "v5p:2x2x1", "h100x8", "h100" (one).

    Raises:
        ValueError: no such chip or slice; the message lists those known.
    """
    name, colon, shape = text.strip().lower().partition(":")
    if colon:
        chip = find_chip(name)
        if chip is not None and chip.kind == "tpu" and shape in _slices(chip):
            return Topology(f"{chip.name}:{shape}", chip, math.prod(map(int, shape.split("x"))), shape)
        if chip is not None and chip.kind == "tpu":
            raise ValueError(
                f"--topology {text!r}: {chip.name} comes in the slices {', '.join(_slices(chip))}; name one"
            )
    else:
        match = re.fullmatch(r"(.+?)(?:x([1-9]\d*))?", name)
        chip = find_chip(match[1]) if match else None
        count = int(match[2] or 1) if match else 0
        if chip is not None and chip.kind == "gpu" and count <= MOST_GPUS:
            return Topology(f"{chip.name}x{count}", chip, count, "")
        if chip is not None and chip.kind == "gpu":
            raise ValueError(f"--topology {text!r}: at most {MOST_GPUS} GPUs, as in {chip.name}x{MOST_GPUS}")
    tpus = "; ".join(f"{chip.name}:{{{','.join(_slices(chip))}}}" for chip in CHIPS if chip.kind == "tpu")
    gpus = ", ".join(chip.name for chip in CHIPS if chip.kind == "gpu")
    raise ValueError(f"there is no topology {text!r}; there are the TPU slices {tpus}, and xN of the GPUs {gpus}")


def mesh_sizes(topology: Topology, *, config: Qwen2AudioConfig, data: int = -1, model: int = 0) -> tuple[int, int]:
    """The sizes of the mesh axes (data, model) over all chips.

    Args:
        topology: the machine.
        config: of the model that must divide.
        data: -1 takes what `model` leaves.
        model: 0 takes as many chips as the decoder divides over: one copy of the weights, if possible.

    Raises:
        ValueError: the sizes do not make up the machine, or the decoder does not divide.
    """
    text = config.text_config
    if model == 0:
        common = math.gcd(text.num_attention_heads, text.num_key_value_heads, text.intermediate_size)
        model = math.gcd(topology.chips, common) if data == -1 else max(topology.chips // max(data, 1), 1)
    if data == -1:
        data = max(topology.chips // model, 1)
    if data < 1 or model < 1 or data * model != topology.chips:
        raise ValueError(
            f"a mesh of data={data} x model={model} takes {data * model} chips, but {topology.name} has "
            f"{topology.chips}: choose sizes whose product is that number"
        )
    check_mesh(abstract_mesh(data, model), config=config)
    return data, model


def preset_sizes(topology: Topology, preset: str) -> dict[str, int]:
    """data, model and num_slices of a mesh preset for a machine.

    Raises:
        ValueError: there is no such preset, or it is for another number of chips.
    """
    known = load_mesh_preset(preset)
    if known.devices != topology.chips:
        raise ValueError(
            f"--mesh {preset}: it is for {known.devices} chips, but {topology.name} has {topology.chips}; choose the "
            "sizes yourself, as in --mesh 2x4"
        )
    return {"data": known.data, "model": known.model, "num_slices": known.num_slices}


def check_slices(topology: Topology, num_slices: int, *, model: int) -> None:
    """Refuse slices that a mesh cannot have; see `sharding.make_mesh`.

    Raises:
        ValueError: several TPU slices, or parts that are not equal or split a `model` group.
    """
    if num_slices != 1 and topology.chip.kind == "tpu":
        raise ValueError(
            f"--mesh with num_slices={num_slices}: a plan compiles for one TPU slice; plan for one of "
            "them, each takes its share of the rows"
        )
    if num_slices < 1 or topology.chips % num_slices or topology.chips // num_slices % model:
        raise ValueError(
            f"--mesh with num_slices={num_slices}: the {topology.chips} chips of {topology.name} do not fall into "
            f"so many equal parts that each hold whole groups of model={model}"
        )


def abstract_mesh(data: int, model: int) -> Mesh:
    """A mesh without devices: enough to know how arrays are split."""
    return cast(Mesh, AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)))


def check_compiler() -> None:
    """Refuse a process that cannot compile for TPUs.

    Raises:
        ValueError: libtpu is missing, or jax was not started for the CPU.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning for TPUs compiles with libtpu (x86-64 Linux), which is not installed; install it with: "
            + pip_install("plan")
        )
    config: Any = jax.config
    if config.jax_platforms != "cpu" or not os.environ.get("TPU_SKIP_MDS_QUERY"):
        wanted = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        raise ValueError(
            f"planning for TPUs needs a process of its own that was started with {wanted} (in Python: set both in "
            "os.environ before jax is imported); `qwen2audio plan` does so"
        )


def compile_devices(topology: Topology) -> Sequence[Any]:
    """The chips of a TPU slice, to compile for; one device a chip, and nothing that could run.

    libtpu aborts a second process that loads it, so the first keeps a lock for as long as it lives, and others wait.

    Raises:
        ValueError: see `check_compiler`; or a process that takes no such lock has libtpu.
    """
    check_compiler()
    from jax.experimental import topologies

    _LOCK.acquire()
    options: dict[str, Any] = dict(topology.chip.libtpu_options)
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.chip.libtpu}:{topology.shape}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise ValueError(
            "libtpu is held by another process, and only one can use it at a time: wait for it or end it; if there is "
            "none, one that was killed has left /tmp/libtpu_lockfile, which can be removed"
        ) from error


_LOCK = FileLock(Path(tempfile.gettempdir()) / "qwen2audio_jax_libtpu.lock")


def compile_mesh(topology: Topology, *, data: int, model: int) -> Mesh:
    """The mesh of `compile_devices`; errors as there."""
    return make_mesh(data=data, model=model, devices=compile_devices(topology))
