"""`qwen2audio models`: the cache folder's entries are listed, and only what nothing needs is cleaned away."""

import json
import os
import shutil

import hf_layout
import pytest
import tiny
from filelock import FileLock

from qwen2audio_jax.checkpoint.reader import MARKER, is_checkpoint
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.source import resolve_checkpoint


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hf(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    return tmp_path / "hf"


def models(cache, capsys, *options):
    """(exit code, stdout, stderr)."""
    code = main(["models", "--cache-dir", str(cache), *map(str, options)])
    return code, *capsys.readouterr()


def states(cache, capsys):
    code, out, _ = models(cache, capsys, "--json")
    assert code == 0
    return {each["name"]: (each["state"], each["weights"]) for each in json.loads(out)["models"]}


def edit_template(hf, text):
    (hf / "chat_template.jinja").write_text(text)
    return resolve_checkpoint(hf, cache_dir=hf.parent / "cache")


def new_weights(hf, seed):
    hf_layout.write_tensors(hf, hf_layout.random_tensors(tiny.CONFIGS["tied"], seed=seed))
    return resolve_checkpoint(hf, cache_dir=hf.parent / "cache")


def test_nothing_there(cache, capsys):
    assert models(cache, capsys) == (0, f"{cache}: 0 entries, 0 B\n", "")
    assert models(cache, capsys, "--clean")[::2] == (0, "0 B freed\n")
    assert not cache.exists()


def test_entries_with_source_size_and_state(hf, cache, capsys):
    place = resolve_checkpoint(hf, cache_dir=cache)
    (cache / "notes").mkdir()
    (cache / "a.txt").write_text("x")
    code, out, _ = models(cache, capsys)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == place.name
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    assert lines[1] == f"    {size / 1000:.3g} kB, ready; from {hf}"
    assert lines[2].startswith(f"{cache}: 1 entry, ")
    assert len(lines) == 3


def test_an_earlier_state_stays_while_its_weights_are_used(hf, cache, capsys):
    first = resolve_checkpoint(hf, cache_dir=cache)
    second, third = edit_template(hf, "a"), edit_template(hf, "b")
    expected = {first.name: ("ready", None), second.name: ("earlier state", first.name)}
    assert states(cache, capsys) == expected | {third.name: ("ready", first.name)}
    code, _, err = models(cache, capsys, "--clean")
    assert (code, err.splitlines()[0]) == (0, f"removed {second.name}")
    assert states(cache, capsys) == {first.name: ("ready", None), third.name: ("ready", first.name)}
    assert resolve_checkpoint(hf, cache_dir=cache) == third


def test_other_weights_make_an_earlier_state_that_can_go(hf, cache, capsys):
    first, view = resolve_checkpoint(hf, cache_dir=cache), edit_template(hf, "a")
    second = new_weights(hf, 5)
    assert [state for state, _ in states(cache, capsys).values()].count("earlier state") == 2
    assert "2 of them nothing needs: qwen2audio models --clean removes these" in models(cache, capsys)[1]
    assert models(cache, capsys, "--clean")[0] == 0
    assert not first.exists()
    assert not view.exists()
    assert is_checkpoint(second)
    assert not list(cache.glob(f"{first.name}*"))


def test_a_copy_of_another_folder_keeps_the_weights(hf, cache, capsys, tmp_path):
    first = resolve_checkpoint(hf, cache_dir=cache)
    shutil.copytree(hf, tmp_path / "copy")
    copy = resolve_checkpoint(tmp_path / "copy", cache_dir=cache)
    new_weights(hf, 6)
    assert states(cache, capsys)[first.name] == ("ready", None)
    code, _, err = models(cache, capsys, "--remove", first.name)
    assert (code, first.exists()) == (2, True)
    assert f"its weights are those of {copy.name} as well; remove these with it" in err
    assert models(cache, capsys, "--remove", first.name, copy.name)[0] == 0
    assert (first.exists(), copy.exists()) == (False, False)


def test_unfinished_and_unusable_ones(hf, cache, capsys):
    place = resolve_checkpoint(hf, cache_dir=cache)
    view = edit_template(hf, "a")
    unfinished = cache / "other-0123-4567"
    unfinished.mkdir()
    (unfinished / MARKER).touch()
    shutil.rmtree(place)
    assert states(cache, capsys) == {
        view.name: ("unusable", place.name),
        unfinished.name: ("unfinished", None),
    }
    with FileLock(f"{unfinished}.lock"):
        code, _, err = models(cache, capsys, "--remove", unfinished.name)
        assert (code, unfinished.exists()) == (2, True)
        assert "another process is writing it" in err
    assert models(cache, capsys, "--clean")[0] == 0
    assert states(cache, capsys) == {}
    assert os.listdir(cache) == [] or all(name.endswith(".lock") for name in os.listdir(cache))


def test_a_name_that_is_none(hf, cache, capsys):
    resolve_checkpoint(hf, cache_dir=cache)
    code, _, err = models(cache, capsys, "--remove", "../hf")
    assert code == 2
    assert "has no entry '../hf'; qwen2audio models lists them" in err
    assert hf.exists()
