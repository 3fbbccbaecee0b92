"""Logits processors of the caller: pure functions that become part of the compiled step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LogitsProcessors:
    """Functions applied one after the other; hashed by their identity, as what is compiled depends on it.

    Attributes:
        functions: each (ids [B, P] int32, scores [B, V] float32) -> scores [B, V]; ids are those of prompt and answer,
            -1 behind them.
        vocab_size: V, of the model; scores beyond it only pad the vocabulary, and no function sees them.
    """

    functions: tuple[Callable[[jax.Array, jax.Array], jax.Array], ...]
    vocab_size: int

    def __call__(self, ids: jax.Array, scores: jax.Array) -> jax.Array:
        """Scores of the same shape, the padding of the vocabulary left as it is."""
        own = scores[:, : self.vocab_size]
        for function in self.functions:
            own = jnp.asarray(function(ids, own), scores.dtype)
        return jnp.concatenate([own, scores[:, self.vocab_size :]], axis=1)


def logits_processors(value: Any, *, vocab_size: int, positions: int) -> LogitsProcessors | None:
    """The functions of an argument `logits_processor`: None, one, or several.

    Raises:
        ValueError: what is no function, what JAX cannot trace (torch's processors, say), or another shape as result.
    """
    functions = as_functions("logits_processor", value)
    ids = jax.ShapeDtypeStruct((1, positions), jnp.int32)
    scores = jax.ShapeDtypeStruct((1, vocab_size), jnp.float32)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        try:
            made = jax.eval_shape(function, ids, scores)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"logits_processor {name} cannot be compiled ({type(error).__name__}: {reason}): write a pure function "
                "of (ids, scores) with jax.numpy; ids [B, P] int32 are -1 behind a row's tokens"
            ) from error
        if getattr(made, "shape", None) != scores.shape:
            raise ValueError(
                f"logits_processor {name} gives {made} for scores of shape {scores.shape}: return the scores, changed"
            )
    return LogitsProcessors(functions, vocab_size) if functions else None


def as_functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    """The functions of an argument that takes none, one or several.

    Raises:
        ValueError: something else; the message names the argument.
    """
    if value is None:
        return ()
    # A list of the reference's can itself be called.
    functions = tuple(value) if isinstance(value, Iterable) else (value,)
    for function in functions:
        if not callable(function):
            raise ValueError(f"{name} holds {function!r}, a {type(function).__name__}: give functions of (ids, scores)")
    return functions
