"""Warm-up of an engine: every program that requests within bounds need, compiled before the first of them comes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.engine.placement import RESTS
from qwen2audio_jax.engine.slots import CHOICES, Row, Slots
from qwen2audio_jax.generation.encoding import Embedded, embed_group
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.inputs import CheckedInputs, TextRows
from qwen2audio_jax.generation.padded_shapes import listed_capacities, padded_tokens, prompt_counts
from qwen2audio_jax.generation.run import prefill_embedded
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.warmup import Bounds, OnProgress, compile_all, prompt_shapes

SETTINGS = {
    "greedy": GenerationConfig(),
    "few": GenerationConfig(do_sample=True),
    "all": GenerationConfig(do_sample=True, top_k=0),
}
"""Settings of which each needs another program."""


def warm_up(
    runtime: Runtime,
    slots: Slots,
    *,
    bounds: Bounds,
    positions: int,
    share_prefixes: bool,
    on_progress: OnProgress | None,
    threads: int | None,
) -> list[str]:
    """Compile what takes long side by side, then run everything once on slots that nobody uses."""
    capacities = listed_capacities(positions, config=runtime.config)
    shapes: dict[str, Callable[[], Any]] = dict(prompt_shapes(runtime, bounds))
    for capacity in capacities:
        for rows in slots.steps:
            name = f"step of {rows} x {capacity} positions"
            shapes[name] = partial(slots.compile_forward, rows=rows, capacity=capacity)
        for width in RESTS if share_prefixes else ():
            if width < capacity and width < 2 * bounds.tokens:
                name = f"rest of {width} tokens after up to {capacity} positions"
                shapes[name] = partial(_extension, runtime, slots, width, capacity)
    names = compile_all(shapes, on_progress=on_progress, threads=threads)
    _rehearse(runtime, slots, bounds.rows, capacities, share_prefixes=share_prefixes)
    return names


def _embedded(runtime: Runtime, *, count: int, width: int) -> Embedded:
    nothing = CheckedInputs(TextRows([], [], width), None, [])
    return embed_group(runtime, nothing, [], group=Group((), count, width))


def _extension(runtime: Runtime, slots: Slots, width: int, capacity: int) -> None:
    slots.compile_extension(_embedded(runtime, count=prompt_counts(1, mesh=runtime.mesh)[0], width=width), capacity)


def _rehearse(runtime: Runtime, slots: Slots, rows: int, capacities: list[int], *, share_prefixes: bool) -> None:
    """Run the programs that bring prompts into slots, and change the slots' capacity from each to each."""
    mesh, nobody = runtime.mesh, np.zeros(1, np.int32)
    firsts = []
    for count in prompt_counts(rows, mesh=mesh):
        embedded = _embedded(runtime, count=count, width=padded_tokens(1, config=runtime.config))
        with jax.set_mesh(mesh):
            logits, parts = prefill_embedded(runtime, embedded)
        for config in SETTINGS.values():
            first = slots.first_tokens(logits, embedded, [Row(nobody, 0, config)])
        firsts.append((first, parts[:1]))
    one = prompt_counts(1, mesh=mesh)[0]
    rest = _embedded(runtime, count=one, width=RESTS[0])
    for capacity in capacities:
        slots.resize(capacity)
        for first, parts in firsts:
            slots.insert(first, parts, source=0, slot=0)
        if share_prefixes:
            logits, copies = slots.extend(rest, sources=[0], starts=[1])
            slots.insert_row(
                slots.first_tokens(logits, rest, [Row(nobody, 0, SETTINGS["greedy"])]), copies, source=0, slot=0
            )
        for rows in slots.steps:
            if rows < slots.rows:
                slots.narrow([0], rows=rows)
            # The choice of tokens does not see the cache, so once is enough.
            for choice in CHOICES if capacity == capacities[0] else CHOICES[:1]:
                slots.forward()
                slots.choose(choice)
                slots.forward()
                slots.choose(choice, {})
            slots.widen()
    for capacity in capacities:
        for other in capacities:
            slots.resize(capacity)
            slots.resize(other)
    slots.resize(capacities[0])
