"""Accuracy of int8: each linear map of a layer at the 7B model's widths, and the embedded model's logits.

    python benchmarks/int8_accuracy.py [--clips 300]

Prints the relative error (Frobenius) of every kernel of a decoder layer with random weights, and the mean Kullback-
Leibler divergence of the embedded model's next-token distributions, over every answer token of freshly synthesised
speech (needs espeak-ng), between float32, bfloat16, int8 weights and the int8 cache. Results: int8_accuracy.md.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.model.quantization import quantize
from qwen2audio_jax.speech.dataset import write_dataset

ROOT = Path(__file__).resolve().parent.parent
STORED = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8 weights": {"weights_dtype": "int8"}}


def layer_errors() -> dict[str, float]:
    """Relative error of each kernel of one decoder layer, standard normal weights rounded to bfloat16."""
    config = Qwen2AudioConfig.from_json_file(ROOT / "configs" / "qwen2-audio-7b-instruct.json").text_config
    width, ffn = config.hidden_size, config.intermediate_size
    heads = width // config.num_attention_heads
    kv = config.num_key_value_heads * heads
    shapes = {
        "q_proj": (width, width),
        "k_proj": (width, kv),
        "v_proj": (width, kv),
        "o_proj": (width, width),
        "gate_proj": (width, ffn),
        "up_proj": (width, ffn),
        "down_proj": (ffn, width),
    }
    rng = np.random.default_rng(0)
    errors = {}
    for name, shape in shapes.items():
        kernel = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        codes, scales = jax.jit(quantize, static_argnames="axis")(kernel, axis=0)
        wide = kernel.astype(np.float32)
        errors[name] = float(np.linalg.norm(np.asarray(codes) * np.asarray(scales) - wide) / np.linalg.norm(wide))
    return errors


def distributions(model: Qwen2AudioForConditionalGeneration, batches: list[dict]) -> np.ndarray:
    """Log-probabilities [N, vocabulary] of every token after the prompt, the right answers given."""
    found = []
    for batch in batches:
        logits = jax.nn.log_softmax(model(**batch["inputs"]).logits.astype(jnp.float32))
        found.append(np.asarray(logits)[batch["answer"]])
    return np.concatenate(found)


def answers(folder: Path, processor: Qwen2AudioProcessor, *, batch: int = 10) -> list[dict]:
    """Transcription records as inputs with their right answers, and where the answers' logits are."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    records = [record for record in records if "prompt" in record]
    batches = []
    for start in range(0, len(records) - batch + 1, batch):
        part = records[start : start + batch]
        audio = [[str(folder / name) for name in record["audios"]] for record in part]
        inputs = processor(text=[record["prompt"] + record["response"] for record in part], audio=audio)
        prompts = processor(text=[record["prompt"] for record in part], audio=audio)
        mask = np.asarray(inputs.attention_mask).astype(bool)
        answer = np.zeros_like(mask)
        for row, (new, old) in enumerate(zip(mask.sum(1), np.asarray(prompts.attention_mask).sum(1), strict=True)):
            first = mask[row].argmax()
            answer[row, first + old - 1 : first + new] = True
        batches.append({"inputs": dict(inputs), "answer": answer})
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=300)
    options = parser.parse_args()
    for name, error in layer_errors().items():
        print(f"| {name} | {100 * error:.2f} % |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "data")
        write_dataset(folder, clips=options.clips, seed=11, split="test")
        processor = Qwen2AudioProcessor.from_pretrained()
        batches = answers(folder, processor)
        logs = {
            name: distributions(Qwen2AudioForConditionalGeneration.from_pretrained(**how), batches)
            for name, how in STORED.items()
        }
    for base, other in (("float32", "bfloat16"), ("float32", "int8 weights"), ("bfloat16", "int8 weights")):
        divergence = (np.exp(logs[base]) * (logs[base] - logs[other])).sum(-1)
        same = (logs[base].argmax(-1) == logs[other].argmax(-1)).mean()
        print(
            f"| {base} against {other} | {divergence.mean():.2e} | {np.quantile(divergence, 0.99):.2e} | "
            f"{100 * same:.2f} % of {len(divergence)} |"
        )


if __name__ == "__main__":
    main()
