"""Programs: the model's functions, compiled to round where the reference rounds, and for the rows of their products."""

import inspect
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from typing import Any, NamedTuple

import jax

from qwen2audio_jax.model.kernel_layout import has_avx2_alone

_ROUNDING = {"xla_allow_excess_precision": False}
"""Options of every program.

In half precision XLA may keep intermediate results in float32, others in each program; so a batch's or a mesh's shape
would decide how a row's numbers are rounded. The reference's operations each round to the dtype, and so do these.
"""
_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options by which XLA's CPU backend computes products with Eigen instead of YNNPACK."""
_EIGEN_ROWS = range(3, 64)
"""Rows that Eigen multiplies with float32 weights 1.1 to 1.6 times as fast as YNNPACK, with AVX2 alone.

One row goes to neither, two are slower with it, and from 64 on they are the same. Processors with AVX-512 have not been
measured: `benchmarks/few_rows.py` says what is the faster.
"""

program = partial(jax.jit, compiler_options=_ROUNDING)
"""`jax.jit` for what is called from the host."""


class Product(NamedTuple):
    """Size of a program's products.

    Attributes:
        rows: that each matrix of weights is multiplied by.
        dtype: of the weights.
        operand: one of the program's arguments, an array or its specs, which says where it runs.
    """

    rows: int
    dtype: str
    operand: Any


class ByRows:
    """A function with two programs, of which each call takes the one that is the faster for its rows.

    Args:
        function: what `program` takes.
        product: the size of its products, by its arguments.
        options: of `jax.jit`.

    Attributes:
        usual: the program of most calls.
        few: the one of few rows.
    """

    def __init__(self, function: Callable[..., Any], product: Callable[..., Product], **options: Any):
        update_wrapper(self, inspect.unwrap(function))
        self._product = product
        self.usual = program(function, **options)
        self.few = jax.jit(function, compiler_options=_ROUNDING | _EIGEN, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the function returns."""
        return self._chosen(*arguments, **named)(*arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """The lowered program of these arguments, arrays or specs."""
        lowered: jax.stages.Lowered = self._chosen(*arguments, **named).lower(*arguments, **named)
        return lowered

    def _chosen(self, *arguments: Any, **named: Any) -> Any:
        size = self._product(*arguments, **named)
        few = size.rows in _EIGEN_ROWS and size.dtype == "float32" and _is_on_cpu(size.operand)
        return self.few if few and has_avx2_alone() and _knows_eigen() else self.usual


def _is_on_cpu(operand: Any) -> bool:
    """Whether an array is on CPUs; one of the host's has no place yet, and specs may leave it open."""
    sharding = getattr(operand, "sharding", None)
    return sharding is not None and next(iter(sharding.device_set)).platform == "cpu"


@cache
def _knows_eigen() -> bool:
    """Whether this release of XLA takes the options."""
    try:
        jax.jit(lambda: 0, compiler_options=_EIGEN).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
