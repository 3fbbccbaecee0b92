"""Write tests/data/reference.npz: what the reference makes of the tiny models, for where it is not installed.

    python tests/record_reference.py

For each configuration, on `prompts.random_inputs(name)`: `NAME/logits` float64 [rows, V] after each row's last token,
computed in float64, `NAME/allowed`, how far ours may be from them (see `judge`), and `NAME/PENALTY` int [rows, 64],
greedy tokens of each row run alone in float32, padded after its end.
"""

from pathlib import Path

import numpy as np
import tiny
from judge import judge
from prompts import RAGGED, as_torch, forward_inputs, random_inputs, row_alone

RECORD = Path(__file__).parent / "data" / "reference.npz"
PENALTIES = (1.0, 1.1)
NEW_TOKENS = 64
SETTINGS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": [tiny.IM_END, tiny.END_OF_TEXT], "do_sample": False}


def last_logits(name: str):
    """For `judge`: a model's logits after each row of the ragged batch."""
    import torch

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model(**forward_inputs(random_inputs(name))).logits[:, -1].numpy()

    return logits


def greedy_tokens(model, name: str, penalty: float) -> np.ndarray:
    """The reference's greedy tokens, each row by itself."""
    import torch

    tokens = np.full((len(RAGGED), NEW_TOKENS), tiny.END_OF_TEXT)
    for row in range(len(RAGGED)):
        inputs = row_alone(name, row)
        with torch.no_grad():
            result = model.generate(
                **as_torch(inputs), **SETTINGS, max_new_tokens=NEW_TOKENS, repetition_penalty=penalty
            )
        new = result[0, inputs["input_ids"].shape[1] :]
        tokens[row, : len(new)] = new.numpy()
    return tokens


def main() -> None:
    """Record all configurations."""
    from conftest import build_reference

    arrays = {}
    for name in tiny.CONFIGS:
        model = build_reference(name)
        (arrays[f"{name}/logits"],), (arrays[f"{name}/allowed"],) = (
            found.values() for found in judge(model, last_logits(name))
        )
        for penalty in PENALTIES:
            arrays[f"{name}/{penalty}"] = greedy_tokens(model, name, penalty).astype(np.int32)
    RECORD.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORD, **arrays)


if __name__ == "__main__":
    main()
