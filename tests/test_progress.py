"""Progress display of a conversion while it runs and when it is done."""

import io
import re
import sys
import time

import hf_layout
import pytest
from stand_in import stand_in

from qwen2audio_jax.checkpoint import progress
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, export, inspect, verify


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hf(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    return tmp_path / "hf"


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    clock = iter([1000.0, 1000.0, 1030.0, 1060.0, 1100.0, 1130.0])
    monkeypatch.setattr(progress, "time", stand_in(time, monotonic=lambda: next(clock)))
    with progress.progress_bar("converting") as show:
        for done in (2e9, 3e9, 8e9, 9e9, 10e9):
            show(int(done), 16_000_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "converting: 8.00GB of 16.0GB, 100MB/s, 01:20 left",
        "converting: 10.0GB of 16.0GB, 61.5MB/s, 01:38 left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.progress_bar("converting") as show:
        show(4_000, 16_000)
        time.sleep(0.15)  # it is drawn ten times a second at most
        show(16_000, 16_000)
    assert re.search(r"converting: 100%.* 16\.0k/16\.0k .*B/s\]", terminal.getvalue())


def test_quiet_and_summaries(hf, tmp_path, capfd):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    for arguments, summary in (
        ([hf, orbax], r"orbax: converted \d+ tensors, [0-9.]+kB in 00:\d\d, [0-9.]+[kM]?B/s\n"),
        (["verify", hf, orbax], r"orbax: verified, every bit as in .*hf: [0-9.]+kB in 00:\d\d, [0-9.]+[kM]?B/s\n"),
        (["export", orbax, back], r"back: exported [0-9.]+kB in 00:\d\d, [0-9.]+[kM]?B/s\n"),
    ):
        target = arguments[-1]
        if target != orbax or arguments[0] == hf:
            quiet = target.with_name("quiet_" + target.name)
            assert command.main([*map(str, arguments[:-1]), str(quiet), "--quiet"]) == 0
            assert capfd.readouterr() == ("", "")
        assert command.main([*map(str, arguments)]) == 0
        out, err = capfd.readouterr()
        assert out == ""
        assert re.search(summary, err), err


def test_callbacks_count_bytes(hf, tmp_path):
    for run in (
        lambda told: convert(hf, tmp_path / "a", on_progress=told),
        lambda told: verify(hf, tmp_path / "a", on_progress=told),
        lambda told: export(tmp_path / "a", tmp_path / "b", on_progress=told),
    ):
        seen = []
        run(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1] >= inspect(tmp_path / "a")["totals"]["bytes"]
        assert seen == sorted(seen)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), "2", True])
def test_memory_that_is_no_size(hf, tmp_path, size):
    with pytest.raises(ValueError, match=r"memory_gb is .*; it must be a number above 0, such as 2"):
        convert(hf, tmp_path / "a", memory_gb=size)
    convert(hf, tmp_path / "a")
    for run in (verify, export):
        with pytest.raises(ValueError, match="memory_gb is"):
            run(*((hf, tmp_path / "a") if run is verify else (tmp_path / "a", tmp_path / "b")), memory_gb=size)
    assert not (tmp_path / "b").exists()
