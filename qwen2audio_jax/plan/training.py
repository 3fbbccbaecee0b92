"""Training plan: the real optimiser step, compiled for a machine that need not exist."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.padded_shapes import padded_tokens
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.parallel.sharding import named_sharding
from qwen2audio_jax.plan.compiling import OutOfMemory, check_peak, compile_program, memory_limit, usable
from qwen2audio_jax.plan.program import collectives, summary
from qwen2audio_jax.plan.request import Request
from qwen2audio_jax.plan.resident import device_bytes
from qwen2audio_jax.plan.topology import compile_mesh, mesh_sizes
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.objective import make_objective
from qwen2audio_jax.train.optimizer import learning_rate, make_optimizer
from qwen2audio_jax.train.packing import frame_buckets
from qwen2audio_jax.train.settings import DataSettings, LoraSettings, TrainSettings
from qwen2audio_jax.train.settings_file import read_settings
from qwen2audio_jax.train.state import new_state, state_shardings
from qwen2audio_jax.train.step import make_step
from qwen2audio_jax.train.trained_model import abstract_model

FULL, LORA = "full", "lora"


def training_settings(source: str, request: Request, *, mesh: Mapping[str, int]) -> TrainSettings:
    """The settings of a run.

    Args:
        source: a TOML file, or `FULL` or `LORA`: all weights or an adapter, with the defaults, and a step of the
            request's rows, each as wide as its prompt and answer and with one clip.
        request: the machine and, for these two, the batch.
        mesh: sizes that replace the settings'.

    Raises:
        ValueError: a file that cannot be used, a GPU, a mesh that is not the machine, rows that do not divide.
    """
    if request.topology.chip.kind != "tpu":
        raise ValueError(
            f"--train compiles the step, which can be done for TPUs alone: {request.topology.name} has none"
        )
    if INT8 in (request.weights, request.cache):
        raise ValueError("int8 weights and caches are for generating: leave out --weights and --cache with --train")
    if source in (FULL, LORA):
        tokens = padded_tokens(request.prompt_tokens + request.max_new_tokens, config=request.config)
        data = DataSettings(train=("-",), rows=request.batch, max_tokens=tokens, max_clips=1)
        lora = LoraSettings() if source == LORA else None
        settings = TrainSettings(model="", output="", steps=1, data=data, lora=lora)
    else:
        settings = read_settings(source)
    machine = settings.machine
    wanted = {"data": machine.data, "model": machine.model, **mesh}
    data_size, model_size = mesh_sizes(request.topology, config=request.config, **wanted)
    parts = machine.accumulation * data_size
    if settings.data.rows % parts:
        raise ValueError(
            f"a step of {settings.data.rows} rows does not divide into {machine.accumulation} micro-batches over "
            f"data={data_size} chips; choose a multiple of {parts} (--batch), or another --mesh"
        )
    return replace(settings, machine=replace(machine, data=data_size, model=model_size))


def _batch(config: Qwen2AudioConfig, settings: TrainSettings, *, mesh: Mesh) -> TrainBatch:
    """The largest batch that the settings allow: every row of full width, with the most and longest clips."""
    data, audio = settings.data, config.audio_config
    frames = frame_buckets(data, limit=audio.max_frames)[-1]
    rows: Any = named_sharding(mesh, "batch")

    def spec(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.rows, *shape), dtype, sharding=rows)

    text = spec(data.max_tokens)
    features = spec(data.max_clips, audio.num_mel_bins, frames, dtype=jnp.float32)
    return TrainBatch(text, text, text, text, text, features, spec(data.max_clips))


def lower_step(config: Qwen2AudioConfig, settings: TrainSettings, *, mesh: Mesh) -> tuple[jax.stages.Lowered, Any, Any]:
    """The step of a run, its state and its frozen weights, from shapes alone."""
    config = replace(config, dtype=settings.machine.dtype)
    weights, frozen = abstract_model(config, mesh=mesh, settings=settings)
    optimizer = make_optimizer(settings.optimizer, steps=settings.steps)
    where = jax.tree.map(lambda leaf: leaf.sharding, weights)
    shardings = state_shardings(optimizer, weights, where, mesh=mesh)
    first = partial(new_state, optimizer=optimizer, shardings=shardings, seed=settings.seed)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(first, weights),
        shardings,
    )
    step = make_step(
        make_objective(settings, config=config),
        optimizer=optimizer,
        schedule=learning_rate(settings.optimizer, steps=settings.steps),
        accumulation=settings.machine.accumulation,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        return jitted.lower(state, frozen, _batch(config, settings, mesh=mesh)), state, frozen


def plan_training(
    request: Request,
    settings: TrainSettings,
    *,
    name: str,
    memory: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compile a run's step for the machine of a request, and report its memory and cost.

    Args:
        request: the machine and the model.
        settings: see `training_settings`.
        name: of the configuration.
        memory: bytes of a chip that may be used, if less than available.
        say: called with progress messages.

    Raises:
        ValueError: compiling for TPUs is not possible in this process.
        CompileError: the step does not compile, for a reason other than memory.
    """
    machine, data = settings.machine, settings.data
    mesh = compile_mesh(request.topology, data=machine.data, model=machine.model)
    limit = usable(memory_limit(mesh), memory)
    say(f"compiling a training step for {request.topology.name}; {request.config.text_config.num_hidden_layers} layers")
    lowered, state, frozen = lower_step(request.config, settings, mesh=mesh)
    frames = frame_buckets(data, limit=request.config.audio_config.max_frames)[-1]
    result: dict[str, Any] = {
        "config": name,
        "topology": request.topology.name,
        "chips": request.topology.chips,
        "mesh": {"data": machine.data, "model": machine.model},
        "by": "compiling",
        "versions": {package: version(package) for package in ("jax", "libtpu")},
        "trains": f"an adapter of rank {settings.lora.rank}" if settings.lora else ", ".join(settings.train),
        "objective": settings.objective.kind,
        "optimizer": settings.optimizer.name,
        "rows": data.rows,
        "tokens": data.max_tokens,
        "clips": data.max_clips,
        "frames": frames,
        "accumulation": machine.accumulation,
        "remat": machine.remat,
        "limit_bytes_per_chip": limit,
        "state_bytes_per_chip": device_bytes(state),
        "frozen_bytes_per_chip": device_bytes(frozen),
        "largest_batch": None,
    }
    try:
        program = compile_program(lowered)
        check_peak(program.peak, limit=limit)
    except OutOfMemory as refusal:
        reason = " ".join(str(refusal).split())
        missing = {"temporary_bytes_per_chip": None, "collectives": None, "compile_seconds": None}
        return {**result, **missing, "fits": False, "peak_bytes_per_chip": refusal.needed, "reason": reason}
    return {
        **result,
        "fits": True,
        "reason": None,
        "temporary_bytes_per_chip": program.temporary,
        "peak_bytes_per_chip": program.peak,
        "collectives": summary(collectives(program.text, devices=mesh.size)),
        "compile_seconds": round(program.seconds, 1),
    }
