"""The model of a training run: its weights on the mesh, trained ones separate from frozen ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qwen2audio_jax.checkpoint.reader import read_manifest, restore_params
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lora import init_adapter, lora_axes, lora_specs
from qwen2audio_jax.model.qwen2_audio import init_params, parameter_axes, sharded_specs
from qwen2audio_jax.parallel.sharding import check_mesh, make_mesh
from qwen2audio_jax.source import load_config
from qwen2audio_jax.train import parts
from qwen2audio_jax.train.objective import REFERENCE, make_objective
from qwen2audio_jax.train.settings import MachineSettings, TrainSettings
from qwen2audio_jax.train.state import weight_shardings
from qwen2audio_jax.train.step import SumsOf


@dataclass(frozen=True)
class TrainedModel:
    """The model of a training run.

    Attributes:
        config: with the compute dtype of the run.
        stored_dtype: of the checkpoint that the run started from, in which its result is stored.
        mesh: the devices.
        weights: the trained weights before the first step: some of the weights, or an adapter ([lora]).
        frozen: the frozen weights, in the compute dtype; see `make_objective`.
        shardings: of `weights`.
        sums_of: the objective.
        identity: values that identify these starting weights.
        checkpoint: the Orbax checkpoint that they were read from; None for randomly initialised weights.
    """

    config: Qwen2AudioConfig
    stored_dtype: str
    mesh: Mesh
    weights: dict[str, Any]
    frozen: dict[str, Any]
    shardings: Any
    sums_of: SumsOf
    identity: str
    checkpoint: Path | None


def training_mesh(machine: MachineSettings) -> Mesh:
    """The mesh of a run: all devices, or the first ones that the settings ask for.

    Raises:
        ValueError: there are fewer; or there are several processes and some devices would be left out.
    """
    devices = jax.devices()
    if machine.data > 0 and jax.process_count() == 1:
        devices = devices[: machine.data * machine.model]
    return make_mesh(data=machine.data, model=machine.model, devices=devices)


def load_model(settings: TrainSettings) -> TrainedModel:
    """Load or initialise the weights that a run starts from.

    Raises:
        ValueError: no such checkpoint, a mesh that the model does not divide over, or parts that it does not have.
    """
    machine = settings.machine
    mesh = training_mesh(machine)
    if settings.from_scratch:
        stored, path = Qwen2AudioConfig.from_pretrained(settings.model), None
        identity = f"drawn with seed {settings.seed}"
    else:
        from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint

        found, stored = load_config(settings.model, dtype="auto", revision=None, cache_dir=None)
        path = local_checkpoint(found)  # the export at the end reads the frozen weights again
        identity = str(read_manifest(path).get("sha256", path.name))
    check_mesh(mesh, config=stored)
    config = replace(stored, dtype=machine.dtype)
    if settings.lora is not None:
        lora_specs(config, settings.lora)  # refuses invalid adapter settings before weights are read
    specs = _specs(config, mesh=mesh, settings=settings)
    params = _fresh(stored, specs, seed=settings.seed) if path is None else restore_params(path, specs=specs)
    if settings.lora is not None:
        weights, frozen = _fresh_adapter(config, mesh=mesh, settings=settings), params
    else:
        weights, frozen = parts.split(params, parts=settings.train)
        if settings.objective.kind == "dpo":
            frozen |= {REFERENCE: _copied(weights, dtype=jnp.dtype(machine.dtype))}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
    sums_of = make_objective(settings, config=config)
    return TrainedModel(config, stored.dtype, mesh, weights, frozen, shardings, sums_of, identity, path)


def abstract_model(
    config: Qwen2AudioConfig, *, mesh: Mesh, settings: TrainSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, frozen) of a `TrainedModel` with these settings, as sharded shapes without values.

    Args:
        config: with the compute dtype.
        mesh: the devices, possibly only a topology to compile for.
        settings: of the run.

    Raises:
        ValueError: parts that the model does not have, or invalid adapter settings.
    """
    specs = _specs(config, mesh=mesh, settings=settings)
    if settings.lora is not None:
        adapter = lora_specs(config, settings.lora)
        axes = lora_axes(config, settings.lora)
        shardings = weight_shardings(adapter, axes, mesh=mesh, fsdp=settings.machine.fsdp)
        return jax.tree.map(_spec_like, adapter, shardings), specs
    weights, frozen = parts.split(specs, parts=settings.train)
    if settings.objective.kind == "dpo":
        dtype = jnp.dtype(settings.machine.dtype)
        frozen[REFERENCE] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), weights
        )
    return weights, frozen


def _spec_like(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _specs(config: Qwen2AudioConfig, *, mesh: Mesh, settings: TrainSettings) -> dict[str, Any]:
    """The sharding and dtype of every weight on the mesh: float32 if it is trained."""
    padded = sharded_specs(config, mesh=mesh)
    shardings = weight_shardings(padded, parameter_axes(config), mesh=mesh, fsdp=settings.machine.fsdp)
    trained = {} if settings.lora else flatten_dict(parts.split(padded, parts=settings.train)[0])

    def place(path: tuple[str, ...], spec: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32 if path in trained else spec.dtype, sharding=sharding)

    flat, where = flatten_dict(padded), flatten_dict(shardings)
    return unflatten_dict({path: place(path, spec, where[path]) for path, spec in flat.items()})


def _fresh(config: Qwen2AudioConfig, specs: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Randomly initialised weights, placed by `specs`; the vocabulary is padded with zeros."""

    def place(weight: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
        missing = [(0, wanted - has) for wanted, has in zip(spec.shape, weight.shape, strict=True)]
        return jax.device_put(jnp.pad(weight, missing).astype(spec.dtype), spec.sharding)

    return jax.tree.map(place, init_params(replace(config, dtype="float32"), seed=seed), dict(specs))


def _fresh_adapter(config: Qwen2AudioConfig, *, mesh: Mesh, settings: TrainSettings) -> dict[str, Any]:
    """A randomly initialised adapter, each matrix sharded like the weight that it adds to."""
    lora = settings.lora
    assert lora is not None
    specs, axes = lora_specs(config, lora), lora_axes(config, lora)
    shardings = weight_shardings(specs, axes, mesh=mesh, fsdp=settings.machine.fsdp)
    return jax.jit(lambda: init_adapter(config, lora, seed=settings.seed), out_shardings=shardings)()


def _copied(weights: Mapping[str, Any], *, dtype: jnp.dtype) -> dict[str, Any]:
    """A copy of the weights in a dtype, in separate memory: training donates the originals."""
    where = jax.tree.map(lambda leaf: leaf.sharding, dict(weights))
    return jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree), out_shardings=where)(dict(weights))


def exported_folder(settings: TrainSettings) -> Path:
    """The folder for the result."""
    return Path(settings.output) / "model"
