"""`qwen2audio doctor`: a complete checkpoint passes, and each possible defect is reported."""

import json
import shutil

import hf_layout
import numpy as np
import pytest
import sounds

from qwen2audio_jax.cli import doctor, smoke
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.convert import convert


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    hf_layout.write_hf_checkpoint(folder / "hf", "base")
    convert(folder / "hf", folder / "orbax")
    return folder / "orbax"


def examine(path, capsys, *arguments) -> tuple[int, list[str]]:
    code = main(["doctor", "--model", str(path), *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_one(whole, capsys):
    code, lines = examine(whole, capsys)
    assert code == 0
    assert len(lines) == 5
    assert all(line.startswith("ok ") for line in lines)
    count = len(json.loads((whole / "manifest.json").read_text())["parameters"])
    assert f"{count} tensors" in lines[1]


def damaged(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "damaged")


def test_a_changed_byte_and_a_lost_file(whole, tmp_path, capsys):
    path = damaged(whole, tmp_path)
    file = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (path / "tokenizer.json").unlink()
    code, lines = examine(path, capsys)
    assert code == 1
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert len(problems) == 2
    assert "bytes: every parameter" in problems[0]
    assert "tokenizer" in problems[1]
    assert any("its bytes do not have the manifest's sha256" in line for line in lines)
    file.unlink()
    code, lines = examine(path, capsys)
    assert code == 1
    assert "PROBLEM files" in lines[0]
    assert f"missing {file.relative_to(path)}" in lines[1]


def test_other_shapes(whole, tmp_path, capsys):
    path = damaged(whole, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 4
    config["text_config"]["num_hidden_layers"] -= 1
    (path / "config.json").write_text(json.dumps(config))
    code, lines = examine(path, capsys)
    assert code == 1
    assert any("misshapen decoder/layers/0/mlp/up_proj/kernel" in line for line in lines)
    assert any("unexpected decoder/layers/" in line for line in lines)


def test_not_finite(tmp_path, capsys):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    tensors["model.audio_tower.conv1.bias"][3] = np.nan
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax", non_finite="allow")
    code, lines = examine(tmp_path / "orbax", capsys)
    assert code == 1
    assert any("encoder/conv1/bias holds NaN or Inf" in line for line in lines)


def test_no_checkpoint(tmp_path, capsys):
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    assert "holds neither an Orbax checkpoint" in capsys.readouterr().err


def test_the_clip(whole, tmp_path, capsys, monkeypatch):
    clip = tmp_path / "glass.wav"
    clip.write_bytes(sounds.encode("wav", sounds.speech(16_000, rate=16_000), 16_000))
    code, lines = examine(whole, capsys, "--glass-clip", clip)
    assert code == 1
    assert "PROBLEM clip of breaking glass" in lines[-2]
    assert "'Glass is breaking.'" in lines[-1]
    said = lines[-1].split("it says ")[1].split("; the published")[0]
    monkeypatch.setattr(doctor, "PUBLISHED", eval(said))
    code, lines = examine(whole, capsys, "--glass-clip", clip)
    assert code == 0
    assert "ok      clip of breaking glass" in lines[-1]


@pytest.mark.parametrize(("error", "code"), [(1e-6, 0), (2e-5, 1), (float("nan"), 1)])
def test_what_smoke_shows(capsys, monkeypatch, error, code):
    stages = [smoke.Stage("encoder", "float32", "xla", error, 1e-5, 1.25)]
    monkeypatch.setattr(smoke, "smoke", lambda: ("gpu: H200", stages))
    assert main(["doctor", "--smoke"]) == code
    out = capsys.readouterr().out
    assert "gpu: H200" in out
    assert "1.250 ms" in out
    assert ("PROBLEM" in out) == bool(code)


@pytest.mark.slow(seconds=20)
def test_smoke(capsys):
    """Every stage of the embedded model, by two programs each: the bars hold."""
    assert main(["doctor", "--smoke", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    names = ["log-mel", "encoder", "projector", "prefill", "decode"]
    assert [stage["name"] for stage in found["stages"]] == [*names, *names[1:]]
    for stage in found["stages"]:
        assert 0 < stage["error"] <= stage["bar"]
        assert stage["milliseconds"] > 0
