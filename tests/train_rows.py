"""Rows of packed examples for the tiny models, made from the batches of `prompts`."""

from dataclasses import replace

import numpy as np
import tiny
from prompts import random_inputs

from qwen2audio_jax import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.train.batch import TrainBatch

EXAMPLES = ([5], [4, "238", 3], ["3", 2, "57"], [9, "121", "160", 4, "41", 9], [3, "30", 5], [2, "99", 11], [8], [7])

SHORT = ([5], [4, "58", 3], ["3", 2, "37"], [9, "21", "40", 4, "41", 9], [3, "30", 5], [2, "59", 11], [8], [7])
"""The same with clips of at most 60 frames, for what takes many steps."""


def shallow(model, *, layers: int):
    """The model with only the first so many layers of encoder and decoder."""
    text = replace(model.config.text_config, num_hidden_layers=layers)
    audio = replace(model.config.audio_config, encoder_layers=layers)
    params = {name: dict(part) for name, part in model.params.items()}
    for part in (params["encoder"], params["decoder"]):
        part["layers"] = {str(index): part["layers"][str(index)] for index in range(layers)}
    return Qwen2AudioForConditionalGeneration(replace(model.config, text_config=text, audio_config=audio), params)


def examples(name: str, rows=EXAMPLES, *, seed: int = 0):
    """(reference inputs, right-padded; labels [B, T]) with about half of the text positions labelled."""
    limit = 2 * tiny.CONFIGS[name]["audio_config"]["max_source_positions"]
    rows = [[str(min(int(part), limit)) if isinstance(part, str) else part for part in row] for row in rows]
    inputs = random_inputs(name, rows=rows, seed=seed, side="right")
    rng = np.random.default_rng(seed + 5)
    kept = (rng.random(inputs["input_ids"].shape) < 0.6) & (inputs["attention_mask"] == 1)
    return inputs, np.where(kept & (inputs["input_ids"] != tiny.AUDIO), inputs["input_ids"], -100)


def pack(inputs, labels, groups, *, tokens: int, clips: int) -> TrainBatch:
    """A batch whose row r holds the examples `groups[r]`, in order."""
    frames = inputs["feature_attention_mask"].sum(1)
    # Two frames behind the longest clip are all that its valid vectors can hear of.
    features = inputs["input_features"][:, :, : frames.max() + 2 + frames.max() % 2]
    heard = [row[mask == 1] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    per_clip = [token_count(int(n)) for n in frames]
    owned, clip = [], 0
    for ids in heard:  # which clips belong to which example
        first, waiting = clip, int((ids == tiny.AUDIO).sum())
        while waiting:
            waiting -= per_clip[clip]
            clip += 1
        owned.append(range(first, clip))
    count, width, vectors = len(groups), features.shape[2], features.shape[2] // 4
    ids, targets, segments, positions, slots = (
        np.full((count, tokens), value, np.int32) for value in (0, -100, 0, 0, -1)
    )
    packed = np.zeros((count, clips, *features.shape[1:2], width), np.float32)
    lengths = np.zeros((count, clips), np.int32)
    for row, group in enumerate(groups):
        at = used = 0
        for segment, example in enumerate(group, start=1):
            size = len(heard[example])
            place = slice(at, at + size)
            ids[row, place], segments[row, place] = heard[example], segment
            positions[row, place] = np.arange(size)
            targets[row, at : at + size - 1] = labels[example, 1:size]
            audio = []
            for clip in owned[example]:
                packed[row, used], lengths[row, used] = features[clip], frames[clip]
                audio += range(used * vectors, used * vectors + per_clip[clip])
                used += 1
            slots[row, place][heard[example] == tiny.AUDIO] = audio
            at += size
    return TrainBatch(ids, targets, segments, positions, slots, packed, lengths)
