"""Random ragged batches for the tiny models, as numpy arrays under the reference's names."""

import numpy as np
import tiny

from qwen2audio_jax.model.lengths import token_count

# Rows of a batch: a number is so many random text ids, a string names a clip by its valid frames.
RAGGED = ([5], [4, "all", 3], ["3", 2, "57"], [9, "121", "160", 4, "41", 9])
"""Four rows with 0, 1, 2 and 3 clips: shortest possible, longest possible, odd lengths."""


def random_inputs(name: str, rows=RAGGED, *, seed: int = 0, side: str = "left") -> dict[str, np.ndarray]:
    """A padded batch for the tiny model `name`."""
    audio = tiny.CONFIGS[name]["audio_config"]
    limit = 2 * audio["max_source_positions"]
    rng = np.random.default_rng(seed)
    frames, ids = [], []
    for row in rows:
        parts = []
        for part in row:
            if isinstance(part, str):
                frames.append(limit if part == "all" else int(part))
                parts.append(np.full(token_count(frames[-1]), tiny.AUDIO))
            else:
                parts.append(rng.integers(0, 300, part))
        ids.append(np.concatenate(parts))
    width = max(map(len, ids))
    input_ids = np.full((len(ids), width), tiny.END_OF_TEXT)
    attention_mask = np.zeros_like(input_ids)
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        input_ids[index, where] = row
        attention_mask[index, where] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if frames:
        inputs["input_features"] = rng.normal(size=(len(frames), audio["num_mel_bins"], limit)).astype(np.float32)
        inputs["feature_attention_mask"] = (np.arange(limit) < np.array(frames)[:, None]).astype(np.int64)
    return inputs


def row_alone(name: str, index: int, rows=RAGGED, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Row `index` of `random_inputs(name, rows, seed=seed)` by itself, without padding."""
    inputs = random_inputs(name, rows, seed=seed)
    kept = inputs["attention_mask"][index].astype(bool)
    alone = {"input_ids": inputs["input_ids"][index : index + 1, kept]}
    alone["attention_mask"] = np.ones_like(alone["input_ids"])
    clips = [sum(isinstance(part, str) for part in row) for row in rows]
    first = sum(clips[:index])
    if clips[index]:
        for key in ("input_features", "feature_attention_mask"):
            alone[key] = inputs[key][first : first + clips[index]]
    return alone


def as_torch(inputs):
    """The same batch as torch tensors."""
    import torch

    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in inputs.items()}


def forward_inputs(inputs):
    """The batch as torch tensors, with the positions that the reference's own `generate` counts.

    Its bare forward counts padding on the left as well: turned by other angles, whose float32 rounding is another.
    """
    positions = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    return as_torch({**inputs, "position_ids": positions})
