"""`qwen2audio train` as a user types it: settings that reach the run, and one-line refusals."""

import json
import sys
import types

import pytest

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.installed import pip_install

CONFIG = """
model = "some/model"
output = "runs/first"
steps = 30
[data]
train = ["data.jsonl"]
rows = 4
[optimizer]
name = "lion"
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "configs" / "run.toml"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.fixture
def started(monkeypatch, request):
    """What reaches the training loop, which is not run: (settings, what the progress was) of every start."""
    runs, stops_after = [], getattr(request, "param", None)

    def train(settings, *, progress=None):
        runs.append((settings, progress))
        if progress is not None:
            progress(1, {"loss": 2.5, "tokens_per_second": 1000.0})
        return types.SimpleNamespace(step=stops_after or settings.steps)

    monkeypatch.setitem(sys.modules, "qwen2audio_jax.train.loop", types.SimpleNamespace(train=train))
    return runs


def test_a_run_is_what_the_file_says(config, started, capsys):
    assert main(["train", str(config)]) == 0
    ((settings, progress),) = started
    assert (settings.model, settings.steps, settings.data.rows) == ("some/model", 30, 4)
    assert settings.output == str(config.parent / "runs" / "first")
    assert settings.data.train == (str(config.parent / "data.jsonl"),)
    assert progress is not None
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/30, loss 2.5, tokens/s 1,000",
        f"trained; the model is in {settings.output}/model",
    ]


def test_json(config, started, capsys):
    assert main(["train", str(config), "--json", "--quiet"]) == 0
    ((settings, _),) = started
    stands = {"state": "finished", "step": 30, "steps": 30, "output": settings.output}
    assert json.loads(capsys.readouterr().out) == stands


@pytest.mark.parametrize("started", [12], indirect=True)
def test_a_run_told_to_end_says_how_to_go_on(config, started, capsys):
    assert main(["train", str(config)]) == 0
    assert started
    assert "stopped after step 12 of 30; the same command goes on from there" in capsys.readouterr().err


def test_options_come_before_the_file(config, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The last is a folder's name, though TOML would read a number.
    options = ["--set", "data.rows=16", "--set", "optimizer.name = adamw", "--set=seed=7", "--output", "0123"]
    assert main(["train", str(config), *options, "--quiet"]) == 0
    ((settings, progress),) = started
    assert (settings.data.rows, settings.optimizer.name, settings.seed) == (16, "adamw", 7)
    assert settings.output == str(tmp_path / "0123")
    assert progress is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "data.rows"], "--set 'data.rows' is no NAME=VALUE; write it as in --set data.rows=16"),
        (["--set", "=4"], "--set '=4' is no NAME=VALUE; write it as in --set data.rows=16"),
        (["--set", "seed=1", "--set", "seed=2"], "--set seed is given twice, '1' and '2'; leave out one"),
        (["--set", "output=a", "--output", "b"], "given twice, by --output and by --set output; leave out one"),
        (["--set", "data.row=4"], "no setting 'row'"),
        (["--set", "data.rows=0"], "data.rows = 0, but it must be above 0"),
        (["--output", "gs://bucket/run"], "output = gs://bucket/run is a URL, and a run writes into a folder"),
        (["--set", "output=s3://bucket/run"], "output = s3://bucket/run is a URL"),
        (["--set", 'data.train=["gs://bucket/a.jsonl"]'], "data.train = gs://bucket/a.jsonl is a URL"),
        (["--set", "data.audio_root=https://a.example/"], "data.audio_root = https://a.example/ is a URL"),
    ],
)
def test_bad_options_are_refused(options, said, config, started, capsys):
    assert main(["train", str(config), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwen2audio train: ")
    assert said in err
    assert err.count("\n") == 1
    assert not started


def test_no_such_file(tmp_path, started, capsys):
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert "no training configuration at" in capsys.readouterr().err


def test_a_missing_extra_is_said_before_the_run(config, started, monkeypatch, capsys):
    from qwen2audio_jax.train import extra

    monkeypatch.setattr(extra, "PACKAGES", ("no_such_package",))
    assert main(["train", str(config)]) == 2
    said = f"training needs no_such_package; install it with: {pip_install('train')}"
    assert capsys.readouterr().err == f"qwen2audio train: {said}\n"
    assert not started


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "CONFIG training configuration: a TOML file" in text
    assert "continues from its last checkpoint when the same command is given again" in text
