"""Speed on one NVIDIA GPU beside transformers, on a machine that can install nothing from a network.

    sh benchmarks/gpu_wheels.sh wheels                           # where there is a network
    python benchmarks/gpu.py setup --wheels wheels --venvs venvs   # on the machine: two environments
    python benchmarks/gpu.py measure --venvs venvs --output results/gpu
    python benchmarks/gpu.py measure --config tiny --device cpu --prompt 40 --output /tmp/gpu   # the script itself

Random weights are made on the device, nothing is downloaded and no checkpoint is written. Decoding at batch 1, 8 and
32, a prefill of 780 tokens and a clip of 30 s, by this package and by transformers, eagerly and with a static cache
that torch.compile has compiled, each in a process of its own. What does not fit into --seconds is left out and said.
Writes OUTPUT.json after every case, and OUTPUT.md: beside the times the bandwidth and the FLOP/s that the exact work
makes of them, as shares of what the chip's data sheet says. So far it has been run with the last command alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

SIDES = {"ours": 0.5, "transformers": 0.6, "transformers, compiled": 1.0}
"""Who is measured, and the share of the time that is over when it ends."""
ROWS = (1, 8, 32)
NEW = 65
"""New tokens of a call; less a call for the first one alone, that is the time of decoding."""
OPTIONS = {"do_sample": False, "pad_token_id": 0}

Run = Callable[[], Any]


def cases(run: Callable[..., Run]) -> dict[str, tuple[Run, Run | None, int]]:
    """Name -> the call to time, the call that is subtracted, and the steps in between; `run(kind, rows, new)`."""
    found: dict[str, tuple[Run, Run | None, int]] = {"encode 30 s": (run("encode", 1, 0), None, 1)}
    found["prefill"] = (run("generate", 1, 1), None, 1)
    for rows in ROWS:
        found[f"decode, batch {rows}"] = (run("generate", rows, NEW), run("generate", rows, 1), NEW - 1)
    return found


def timed(run: Run | None, repeats: int) -> float:
    """Median seconds after one call that compiles."""
    if run is None:
        return 0.0
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(settings: dict[str, Any]) -> Callable[..., Run]:
    """The calls of this package."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, make_mesh
    from qwen2audio_jax.model.qwen2_audio import sharded_specs

    config = replace(Qwen2AudioConfig.from_dict(settings["config"]), dtype=settings["dtype"])
    mesh = make_mesh(data=1, model=1, devices=jax.devices()[:1])
    random = jax.jit(
        lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnames=("shape", "dtype")
    )
    leaves, tree = jax.tree.flatten(sharded_specs(config, mesh=mesh))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jax.device_put(random(key, leaf.shape, leaf.dtype), leaf.sharding)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    model = Qwen2AudioForConditionalGeneration(config, jax.tree.unflatten(tree, made), mesh=mesh)
    audio, rng = config.audio_config, np.random.default_rng(0)
    features = rng.normal(size=(1, audio.num_mel_bins, audio.max_frames)).astype(np.float32)
    mask = np.ones((1, audio.max_frames), np.int32)

    def run(kind: str, rows: int, new: int) -> Run:
        if kind == "encode":
            return lambda: jax.block_until_ready(model.encode_audio(features, mask))
        ids = rng.integers(0, 200, (rows, settings["prompt"])).astype(jnp.int32)
        return lambda: model.generate(input_ids=ids, max_new_tokens=new, eos_token_id=[], **OPTIONS)

    return run


