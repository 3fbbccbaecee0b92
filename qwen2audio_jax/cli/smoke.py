"""`qwen2audio doctor --smoke`: each stage of the embedded model on the default device, beside the CPU, and timed.

Where the CPU is the only device, the second computation is the same equations one operation at a time, not compiled:
other programs, the same numbers up to rounding.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio.load import load_audio
from qwen2audio_jax.audio.mel_batch import log_mel_batch
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import example
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.attention import XLA, choose_attention
from qwen2audio_jax.model.kv_cache import empty_cache
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

BARS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference from the CPU's float32, as a share of the largest value, for each compute dtype."""
STEPS = 8
"""Tokens that are decoded one by one."""
REPEATS = 3
CLIP, PROMPT = "digits-4719", "Which digits are spoken?"


@dataclass(frozen=True)
class Stage:
    """One stage's result.

    Attributes:
        name: of the stage.
        dtype: of the computation.
        attention: implementation of the attention over whole prompts and clips.
        error: largest difference as a share of the largest value.
        bar: what it may be.
        milliseconds: of the fastest of several runs, compiled before.
    """

    name: str
    dtype: str
    attention: str
    error: float
    bar: float
    milliseconds: float

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        if self.error <= self.bar:  # not so for NaN
            return []
        return [f"differs by {self.error:.1e} of the largest value, and {self.bar:.0e} is rounding: report this device"]


@dataclass(frozen=True)
class Question:
    """The inputs, on the host: samples [n], features [1, M, L], frames [1], ids [1, T] and slots [1, T]."""

    samples: np.ndarray
    features: np.ndarray
    frames: np.ndarray
    ids: np.ndarray
    slots: np.ndarray


def smoke() -> tuple[str, list[Stage]]:
    """The default device's name, and the results of all stages in every dtype of `BARS`.

    Raises:
        ValueError: JAX has no CPU beside the accelerator.
    """
    device = jax.devices()[0]
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise ValueError(
            f"JAX_PLATFORMS leaves no CPU to compare with: add it, as in JAX_PLATFORMS={device.platform},cpu"
        ) from None
    model = Qwen2AudioForConditionalGeneration.from_pretrained()
    question = _question()
    plainly = jax.disable_jit() if device.platform == "cpu" else nullcontext()
    params = jax.device_put(model.params, cpu)
    expected = {
        name: value for name, value, _ in _stages(params, model.config, question, cpu, attention=XLA, how=plainly)
    }
    expected["log-mel"] = question.features  # which the host computes without JAX
    results = []
    for dtype, bar in BARS.items():
        config = replace(model.config, dtype=dtype)
        attention = choose_attention("auto", mesh=model.mesh, dtype=dtype, head_dims=config.head_dims)
        params = jax.tree.map(lambda leaf, dtype=dtype: jax.device_put(leaf.astype(dtype), device), model.params)
        for name, value, seconds in _stages(params, config, question, device, attention=attention):
            if name != "log-mel" or dtype == "float32":  # it is always float32
                error = _error(value, expected[name])
                results.append(Stage(name, dtype, attention, error, bar, 1e3 * seconds))
    return f"{device.platform}: {device.device_kind}", results


def _question() -> Question:
    processor = Qwen2AudioProcessor.from_pretrained()
    samples = load_audio(example(CLIP))
    content = [{"type": "audio", "audio": samples}, {"type": "text", "text": PROMPT}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    frames = inputs.feature_attention_mask.sum(axis=1).astype(np.int32)
    width = -(-int(frames[0]) // 8) * 8
    audio = inputs.input_ids == processor.audio_token_id
    slots = np.where(audio, np.cumsum(audio, axis=1) - 1, -1).astype(np.int32)
    return Question(samples, inputs.input_features[:, :, :width], frames, inputs.input_ids.astype(np.int32), slots)


def _stages(
    params: Any,
    config: Qwen2AudioConfig,
    question: Question,
    device: jax.Device,
    *,
    attention: str,
    how: AbstractContextManager[Any] | None = None,
) -> Iterator[tuple[str, np.ndarray, float]]:
    """(name, value, seconds) of each stage on a device, each from the results before it; with `how`, not timed."""
    timed = partial(_timed, repeats=REPEATS if how is None else 0)
    put = partial(jax.device_put, device=device)
    rows, tokens = question.ids.shape
    lengths = put(np.array([tokens], np.int32))

    def mel(samples: jax.Array) -> jax.Array:
        features, _ = log_mel_batch(samples, np.array([len(question.samples)], np.int32))
        return features[..., : question.features.shape[-1]]

    def prefill(embeddings: jax.Array) -> Any:
        dtype = jnp.dtype(config.dtype)
        cache = empty_cache(config.text_config, rows=rows, capacity=tokens + STEPS, dtype=dtype)
        return qwen2_audio.fill(params, embeddings, cache, counts=lengths, cfg=config, attention=attention)

    def embed(audio: jax.Array) -> jax.Array:
        prompt = qwen2_audio.Prompt(jnp.asarray(question.ids), lengths, audio, jnp.asarray(question.slots))
        return qwen2_audio.embed(params, prompt, cfg=config)

    def decode(cache: Any) -> jax.Array:
        logits = []
        for position in range(STEPS):  # the prompt's own tokens: the same in every dtype
            step, cache = step_of(params, put(question.ids[:, position]), cache)
            logits.append(step)
        return jnp.stack(logits)

    with how or nullcontext():
        step_of = jax.jit(partial(qwen2_audio.decode_step, cfg=config))
        value, seconds = timed(jax.jit(mel), put(question.samples[None]))
        yield "log-mel", value, seconds
        encode = jax.jit(partial(qwen2_audio.encode_audio, cfg=config, attention=attention))
        heard, seconds = timed(encode, params, put(question.features), put(question.frames))
        count = int(heard.lengths[0])
        yield "encoder", heard.encoded[:, :count], seconds
        project = jax.jit(lambda encoded: qwen2_audio.bind(qwen2_audio.projector, config, params["projector"])(encoded))
        projected, seconds = timed(project, heard.encoded)
        yield "projector", projected[:, :count], seconds
        embeddings, _ = timed(jax.jit(embed), projected)
        (logits, cache), seconds = timed(jax.jit(prefill), embeddings)
        yield "prefill", logits, seconds
        logits, seconds = timed(decode, cache)
        yield "decode", logits, seconds / STEPS


def _timed(function: Callable[..., Any], *arguments: Any, repeats: int) -> tuple[Any, float]:
    """A function's value, and the seconds of the fastest run after the first, which compiles."""
    value = jax.block_until_ready(function(*arguments))
    fastest = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        fastest = min(fastest, time.perf_counter() - began)
    return value, fastest


def _error(value: Any, expected: Any) -> float:
    value, expected = np.asarray(value, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(value - expected).max() / np.abs(expected).max())
