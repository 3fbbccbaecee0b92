"""Ground truth of numeric tests: the reference's own classes in float64.

Two correct float32 programs differ by their rounding, and how much depends on the processor. So what is asked of ours
is to be about as close to the exact result as the reference is, in eager or in SDPA attention, on the same machine.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

SLACK = 1e-6
"""What is allowed beyond the reference's error, relative to the range: a few float32 roundings of the result."""


def relative_error(actual, expected) -> float:
    """max |a - b| / max |b|, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def with_attention(model, implementation: str):
    """A copy of a transformers or PEFT model with "eager" or "sdpa" attention."""
    model = copy.deepcopy(model)
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation(implementation)
    return model


def in_float64(model):
    """A copy that computes in float64 throughout, except RoPE's angles, whose float32 rounding is part of the model.

    `.double()` alone leaves RMSNorm and the softmax of eager attention in float32, and gives NaN on padded rows with
    it: this one takes SDPA, which has no cast, and a norm without one.
    """
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def rms_norm(norm, x):
        assert x.dtype == torch.float64
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    exact = with_attention(model, "sdpa").double()
    for module in exact.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = rms_norm.__get__(module)
    return exact


def judge(model, run: Callable[[Any], Any], *, dtype: str = "float32") -> tuple[dict[str, Any], dict[str, float]]:
    """The exact arrays, and by how much ours may differ from each: twice the reference's own error and `SLACK`.

    Args:
        model: the reference, float32, as a transformers or PEFT model.
        run: what is judged: a model to arrays of numpy in any nesting; called with and without attention's SDPA.
        dtype: in which the reference's error is measured.
    """
    import torch

    exact = by_path(run(in_float64(model)))
    for path, value in exact.items():
        assert np.asarray(value).dtype == np.float64, (path, np.asarray(value).dtype)
        assert np.isfinite(value).all(), path
    theirs = [
        by_path(run(with_attention(model, implementation).to(getattr(torch, dtype))))
        for implementation in ("eager", "sdpa")
    ]
    bars = {path: 2 * max(relative_error(one[path], value) for one in theirs) + SLACK for path, value in exact.items()}
    return exact, bars


def assert_as_close_as_the_reference(ours, model, run: Callable[[Any], Any], *, dtype: str = "float32") -> None:
    """Our arrays are as close to the exact ones as `judge` allows: `ours` has the nesting of `run(model)`."""
    assert_as_close(ours, judge(model, run, dtype=dtype))


def assert_as_close(ours, judged: tuple[dict[str, Any], dict[str, float]]) -> None:
    """The same with what `judge` has said."""
    exact, bars = judged
    ours = by_path(ours)
    assert set(ours) == set(exact)
    errors = {path: relative_error(ours[path], value) for path, value in exact.items()}
    far = {path: (error, bars[path]) for path, error in errors.items() if not error <= bars[path]}
    assert not far, f"(error, allowed) of the range: {far}"


def by_path(tree) -> dict[str, Any]:
    """The arrays of a nesting by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