def theirs(settings: dict[str, Any], *, compiled: bool) -> Callable[..., Run]:
    """The calls of transformers."""
    import torch
    import transformers

    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    config = transformers.Qwen2AudioConfig.from_dict(settings["config"])
    with torch.device(device):
        model = transformers.Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype).eval()
        audio = config.audio_config
        features = torch.randn(1, audio.num_mel_bins, 2 * audio.max_source_positions, dtype=dtype)
    options: dict[str, Any] = {**OPTIONS, "eos_token_id": None}
    if compiled:
        compile_config = transformers.CompileConfig(dynamic=False)
        compile_config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    def wait(value: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def encode() -> None:
        wait(model.model.multi_modal_projector(model.model.audio_tower(features).last_hidden_state))

    def run(kind: str, rows: int, new: int) -> Run:
        if kind == "encode":
            return encode
        ids = torch.randint(0, 200, (rows, settings["prompt"]), device=device)
        mask = torch.ones_like(ids)
        return lambda: wait(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)
        )

    return run


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and bytes of every case by arithmetic, and the chip's limits: see `qwen2audio_jax.plan`."""
    import jax

    from qwen2audio_jax import Qwen2AudioConfig
    from qwen2audio_jax.plan.chips import CHIPS
    from qwen2audio_jax.plan.request import Shapes
    from qwen2audio_jax.plan.topology import abstract_mesh
    from qwen2audio_jax.plan.work import work_of

    config = replace(Qwen2AudioConfig.from_dict(settings["config"]), dtype=settings["dtype"])
    prompt, frames = settings["prompt"], config.audio_config.max_frames
    wanted = {"encode 30 s": ("encode", 1), "prefill": ("prefill", 1)}
    wanted |= {f"decode, batch {rows}": ("decode", rows) for rows in ROWS}
    done = {}
    for name, (stage, rows) in wanted.items():
        shapes = Shapes(rows, prompt, prompt + NEW // 2, rows, frames)
        one = work_of(stage, config, shapes, mesh=abstract_mesh(1, 1), cache_dtype=settings["dtype"])
        done[name] = {"flops": one.flops, "bytes": one.bytes}
    kind = jax.devices()[0].device_kind
    words = kind.lower().replace("-", " ").split()
    fitting = [chip for chip in CHIPS if chip.kind == "gpu" and set(chip.name.split("-")) <= set(words)]
    chip = max(fitting, key=lambda chip: len(chip.name), default=None)
    limits = None if chip is None else {"flops": chip.bf16_flops, "bandwidth": chip.hbm_bandwidth, "name": chip.name}
    return {"work": done, "chip": limits, "device": kind, "versions": {"jax": jax.__version__}}


def side(name: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a process of its own prints, a line at a time."""
    if name == "ours":
        yield work(settings)
    run = ours(settings) if name == "ours" else theirs(settings, compiled="compiled" in name)
    longest = 0.0
    for case, (call, less, steps) in cases(run).items():
        if case == "encode 30 s" and "compiled" in name:  # generate compiles its decode step alone
            continue
        began = time.time()
        if began + longest > settings["deadline"]:
            yield {"case": case, "skipped": "no time was left"}
            continue
        try:
            seconds = (timed(call, settings["repeats"]) - timed(less, settings["repeats"])) / steps
            yield {"case": case, "seconds": seconds}
        except Exception as error:  # such as too little memory: the other cases go on
            yield {"case": case, "skipped": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        longest = max(longest, time.time() - began)


def measure(arguments: argparse.Namespace) -> None:
    """Run every side, and write what it says as it says it."""
    began, here = time.time(), Path(__file__).resolve()
    config = Path(arguments.config)
    config = config if config.exists() else here.parent.parent / "configs" / f"{arguments.config}.json"
    names = ("device", "dtype", "prompt", "repeats", "seconds")
    settings = {"config": json.loads(config.read_text()), **{name: getattr(arguments, name) for name in names}}
    report: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "times": {}}
    report |= {name: settings[name] for name in names}
    environment = {**os.environ, "JAX_PLATFORMS": arguments.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["PYTHONPATH"] = str(here.parent.parent)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, share in SIDES.items():
        settings["deadline"] = began + share * arguments.seconds
        venv = "ours" if name == "ours" else "theirs"
        python = sys.executable if arguments.venvs is None else str(arguments.venvs / venv / "bin" / "python")
        report["times"][name] = {}
        command = [python, str(here), "side", name, json.dumps(settings)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            killer = threading.Timer(max(settings["deadline"] + 20 - time.time(), 1), process.kill)
            killer.start()
            for line in process.stdout or ():
                if line.startswith("{"):
                    said = json.loads(line)
                    if "case" in said:
                        report["times"][name][said.pop("case")] = said
                    else:
                        report |= said
                    print(name, line.strip(), flush=True)
                    report["total_seconds"] = round(time.time() - began)
                    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            killer.cancel()
    arguments.output.with_suffix(".md").write_text(table(report))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    chip = report.get("chip")
    rows = [f"`{report['command']}`: {report.get('device')}, {report['dtype']}, {report['total_seconds']} s in all", ""]
    if chip:
        rows += [f"{chip['name']}: {chip['bandwidth'] / 1e9:.0f} GB/s, {chip['flops'] / 1e12:.0f} TFLOP/s", ""]
    rows += [
        "| case | by | ms | tokens/s | GB/s | of the chip's | TFLOP/s | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, done in report.get("work", {}).items():
        for name, times in report["times"].items():
            seconds = times.get(case, {}).get("seconds")
            if seconds is None or seconds <= 0:
                reason = times.get(case, {}).get("skipped", "not measured")
                rows.append(f"| {case} | {name} | {reason} | | | | | |")
                continue
            rate = f"{int(case.split()[-1]) / seconds:.1f}" if case.startswith("decode") else ""
            bandwidth, flops = done["bytes"] / seconds, done["flops"] / seconds
            shares = [f"{bandwidth / chip['bandwidth']:.0%}", f"{flops / chip['flops']:.0%}"] if chip else ["", ""]
            rows.append(
                f"| {case} | {name} | {1e3 * seconds:.2f} | {rate} | {bandwidth / 1e9:.1f} | {shares[0]} | "
                f"{flops / 1e12:.2f} | {shares[1]} |"
            )
    return "\n".join(rows) + "\n"


def setup(arguments: argparse.Namespace) -> None:
    """Two environments, from wheels alone."""
    for venv, packages in {"ours": ["qwen2audio-jax[cuda]"], "theirs": ["torch", "transformers"]}.items():
        folder = arguments.venvs / venv
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-index", "--find-links"]
        subprocess.run([*pip, str(arguments.wheels), *packages], check=True)


def main() -> None:
    if sys.argv[1:2] == ["side"]:
        for said in side(sys.argv[2], json.loads(sys.argv[3])):
            print(json.dumps(said), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("setup", help="make the environments")
    command.add_argument("--wheels", type=Path, required=True)
    command.add_argument("--venvs", type=Path, required=True)
    command.set_defaults(run=setup)
    command = commands.add_parser("measure", help="measure all sides")
    command.add_argument("--venvs", type=Path, help="default: this Python for all")
    command.add_argument("--config", default="qwen2-audio-7b", help="a configuration of the package, or a file")
    command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    command.add_argument("--prompt", type=int, default=780, help="tokens")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--seconds", type=float, default=480.0)
    command.add_argument("--output", type=Path, default=Path("gpu"))
    command.set_defaults(run=measure)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
