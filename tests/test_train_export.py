"""Export of a run's result: every weight's place and dtype, the files beside it, and leftovers of a failure."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from prompts import as_torch, random_inputs
from safetensors.numpy import load_file
from xla_flags import quick_flags

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.checkpoint import hf_folder, mapping, safetensors_writer
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.source import resolve_checkpoint
from qwen2audio_jax.train.export import adapter_folder, check_destination, finish
from qwen2audio_jax.train.model_card import CARD, RECORD, describe_result
from qwen2audio_jax.train.settings import DataSettings, LoraSettings, MachineSettings, TrainSettings
from qwen2audio_jax.train.trained_model import exported_folder, load_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Records:
    """A data set as far as a card asks of it."""

    sha256, skipped = "ab" * 32, ["a.jsonl:3: no answer"]

    def __len__(self):
        return 1234

    def steps_per_epoch(self):
        return 31


def settings_for(tmp_path, name="gqa", *, dtype="float32", **changes) -> TrainSettings:
    model = tmp_path / "start"
    if not model.exists():
        hf_layout.write_hf_checkpoint(model, name, naming="old", dtype=dtype)
    machine = MachineSettings(data=1, dtype="float32")
    data = DataSettings(train=(str(tmp_path / "some" / "where" / "records.jsonl"),))
    # A tied head is the embedding table.
    changes = {"train": ("encoder", "projector", "decoder"), **changes} if name == "tied" else changes
    return TrainSettings(
        **{
            "model": str(model),
            "output": str(tmp_path / "run"),
            "steps": 7,
            "data": data,
            "machine": machine,
            **changes,
        }
    )


def run_for(settings: TrainSettings) -> SimpleNamespace:
    devices = settings.machine.data * settings.machine.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:devices])
        model = load_model(settings)
    return SimpleNamespace(settings=settings, model=model, data=Records(), held_out=None)


def trained(run, *, change: float = 0.03) -> SimpleNamespace:
    """A state whose weights have moved, each by its own amounts."""
    rng = np.random.default_rng(1)

    def moved(leaf):
        return jax.device_put(np.asarray(leaf) + np.float32(change) * rng.standard_normal(leaf.shape), leaf.sharding)

    return SimpleNamespace(weights=jax.tree.map(lambda leaf: moved(leaf).astype(jnp.float32), run.model.weights))


def by_parameter(folder: Path, config) -> dict[str, np.ndarray]:
    """A folder's tensors by their path in our tree and in our layout, read by the safetensors library."""
    shapes = {name: leaf.shape for name, leaf in flatten_dict(parameter_specs(config), sep="/").items()}
    targets = mapping.expected_tensors(shapes)
    tensors = {mapping.canonical_name(name): value for name, value in load_file(folder / "model.safetensors").items()}
    return {
        target.parameter: tensors[name].T if target.transform == "reversed" else tensors[name]
        for name, target in targets.items()
    }


def flat(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(tree), sep="/").items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_sharded_over_a_mesh(tmp_path, dtype):
    """FSDP over 4 x 2 devices pads the vocabulary of 321 and splits everything; two parts stay as they were."""
    machine = MachineSettings(data=4, model=2, fsdp=True, dtype="bfloat16")
    settings = settings_for(tmp_path, dtype=dtype, machine=machine, train=("decoder", "head"))
    run = run_for(settings)
    state = trained(run)
    config = run.model.config
    assert run.model.weights["decoder"]["lm_head"]["kernel"].shape[1] > 321
    out = finish(run, state)
    assert out == exported_folder(settings)
    stored, before = by_parameter(out, config), by_parameter(Path(settings.model), config)
    moved = flat(state.weights)
    assert stored.keys() == before.keys()
    for name, value in stored.items():
        assert value.dtype == before[name].dtype == hf_layout.DTYPES[dtype]
        if name in moved:
            part = moved[name][tuple(slice(size) for size in value.shape)]
            assert value.tobytes() == np.ascontiguousarray(part.astype(value.dtype)).tobytes(), name
            assert not np.array_equal(value, before[name])
        else:
            assert name.startswith(("encoder/", "projector/"))
            assert value.tobytes() == before[name].tobytes(), name
    old, new = contents(Path(settings.model)), contents(out)
    assert new.keys() == {*old, CARD, RECORD}
    for name in old.keys() - {"config.json", hf_folder.WEIGHTS}:
        assert new[name] == old[name]
    assert json.loads(new["config.json"])["torch_dtype"] == dtype
    assert os.listdir(settings.output) == ["model"]


