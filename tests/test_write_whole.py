"""Files that appear whole or not at all."""

import os

import pytest

from qwen2audio_jax.storage.write_whole import draft_of, write_whole


def test_a_file_takes_the_place_of_the_earlier_one(tmp_path):
    write_whole(tmp_path / "a", b"first")
    write_whole(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a"]


def test_a_draft_that_is_left_behind_is_no_obstacle(tmp_path):
    (tmp_path / ".a.incomplete").write_bytes(b"of a killed process")
    write_whole(tmp_path / "a", b"whole")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_whatever_fails_leaves_the_earlier_file(tmp_path, monkeypatch, fault):
    write_whole(tmp_path / "a", b"first")

    def full(*_):
        raise OSError("no space left")

    def write_half():
        with draft_of(tmp_path / "a") as draft:
            draft.write_bytes(b"half")
            if fault == "write":
                full()

    if fault != "write":
        monkeypatch.setattr(os, fault, full)
    with pytest.raises(OSError, match="no space left"):
        write_half()
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]
