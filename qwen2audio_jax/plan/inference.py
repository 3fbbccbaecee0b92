"""Inference plan: every stage measured at the requested batch, and the largest batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import jax.numpy as jnp

from qwen2audio_jax.model.attention import AUTO, choose_attention
from qwen2audio_jax.model.kv_cache import cache_specs
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.plan import arithmetic
from qwen2audio_jax.plan.compiling import GIB, OutOfMemory, check_peak, compile_program, memory_limit, usable
from qwen2audio_jax.plan.program import Collective, collectives
from qwen2audio_jax.plan.request import Request, Shapes, shapes_of
from qwen2audio_jax.plan.resident import device_bytes, weight_specs
from qwen2audio_jax.plan.search import Largest, Refusal, largest_batch, sizes_of
from qwen2audio_jax.plan.stages import Batch, Stage, lower, stages_of
from qwen2audio_jax.plan.topology import abstract_mesh, compile_mesh

Say = Callable[[str], None]
"""Callback for progress messages."""


@dataclass(frozen=True)
class Measured:
    """A stage that fits; sizes are in bytes on one chip.

    Attributes:
        temporary: beyond weights, cache and the stage's own inputs and outputs.
        peak: the maximum at any time.
        exchanges: between the chips.
        flops: by the compiler's count on one chip, loops counted once; None if nothing was compiled.
        bytes_accessed: the same.
        seconds: of compilation.
    """

    temporary: int
    peak: int
    exchanges: list[Collective]
    flops: float | None = None
    bytes_accessed: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Machine:
    """The method of measuring the stages of a batch on the machine of a request.

    Attributes:
        by: "compiling" or "arithmetic".
        attention: its implementation for whole prompts and clips: see `attention.choose_attention`.
        limit: bytes that programs may use on one chip.
        measure: raises `OutOfMemory` for a stage that does not fit.
    """

    by: str
    attention: str
    limit: int
    measure: Callable[[Stage, Shapes], Measured]


@dataclass(frozen=True)
class Plan:
    """The answer to a request; sizes are in bytes on one chip.

    Attributes:
        request: the request.
        shapes: of the requested batch.
        machine: the method of measuring.
        versions: of the compiling packages.
        weights: all weights.
        cache: keys and values.
        stages: those that were measured and fit; if the batch does not fit, some are missing.
        refusal: why the requested batch does not fit; None if it does.
        largest: the largest batch; None if it was not searched for.
    """

    request: Request
    shapes: Shapes
    machine: Machine
    versions: dict[str, str]
    weights: int
    cache: int
    stages: dict[Stage, Measured]
    refusal: Refusal | None
    largest: Largest | None

    @property
    def fits(self) -> bool:
        """True if the requested batch fits."""
        return self.refusal is None

    @property
    def peak(self) -> int | None:
        """The maximum over the stages; for a batch that does not fit, the refused stage's need if known."""
        if self.refusal is not None:
            return self.refusal.needed
        return max(stage.peak for stage in self.stages.values())


def compiling(request: Request, *, memory: int | None, say: Say) -> Machine:
    """Measure by compiling; see `topology.compile_devices` for requirements and errors."""
    mesh = compile_mesh(request.topology, data=request.data, model=request.model)
    limit = usable(memory_limit(mesh), memory)

    def measure(stage: Stage, shapes: Shapes) -> Measured:
        say(f"compiling {stage} for {request.topology.name}, {shapes.rows} rows")
        batch = Batch(request.config, mesh, shapes, request.cache, weights=request.stored)
        program = compile_program(lower(stage, batch, mode=request.mode))
        say(f"compiled in {program.seconds:.0f} s: {program.peak / GIB:.2f} of {limit / GIB:.2f} GiB a chip")
        exchanges = collectives(program.text, devices=mesh.size)
        check_peak(program.peak, limit=limit)
        return Measured(
            program.temporary, program.peak, exchanges, program.flops, program.bytes_accessed, program.seconds
        )

    chosen = choose_attention(AUTO, mesh=mesh, dtype=request.config.dtype, head_dims=request.config.head_dims)
    return Machine("compiling", chosen, limit, measure)