def test_transformers_and_this_package_load_it(tmp_path, load):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run = run_for(settings_for(tmp_path, "base"))
    out = finish(run, trained(run))
    ours = Qwen2AudioForConditionalGeneration.from_pretrained(out)
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(out, attn_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    inputs = random_inputs("base", side="left")
    with torch.no_grad():
        expected = theirs.generate(**as_torch(inputs), max_new_tokens=12, do_sample=False).numpy()
        before = load("base").generate(**inputs, max_new_tokens=12, do_sample=False)
    actual = np.asarray(ours.generate(**inputs, max_new_tokens=12, do_sample=False))
    np.testing.assert_array_equal(actual, expected)
    assert not np.array_equal(actual, np.asarray(before))
    assert transformers.AutoProcessor.from_pretrained(out).decode([72, 73]) == Qwen2AudioProcessor.from_pretrained(
        out
    ).decode([72, 73])


def test_drawn_weights(tmp_path):
    """Nothing to start from but settings: the dtype is that of config.json."""
    settings = settings_for(tmp_path, "tied", dtype="float16", from_scratch=True)
    os.remove(tmp_path / "start" / hf_folder.WEIGHTS)
    run = run_for(settings)
    state = trained(run)
    out = finish(run, state)
    expected = {**flat(run.model.frozen), **flat(state.weights)}
    for name, value in by_parameter(out, run.model.config).items():
        assert value.dtype == np.float16
        assert value.tobytes() == np.ascontiguousarray(expected[name].astype(np.float16)).tobytes()
    text = (out / CARD).read_text()
    assert "base_model" not in text
    assert "trained from freshly drawn weights" in text


def test_adapter_beside_the_merged_model(tmp_path):
    """Merged into the weights as stored, although the run computes with bfloat16 copies of them."""
    machine = MachineSettings(data=2, model=2, dtype="bfloat16")
    lora = LoraSettings(rank=3, alpha=4.0, targets=("q_proj", "fc1", "lm_head"))
    settings = settings_for(tmp_path, lora=lora, machine=machine)
    run = run_for(settings)
    out = finish(run, trained(run, change=0.2))
    expected = Qwen2AudioForConditionalGeneration.from_pretrained(settings.model, adapter=adapter_folder(settings))
    actual = Qwen2AudioForConditionalGeneration.from_pretrained(out)
    before = by_parameter(Path(settings.model), run.model.config)
    merged = flat(expected.params)
    changed = {name for name, value in flat(actual.params).items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{each}/kernel" for each in lora.targets))}
    for name, value in flat(actual.params).items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6 * np.abs(value).max())
    config = json.loads((adapter_folder(settings) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 4)
    describe_result(adapter_folder(settings), scores={"held out": {"sums": 0.5}})
    card = (adapter_folder(settings) / CARD).read_text()
    assert "library_name: peft" in card
    assert "| held out, sums | 0.5 |" in card
    assert sorted(os.listdir(settings.output)) == ["adapter", "model"]


def test_a_second_run_replaces_the_first_and_a_failed_one_leaves_it(tmp_path, monkeypatch):
    run = run_for(settings_for(tmp_path, "tied"))
    out = finish(run, trained(run))
    first = contents(out)
    finish(run, trained(run, change=0.1))
    second = contents(out)
    assert second.keys() == first.keys()
    assert second[hf_folder.WEIGHTS] != first[hf_folder.WEIGHTS]

    def fail(number):
        raise OSError("disk on fire")

    monkeypatch.setattr(safetensors_writer.os, "fsync", fail)
    with pytest.raises(OSError, match="disk on fire"):
        finish(run, trained(run))
    assert contents(out) == second
    assert os.listdir(tmp_path / "run") == ["model"]


def test_killed_before_its_place_is_taken(tmp_path, monkeypatch):
    """What a killed writer leaves is never where the result goes, and the next one clears it."""
    run = run_for(settings_for(tmp_path, "tied"))
    out = exported_folder(run.settings)
    monkeypatch.setattr("qwen2audio_jax.train.export._replace", lambda out, draft: None)
    finish(run, trained(run))
    assert not out.exists()
    (tmp_path / "run" / ".model.incomplete" / "stray").write_text("x")
    monkeypatch.undo()
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    finish(run, trained(run))
    assert os.listdir(tmp_path / "run") == ["model"]
    assert "stray" not in contents(out)


def test_refused_places(tmp_path):
    settings = settings_for(tmp_path, "tied")
    check_destination(settings)
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds something else \(there is no training.json\)"):
        check_destination(settings)
    (tmp_path / "run" / "model" / RECORD).write_text("{}")
    check_destination(settings)
    with pytest.raises(ValueError, match="the model to start from is where the result goes"):
        check_destination(dataclasses.replace(settings, model=str(tmp_path / "run" / "model")))


def test_a_weight_that_its_dtype_cannot_hold(tmp_path):
    run = run_for(settings_for(tmp_path, "tied", dtype="float16"))
    state = trained(run)
    state.weights["projector"]["bias"] = state.weights["projector"]["bias"].at[3].set(7e4)
    with pytest.raises(ValueError, match=r"projector/bias does not fit float16.*largest: 70000"):
        finish(run, state)
    assert not exported_folder(run.settings).exists()


def front_matter(text: str) -> dict[str, str]:
    _, head, _ = text.split("---\n", 2)
    return dict(re.findall(r"^(\w+): (.+)$", head, flags=re.MULTILINE))


def test_card(tmp_path):
    settings = settings_for(tmp_path, "tied", seed=5)
    (tmp_path / "run").mkdir()
    lines = [
        {"step": 5, "kind": "train", "loss": 2.0},
        {"step": 7, "kind": "train", "loss": 1.25, "learning_rate": 1e-5},
        {"step": 7, "kind": "evaluate", "loss": None, "accuracy": 0.5},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_for(settings)
    out = finish(run, trained(run))
    text = (out / CARD).read_text()
    assert front_matter(text) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
    }
    for part in ("1,234 trained on, 1 skipped, 0 held out", "ab" * 32, "| loss | 1.25 |", "| loss | not finite |"):
        assert part in text
    assert str(tmp_path) not in text + (out / RECORD).read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    read = tomllib.loads(block)
    assert read == json.loads((out / RECORD).read_text())["settings"]
    assert read["data"]["train"] == ["where/records.jsonl"]
    assert (read["seed"], read["optimizer"]["eps"], read["machine"]["accumulation"]) == (5, 1e-8, 1)
    describe_result(out, scores={"held out": {"digit error rate": 0.0125}, "sums": "98 %"}, title="A | title")
    text = (out / CARD).read_text()
    for part in ("# A | title", "| held out, digit error rate | 0.0125 |", "| sums | 98 % |", "| loss | 1.25 |"):
        assert part in text
    head = text.split("---")[1]
    assert '- name: "A | title"' in head
    results = [json.loads(line.strip("- ")) for line in head.splitlines() if line.startswith("  - {")]
    assert [(each["dataset"]["name"], each["metrics"][0]["value"]) for each in results] == [
        ("held-out records of the training run", 0.5),
        ("held out", 0.0125),
    ]
    describe_result(out, description="It hears *digits*.")
    assert "# A | title\n\nIt hears *digits*.\n\n" in (out / CARD).read_text()
    with pytest.raises(ValueError, match=r"holds no training.json"):
        describe_result(tmp_path, scores={})


def test_card_names_a_base_model_on_the_hub(tmp_path):
    run = run_for(settings_for(tmp_path, "tied"))
    run.settings = dataclasses.replace(run.settings, model="some-one/a_model")
    out = finish(run, trained(run))
    assert front_matter((out / CARD).read_text())["base_model"] == '"some-one/a_model"'


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import jax
port, rank, folder, root = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))
import qwen2audio_jax
qwen2audio_jax.__path__.append(root)  # convert/ stands beside the package where that is not installed
import test_train_export as t
from qwen2audio_jax.train.export import exported_folder, finish
machine = t.MachineSettings(data=2, model=2, fsdp=True, dtype="float32")
settings = t.settings_for(Path(folder), machine=machine, train=("decoder", "head"))
run = t.SimpleNamespace(settings=settings, model=t.load_model(settings), data=t.Records(), held_out=None)
double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), out_shardings=run.model.shardings)
state = t.SimpleNamespace(weights=double(run.model.weights))
assert not run.model.weights["decoder"]["lm_head"]["kernel"].is_fully_addressable
finish(run, state)
if rank == "0":
    (exported_folder(settings) / "training.json").unlink()
try:
    finish(run, state)
except (ValueError, OSError) as error:
    Path(folder, f"error{rank}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow(seconds=12)
def test_two_processes(tmp_path):
    """Weights split between processes; and where the first one fails, the other fails too instead of waiting."""
    settings = settings_for(tmp_path)
    resolve_checkpoint(settings.model)  # one process alone can convert
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": places, "XLA_FLAGS": quick_flags(devices=1)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(rank), str(tmp_path), str(ROOT)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    run = run_for(dataclasses.replace(settings, train=("decoder", "head")))
    stored, before = (
        by_parameter(place, run.model.config) for place in (exported_folder(settings), tmp_path / "start")
    )
    for name, value in before.items():
        factor = 2 if name.startswith("decoder/") else 1
        np.testing.assert_array_equal(stored[name], factor * value)
    assert (tmp_path / "error0").read_text().startswith("ValueError: ")
    assert (tmp_path / "error1").read_text().startswith("OSError: ")
    assert "the first process could not write the result" in (tmp_path / "error1").read_text()
