"""Speed and memory of converting, verifying and exporting a checkpoint of the real 7B shape.

Writes random finite bf16 weights of that shape (876 tensors, 16.8 GB, 5 shards) once, copies the files as a measure
of the disk, then runs each command in a process of its own and notes wall time and peak resident memory:

    python benchmarks/convert_7b.py /big/folder [--scale 7b|1gb] [--keep] [--memory-gb 2]

Needs room for three times the weights. Results: convert_7b.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SHARDS = 5
STEPS = ("copy", "convert", "verify", "export", "compare")


def config_of(scale: str) -> dict:
    """config.json of the published model, or one with fewer layers and the same widths (1.1 GB)."""
    config = json.loads((ROOT / "configs" / "qwen2-audio-7b-instruct.json").read_text())
    config["torch_dtype"] = "bfloat16"
    if scale == "1gb":
        config["text_config"] |= {"num_hidden_layers": 2, "vocab_size": 20_000, "bos_token_id": 1, "eos_token_id": 2}
        config["audio_token_index"] = 3
        config["audio_config"] |= {"encoder_layers": 4}
    return config


def finite_bits(rng: np.random.Generator, count: int, *, norm: bool) -> np.ndarray:
    """Random bfloat16 numbers as 16-bit integers: 1 to 2 for norms, else +-0.008 to 0.03 as in a trained model."""
    values = rng.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)[:count]
    values &= np.uint16(0x007F if norm else 0x80FF)  # fraction; sign, one bit of exponent and fraction
    values |= np.uint16(0x3F80 if norm else 0x3C00)
    return values


def write_source(folder: Path, *, scale: str) -> None:
    """A Hugging Face folder under the published names, written tensor by tensor."""
    from hf_layout import renamed, tensor_shapes

    from qwen2audio_jax.checkpoint.safetensors_file import DTYPES
    from qwen2audio_jax.checkpoint.safetensors_writer import Planned, SafetensorsWriter

    config = config_of(scale)
    rng = np.random.default_rng(0)
    planned = [
        Planned(renamed(name, "old"), DTYPES["BF16"], shape) for name, shape in full_shapes(config, tensor_shapes)
    ]
    total = sum(each.nbytes for each in planned)
    shards: list[list[Planned]] = [[]]
    before = 0
    for each in planned:
        if before >= total * len(shards) / SHARDS:
            shards.append([])
        shards[-1].append(each)
        before += each.nbytes
    folder.mkdir(parents=True)
    weight_map = {}
    for k, shard in enumerate(shards):
        name = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        writer = SafetensorsWriter(folder / name, shard)
        for each in shard:
            left = each.nbytes // 2
            while left:
                count = min(left, 16 << 20)
                writer.write([finite_bits(rng, count, norm="norm" in each.name and each.name.endswith("weight"))])
                left -= count
            weight_map[each.name] = name
        writer.finish()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    print(f"{folder}: {len(planned)} tensors, {total} bytes, {len(shards)} shards", flush=True)


def full_shapes(config: dict, tensor_shapes) -> list[tuple[str, tuple[int, ...]]]:
    """Shapes by name; config.json of the published model leaves defaults out, which the table of tests needs."""
    from qwen2audio_jax.config import Qwen2AudioConfig

    whole = Qwen2AudioConfig.from_dict(config).to_dict()
    return list(tensor_shapes(whole).items())


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    from qwen2audio_jax.checkpoint.hf_folder import open_weights

    hashes = {}
    with open_weights(folder) as weights:
        for tensor in weights.tensors:
            digest = hashlib.sha256()
            for _, block in tensor.blocks():
                digest.update(block.reshape(-1).view(np.uint8))
            hashes[tensor.name] = digest.hexdigest()
    return hashes


def copy(src: Path, dst: Path) -> None:
    """The files, copied in pieces of 16 MiB and brought to the disk."""
    dst.mkdir()
    for path in sorted(src.iterdir()):
        with open(path, "rb") as source, open(dst / path.name, "wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            target.flush()
            os.fsync(target.fileno())


def inner(step: str, place: Path, *, memory_gb: float) -> None:
    """One step, in a process of its own; prints what it took."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    src, ckpt, back = place / "src", place / "ckpt", place / "back"
    began = time.monotonic()
    if step == "copy":
        copy(src, place / "copy")
    else:
        from qwen2audio_jax import convert as package

        if step == "convert":
            package.convert(src, ckpt, memory_gb=memory_gb)
        elif step == "verify":
            differences = package.verify(src, ckpt, memory_gb=memory_gb)
            assert not differences, differences[:5]
        elif step == "export":
            package.export(ckpt, back, memory_gb=memory_gb)
        else:
            ours, theirs = tensor_hashes(back), tensor_hashes(src)
            assert ours == theirs
            print(f"{len(ours)} tensors are byte-identical", flush=True)
    seconds = time.monotonic() - began
    size = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(f"| {step} | {seconds:.1f} s | {size / seconds / 1e9:.3f} GB/s | {peak / 1e9:.2f} GB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--scale", choices=["7b", "1gb"], default="7b")
    parser.add_argument("--memory-gb", type=float, default=2.0)
    parser.add_argument("--keep", action="store_true", help="keep src and ckpt")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--inner", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner is not None:
        inner(options.inner, options.place, memory_gb=options.memory_gb)
        return
    place = options.place.resolve()
    if not (place / "src").exists():
        sys.path.insert(0, str(ROOT))
        write_source(place / "src", scale=options.scale)
    for step in filter(None, options.steps.split(",")):
        command = [sys.executable, __file__, str(place), "--inner", step, "--memory-gb", str(options.memory_gb)]
        subprocess.run(command, check=True)
        if step == "copy":
            shutil.rmtree(place / "copy")
        if step == "compare":
            shutil.rmtree(place / "back")
    if not options.keep:
        for name in ("src", "ckpt"):
            shutil.rmtree(place / name)


if __name__ == "__main__":
    main()
