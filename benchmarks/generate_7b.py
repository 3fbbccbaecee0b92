"""Generation with a converted checkpoint of the 7B shape on a CPU in bfloat16, compared with PyTorch.

    python benchmarks/convert_7b.py FOLDER --keep
    python benchmarks/generate_7b.py FOLDER

A clip of 3 s and four new tokens, each side in a process of its own, one after the other: PyTorch in float32 (stored in
bfloat16, every layer widened while it computes, so that it fits), which chooses the tokens; PyTorch in bfloat16; this
package in bfloat16. Errors are those of the logits that choose the four tokens, given float32's tokens. Needs 20 GB of
memory and the extra `test`. Results: generate_7b.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIDES = ("float32", "torch", "ours")
NEW = 4
SECONDS = 3.0


def inputs_of(src: Path) -> dict[str, np.ndarray]:
    """A prompt of random text around a clip: [1, T] ids, [1, 128, 3000] log-mel, and their masks."""
    from qwen2audio_jax import Qwen2AudioProcessor

    config = json.loads((src / "config.json").read_text())
    rng = np.random.default_rng(0)
    t = np.arange(int(SECONDS * 16000)) / 16000
    clip = 0.3 * np.sin(2 * np.pi * (200 + 150 * t) * t) + 0.02 * rng.standard_normal(len(t))
    heard = Qwen2AudioProcessor.from_pretrained().feature_extractor([clip.astype(np.float32)])
    tokens = (int(SECONDS * 100) // 2 - 2) // 2 + 1
    text = rng.integers(0, 150_000, 24)
    ids = np.concatenate([text[:8], np.full(tokens, config["audio_token_index"]), text[8:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "input_features": np.asarray(heard["input_features"], np.float32),
        "feature_attention_mask": np.asarray(heard["feature_attention_mask"]),
    }


def run_torch(src: Path, *, dtype: str, forced: list[int] | None) -> dict:
    """The reference; `forced` are the tokens whose logits are wanted (None: its own)."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    began = time.monotonic()
    model = Qwen2AudioForConditionalGeneration.from_pretrained(src, dtype=torch.bfloat16).eval()
    loaded = time.monotonic() - began
    if dtype == "float32":
        widen(model)
    inputs = {name: torch.from_numpy(value) for name, value in inputs_of(src).items()}
    if dtype == "bfloat16":
        inputs["input_features"] = inputs["input_features"].bfloat16()
    with torch.inference_mode():
        first, each, tokens = timed(
            lambda n: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0].tolist(),
            warm=dtype == "bfloat16",
        )
        chosen = tokens if forced is None else forced
        more = torch.tensor([chosen[:-1]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs).logits[0, -NEW:].float().numpy()
    return {"loaded": loaded, "first": first, "each": each, "tokens": tokens, "logits": logits}


def widen(model) -> None:
    """Let a model whose weights are stored in bfloat16 compute in float32, a layer at a time."""
    import torch

    audio, decoder, head = model.model.audio_tower, model.model.language_model, model.lm_head
    layers = [*audio.layers, *decoder.layers]
    kept = {id(p) for layer in layers for p in layer.parameters()}
    kept |= {id(decoder.embed_tokens.weight), id(head.weight)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    stored: dict[int, torch.Tensor] = {}

    def before(layer, *_):
        for parameter in layer.parameters():
            stored[id(parameter)] = parameter.data
            parameter.data = parameter.data.float()

    def after(layer, *_):
        for parameter in layer.parameters():
            parameter.data = stored.pop(id(parameter))

    for layer in layers:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    decoder.embed_tokens.register_forward_hook(lambda _, __, out: out.float())
    head.forward = lambda x: torch.cat([x @ rows.float().T for rows in head.weight.split(8192)], -1)


def run_ours(ckpt: Path, src: Path, *, forced: list[int]) -> dict:
    """The same from the converted checkpoint."""
    from qwen2audio_jax import Qwen2AudioForConditionalGeneration

    began = time.monotonic()
    model = Qwen2AudioForConditionalGeneration.from_pretrained(ckpt)
    loaded = time.monotonic() - began
    inputs = inputs_of(src)
    width = inputs["input_ids"].shape[1]
    options = {"do_sample": False}
    first, each, tokens = timed(
        lambda n: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, **options)[0].tolist()[: width + n],
        warm=True,
    )
    inputs["input_ids"] = np.concatenate([inputs["input_ids"], [forced[:-1]]], 1)
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    logits = np.asarray(model(**inputs).logits[0, -NEW:], np.float32)
    return {"loaded": loaded, "first": first, "each": each, "tokens": tokens, "logits": logits}


def timed(generate, *, warm: bool = False) -> tuple[float, float, list[int]]:
    """Seconds to the first token and for each further one, without compiling or reading files; the tokens."""
    if warm:
        generate(1), generate(NEW)
    began = time.monotonic()
    generate(1)
    first = time.monotonic() - began
    began = time.monotonic()
    tokens = generate(NEW)[-NEW:]
    return first, (time.monotonic() - began - first) / (NEW - 1), tokens


def run_side(place: Path, side: str) -> None:
    forced = None if side == "float32" else np.load(place / "float32.npz")["tokens"].tolist()
    if side == "ours":
        result = run_ours(place / "ckpt", place / "src", forced=forced)
    else:
        result = run_torch(place / "src", dtype="bfloat16" if side == "torch" else side, forced=forced)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    np.savez(place / f"{side}.npz", peak=peak, **result)


def report(place: Path) -> None:
    results = {side: np.load(place / f"{side}.npz") for side in SIDES if (place / f"{side}.npz").exists()}
    exact = results["float32"]["logits"]
    print("| | load | first token | each further token | peak memory | RMS error | largest error | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for side, result in results.items():
        error = result["logits"] - exact
        rms, largest = np.sqrt(np.mean(error**2)), np.abs(error).max()
        cells = [f"{result[key]:.1f} s" for key in ("loaded", "first", "each")]
        print(
            f"| {side} | {' | '.join(cells)} | {result['peak']:.1f} GB | {rms:.5f} | {largest:.5f} "
            f"| {result['tokens'].tolist()} |"
        )
    top = np.sort(exact, axis=-1)[:, -2:]
    print("spread of the logits:", exact.std(), "gaps between the two best:", (top[:, 1] - top[:, 0]).round(4).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="holds src/ and ckpt/, as convert_7b.py leaves them")
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process")
    options = parser.parse_args()
    if options.side:
        run_side(options.place, options.side)
        return
    for side in SIDES:
        subprocess.run([sys.executable, __file__, str(options.place), "--side", side], check=True)
    report(options.place)


if __name__ == "__main__":
    main()
