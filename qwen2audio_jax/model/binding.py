"""Binding: a module over weights that are given, and what a module declares.

`bind` makes a module out of a plain dict of arrays inside a jitted function.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2audio_jax.model.kernel_layout import TURNED
from qwen2audio_jax.model.layers import LowRank, Params

M = TypeVar("M", bound=nnx.Module)

Path = tuple[str | int, ...]


@functools.cache
def _declaration(
    module: Callable[..., M], config: Any, extras: frozenset[tuple[Path, str]] = frozenset()
) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure and weights, with what some of its layers have besides or instead of those declared."""

    def declare() -> M:
        root = module(config, rngs=None)
        for path, extra in sorted(extras, key=itemgetter(1)):  # adapters before kernels are turned
            layer: Any = root
            for key in path:
                layer = layer[key] if isinstance(key, int) else getattr(layer, key)
            if extra == _SCALES:
                layer.scale = nnx.Param(jnp.zeros(1))
            elif extra == _TURNED:
                layer.turned_kernel = nnx.Param(layer.kernel[...].T)
                del layer.kernel
            else:
                layer.lora = LowRank(*layer.kernel[...].shape, dropout=extra == _DROPPING)
        return root

    return nnx.split(nnx.eval_shape(declare))


_SCALES, _TURNED, _ADAPTED, _DROPPING = "scales", "turned", "adapted", "adapted, with dropout"


def _extras(tree: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Weights other than the declared ones: scales of int8 weights, kernels that are turned, and adapters."""
    if TURNED in tree:
        yield path, _TURNED
    if "scale" in tree and ("kernel" in tree or "embedding" in tree):
        yield path, _SCALES
    for key, value in tree.items():
        if key == "lora":
            yield path, _DROPPING if "key" in value else _ADAPTED
        elif isinstance(value, Mapping):
            yield from _extras(value, (*path, key))


def _renamed(tree: Any, rename: Callable[[Any], Any]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {rename(key): _renamed(value, rename) for key, value in tree.items()}


def bind(module: Callable[..., M], config: Any, params: Params) -> M:
    """The module `module(config)` with the given weights; cheap, to be called inside a jitted function."""
    # The checkpoint's keys are strings, while NNX keys list members by integers.
    numbered = _renamed(params, lambda key: int(key) if key.isdigit() else key)
    return nnx.merge(_declaration(module, config, frozenset(_extras(numbered)))[0], numbered)


def declared_shapes(module: Callable[..., Any], config: Any) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` of a module's weights, keyed as in the checkpoint; dtype as declared."""
    return _renamed(nnx.to_pure_dict(_declaration(module, config)[1]), str)


def declared_axes(module: Callable[..., Any], config: Any) -> dict[str, Any]:
    """The tree of logical axes (tuples of names) of a module's weights, keyed as in the checkpoint."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(_declaration(module, config)[1]):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = variable.get_metadata()["axes"]
    return tree


def initial_params(module: Callable[..., Any], config: Any, *, seed: int) -> dict[str, Any]:
    """Randomly initialised float32 weights."""
    return _renamed(nnx.to_pure_dict(nnx.state(module(config, rngs=nnx.Rngs(seed)))), str)


def traced_once(module: nnx.Module, operands: Mapping[str, Any], **static: Any) -> Any:
    """`module(**operands, **static)`, traced once for all modules of one structure and operands of one shape.

    The layers of a model differ in their weights alone. The compiled program is the same: XLA inlines the calls.
    """
    graph, weights = nnx.split(module)
    return _traced(weights, dict(operands), graph=graph, static=tuple(sorted(static.items())))


@functools.partial(jax.jit, static_argnames=("graph", "static"))
def _traced(weights: Any, operands: dict[str, Any], *, graph: Any, static: tuple[tuple[str, Any], ...]) -> Any:
    return nnx.merge(graph, weights)(**operands, **dict(static))