def calculating(request: Request, *, memory: int | None) -> Machine:
    """Measure by arithmetic."""
    data, model, config = request.data, request.model, request.config
    weights = weight_bytes(request)
    limit = usable(arithmetic.usable_bytes(request.topology.chip), memory)
    width = jnp.dtype(config.dtype).itemsize

    def measure(stage: Stage, shapes: Shapes) -> Measured:
        sizes = {"data": data, "model": model, "width": width}
        temporary = arithmetic.temporary_bytes(stage, config, shapes, **sizes, widened=request.weights == INT8)
        peak = weights + cache_bytes(request, rows=shapes.rows) + temporary
        check_peak(peak, limit=limit)
        return Measured(temporary, peak, arithmetic.expected_collectives(stage, config, shapes, **sizes))

    return Machine("arithmetic", arithmetic.chosen_attention(config), limit, measure)


def cache_bytes(request: Request, *, rows: int) -> int:
    """Bytes of keys and values of a batch of `rows` rows, on one chip."""
    mesh = abstract_mesh(request.data, request.model)
    shapes = shapes_of(request, rows=rows, mesh=mesh)
    text, dtype = request.config.text_config, jnp.dtype(request.cache)
    cache = cache_specs(text, rows=shapes.rows, capacity=shapes.capacity, dtype=dtype, mesh=mesh)
    return device_bytes((cache.keys, cache.values))


def weight_bytes(request: Request) -> int:
    """Bytes of all weights on one chip."""
    mesh = abstract_mesh(request.data, request.model)
    return device_bytes(weight_specs(request.config, mesh=mesh, weights=request.stored))


def plan_inference(
    request: Request, *, search: bool = True, memory: int | None = None, say: Say = lambda line: None
) -> Plan:
    """Make the plan for a request.

    Args:
        request: see `make_request`.
        search: whether to search for the largest batch.
        memory: bytes of a chip that may be used, if less than available.
        say: called with progress messages.

    Raises:
        ValueError: compiling for TPUs is not possible in this process.
        CompileError: a stage does not compile, for a reason other than memory.
    """
    gpu = request.topology.chip.kind == "gpu"
    machine = calculating(request, memory=memory) if gpu else compiling(request, memory=memory, say=say)
    mesh = abstract_mesh(request.data, request.model)
    asked = shapes_of(request, rows=request.batch, mesh=mesh)
    sizes, weights = sizes_of(mesh, dtype=request.config.dtype), weight_bytes(request)
    measured: dict[int, dict[Stage, Measured]] = {}

    def resident(rows: int) -> int:
        return weights + cache_bytes(request, rows=rows)

    def attempt(rows: int) -> Refusal | None:
        shapes = shapes_of(request, rows=rows, mesh=mesh)
        stages = list(stages_of(shapes))
        # The step that is compiled fastest first, where all must fail; else first what takes the most.
        hopeless = resident(rows) > machine.limit
        stages.sort(key=("decode" if hopeless else "prefill").__ne__)
        for stage in stages:
            try:
                measured.setdefault(rows, {})[stage] = machine.measure(stage, shapes)
            except OutOfMemory as refusal:
                reason = " ".join(str(refusal).split())
                say(f"{stage} does not fit with {rows} rows")
                return Refusal(rows, stage, refusal.needed, reason)
        return None

    refusal = attempt(asked.rows)
    known = {asked.rows: refusal}
    start = asked.rows
    if refusal is None:
        # What is not weights is taken to grow with the rows, so that the search begins near its end.
        peak = max(stage.peak for stage in measured[asked.rows].values())
        share = (machine.limit - weights) / max(peak - weights, 1)
        start = max((rows for rows in sizes if rows <= asked.rows * share), default=asked.rows)
    largest = None
    if search:
        largest = largest_batch(
            lambda rows: known[rows] if rows in known else attempt(rows),
            sizes=sizes,
            resident=resident,
            limit=machine.limit,
            start=start,
        )
    found = measured.get(asked.rows, {})
    names = ("jax",) if gpu else ("jax", "libtpu")
    return Plan(
        request=request,
        shapes=asked,
        machine=machine,
        versions={name: version(name) for name in names},
        weights=weights,
        cache=cache_bytes(request, rows=asked.rows),
        stages={stage: found[stage] for stage in stages_of(asked) if stage in found},
        refusal=refusal,
        largest=largest,
    )
