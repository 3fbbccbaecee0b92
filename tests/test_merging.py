"""An adapter added while a checkpoint is converted: the sum, what is recorded, and what is refused."""

import json
import re
import shutil
from dataclasses import dataclass

import hf_layout
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_convert import expected_parameters, memory_gb, restore

from qwen2audio_jax.checkpoint import adapter, reader
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import add_adapter, convert, verify
from qwen2audio_jax.model.lora import init_adapter

CONFIG = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])


@dataclass(frozen=True)
class Settings:
    rank: int = 3
    alpha: float = 5.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "down_proj")


def write_adapter(folder, *, seed=0, scale=0.3):
    """A random adapter on disk, and its products: path of a kernel -> scale * a . b in float64."""
    settings = Settings()
    rng = np.random.default_rng(seed)
    tree = init_adapter(CONFIG, settings, seed=0)
    flat = {path: rng.normal(0, scale, leaf.shape).astype(np.float32) for path, leaf in flatten_dict(tree).items()}
    from flax.traverse_util import unflatten_dict

    adapter.save_adapter(folder, unflatten_dict(flat), settings=settings, config=CONFIG, base_model="base")
    products = {}
    for (*path, side), a in flat.items():
        if side == "lora_a":
            b = flat[(*path, "lora_b")].astype(np.float64)
            products["/".join([*path, "kernel"])] = a.astype(np.float64) @ b * (settings.alpha / settings.rank)
    assert len(products) > 3
    return products


@pytest.fixture
def hf(tmp_path):
    return tmp_path / "hf"


@pytest.mark.parametrize("dtype", hf_layout.DTYPES)
def test_sum_in_float32_and_everything_else_untouched(tmp_path, hf, dtype, monkeypatch):
    monkeypatch.setattr(add_adapter, "_BLOCK_BYTES", 1000)
    tensors = hf_layout.write_hf_checkpoint(hf, "gqa", naming="old", dtype=dtype, shards=2)
    products = write_adapter(tmp_path / "adapter")
    convert(hf, tmp_path / "orbax", adapter=tmp_path / "adapter", memory_gb=memory_gb(60_000))
    merged, plain = restore(tmp_path / "orbax"), expected_parameters(tensors)
    for name, value in plain.items():
        if name not in products:
            assert merged[name].tobytes() == np.ascontiguousarray(value).tobytes(), name
            continue
        exact = value.astype(np.float64) + products[name]
        assert merged[name].dtype == value.dtype
        # half a unit in the last place of the dtype, and what float32 itself rounds
        bound = 0.51 * float(ml_dtypes.finfo(value.dtype).eps) * np.abs(exact) + 1e-6
        assert (np.abs(merged[name].astype(np.float64) - exact) <= bound).all(), name
        assert np.abs(merged[name].astype(np.float64) - value.astype(np.float64)).max() > 0.1
    assert verify(hf, tmp_path / "orbax", adapter=tmp_path / "adapter") == []
    stated = reader.read_manifest(tmp_path / "orbax")["source"]["adapter"]
    assert stated["source"] == str(tmp_path / "adapter")
    assert re.fullmatch("[0-9a-f]{64}", stated["sha256"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_merges_to_the_same(tmp_path, reference, hf_checkpoint):
    peft = pytest.importorskip("peft")
    import copy

    write_adapter(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference("gqa")), tmp_path / "adapter").merge_and_unload()
    state = {key: value.detach().numpy() for key, value in theirs.state_dict().items()}
    convert(hf_checkpoint("gqa"), tmp_path / "orbax", adapter=tmp_path / "adapter")
    ours = restore(tmp_path / "orbax")
    for name, value in expected_parameters(state).items():
        assert np.abs(ours[name] - value).max() <= 1e-6 * np.abs(value).max(), name


def test_verify_needs_the_same_adapter(tmp_path, hf):
    hf_layout.write_hf_checkpoint(hf, "gqa")
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", seed=1)
    convert(hf, tmp_path / "plain")
    convert(hf, tmp_path / "merged", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"was converted with the adapter .*adapter; give it"):
        verify(hf, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"is not the adapter that .* was converted with"):
        verify(hf, tmp_path / "merged", adapter=tmp_path / "other")
    with pytest.raises(ValueError, match="was converted without an adapter"):
        verify(hf, tmp_path / "plain", adapter=tmp_path / "other")
    shutil.rmtree(tmp_path / "merged" / "params")
    shutil.copytree(tmp_path / "plain" / "params", tmp_path / "merged" / "params")  # as if nothing had been added
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    manifest["source"] = reader.read_manifest(tmp_path / "merged")["source"]
    (tmp_path / "merged" / "manifest.json").write_text(json.dumps(manifest))
    differences = verify(hf, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert sum("values differ from the source's" in each for each in differences) > 3


def test_command_and_resume(tmp_path, hf, capfd):
    hf_layout.write_hf_checkpoint(hf, "gqa")
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", seed=1)

    def stop(done, total):
        if done > total // 2:
            raise OSError("disk on fire")

    options = {"memory_gb": memory_gb(60_000)}
    with pytest.raises(OSError, match="disk on fire"):
        convert(hf, tmp_path / "orbax", adapter=tmp_path / "adapter", on_progress=stop, **options)
    for wrong in (None, tmp_path / "other"):
        with pytest.raises(ValueError, match="unfinished checkpoint with adapter"):
            convert(hf, tmp_path / "orbax", adapter=wrong)
    arguments = [str(hf), str(tmp_path / "orbax"), "--adapter", str(tmp_path / "adapter")]
    assert command.main(arguments) == 0
    assert command.main(["verify", *arguments]) == 0
    capfd.readouterr()


def test_refusals(tmp_path, hf):
    hf_layout.write_hf_checkpoint(hf, "gqa")
    write_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no such adapter folder, nor a hub id"):
        convert(hf, tmp_path / "no", adapter=tmp_path / "none")
    weights = load_file(tmp_path / "adapter" / adapter.WEIGHTS)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * np.float32(np.inf)}, tmp_path / "adapter" / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=r"with the adapter added holds NaN or Inf"):
        convert(hf, tmp_path / "no", adapter=tmp_path / "adapter")
    del weights[name]
    save_file(weights, tmp_path / "adapter" / adapter.WEIGHTS)
    with pytest.raises(ValueError, match="the adapter does not fit this model"):
        convert(hf, tmp_path / "no", adapter=tmp_path / "adapter")
    assert not (tmp_path / "no").exists()
