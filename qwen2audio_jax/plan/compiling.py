"""Compilation of lowered programs, with their memory use or an out-of-memory error."""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GIB = 1 << 30


class OutOfMemory(Exception):
    """Error: the compiler refuses a program that does not fit in the chip's memory.

    Attributes:
        needed: bytes on one chip, if the compiler reports them.
        limit: bytes that programs may use there, if it reports them.
    """

    def __init__(self, message: str, *, needed: int | None, limit: int | None):
        super().__init__(message)
        self.needed, self.limit = needed, limit


class CompileError(RuntimeError):
    """Error: a program does not compile, for a reason other than memory."""


@dataclass(frozen=True)
class Program:
    """One compiled program; sizes are in bytes on one chip.

    Attributes:
        arguments: of its arguments.
        outputs: of its outputs, including donated arguments that are written in place.
        aliased: of the outputs that are written in place.
        temporary: of temporaries: the peak without arguments and outputs.
        counted_temporary: the compiler's own count of temporaries; some releases of libtpu report none for some
            programs.
        peak: the maximum at any time, its code included.
        flops: by the compiler's count, on one chip; loops count once.
        bytes_accessed: the same.
        text: the compiled program.
        seconds: of compilation.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    counted_temporary: int
    peak: int
    flops: float
    bytes_accessed: float
    text: str
    seconds: float


def compile_program(lowered: jax.stages.Lowered) -> Program:
    """Compile a program.

    Raises:
        OutOfMemory: it does not fit in the chip's memory.
        CompileError: anything else.
    """
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _failure(str(error)) from error
    seconds = time.monotonic() - began
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    settled = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Some releases of libtpu report no temporaries, others no peak.
    peak = max(settled + memory.temp_size_in_bytes, getattr(memory, "peak_memory_in_bytes", 0))
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=peak - settled,
        counted_temporary=memory.temp_size_in_bytes,
        peak=peak + memory.generated_code_size_in_bytes,
        flops=float(costs.get("flops", 0.0)),
        bytes_accessed=float(costs.get("bytes accessed", 0.0)),
        text=compiled.as_text() or "",
        seconds=seconds,
    )


def _failure(message: str) -> Exception:
    """The exception for a compiler's error message."""
    if "RESOURCE_EXHAUSTED" not in message or not re.search(r"\bhbm\b", message, re.IGNORECASE):
        return CompileError(message)
    # Two wordings: "... HLO temporaries (33.88G) exceeds available HBM (15.75G)", "Used 16.2G of 15.75G hbm".
    match = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message, re.IGNORECASE
    )
    if match is None:
        return OutOfMemory(message, needed=None, limit=None)
    return OutOfMemory(message, needed=_bytes(match[1], match[2]), limit=_bytes(match[3], match[4]))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


@cache
def memory_limit(mesh: Mesh) -> int:
    """Bytes that programs may use on one chip, from the compiler's error for one that cannot fit.

    Raises:
        CompileError: the error does not state the limit.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    large = jax.ShapeDtypeStruct((1 << 11, 1 << 14, 1 << 14), jnp.float32, sharding=whole)  # 2 TiB
    try:
        compile_program(jax.jit(lambda x: x[0, 0, 0], keep_unused=True).lower(large))
    except OutOfMemory as refusal:
        if refusal.limit is not None:
            return refusal.limit
        raise CompileError(f"the compiler does not say how much memory there is: {refusal}") from refusal
    raise CompileError("the compiler takes 2 TiB on one chip, so that it cannot tell what fits")


def usable(limit: int, memory: int | None) -> int:
    """Usable bytes of a chip: all available ones, or at most `memory`."""
    return limit if memory is None else min(limit, memory)


def check_peak(peak: int, *, limit: int) -> None:
    """Raise `OutOfMemory` for a program whose peak exceeds the limit, even if the chip has more."""
    if peak > limit:
        message = f"{peak / GIB:.2f} GiB are more than the {limit / GIB:.2f} GiB that may be used"
        raise OutOfMemory(message, needed=peak, limit=limit)
