"""Messages of the library in the words of the command line, and what is said while a command works."""

import io
import sys
import time

import pytest

from qwen2audio_jax.cli import early, status
from qwen2audio_jax.cli.commands import in_options
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.cli.remedies import as_options

OPTIONS = {"--truncation", "--allow-truncated", "--do-sample", "--greedy", "--top-k", "--weights", "--stop", "--model"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pass truncation=True (--truncation) to keep", "pass --truncation to keep"),
        ("pass truncation=True to keep", "pass --truncation to keep"),
        ("or allow_private_urls=True where", "or allow_private_urls=True where"),  # no option of this command
        ("set do_sample=True, or top_k=1", "set --do-sample, or --top-k 1"),
        ("or do_sample=False for the most", "or --greedy for the most"),
        ("weights_dtype='int8' is", "--weights int8 is"),
        ("stop_strings holds an empty string", "--stop holds an empty string"),
        ("truncation=False is", "truncation=False is"),
        ("write --mesh data=2,model=4", "write --mesh data=2,model=4"),
        ("a mesh of data=2 x model=4 takes 8, or choose among them with devices=", "a mesh of --mesh 2x4 takes 8"),
        ("url?top_k=3&b", "url?top_k=3&b"),
        ("settings.top_k=3", "settings.top_k=3"),
        ("'top_k=3.wav' cannot be opened", "'top_k=3.wav' cannot be opened"),
        ("/tmp/top_k=3.wav cannot be opened", "/tmp/top_k=3.wav cannot be opened"),
    ],
)
def test_arguments_as_options(message, expected):
    assert as_options(message, OPTIONS) == expected


def test_the_options_are_the_commands_own():
    assert in_options(ValueError("pass\ntruncation=True"), "generate") == "pass --truncation"
    assert in_options(ValueError("pass truncation=True"), "train") == "pass truncation=True"


class Stderr(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (False, False), (True, True)])
def test_status(monkeypatch, terminal, quiet):
    """A terminal's line is renewed and goes again, a log gets whole lines, and --quiet nothing."""
    monkeypatch.setattr(sys, "stderr", stderr := Stderr(terminal))
    monkeypatch.setattr(status, "TERMINAL_SECONDS", 0.001)
    monkeypatch.setattr(status, "LOG_SECONDS", 0.001)
    with status.status("working", quiet=quiet):
        for _ in range(1000):
            if stderr.getvalue() or quiet:
                break
            time.sleep(0.01)
    shown = stderr.getvalue()
    if quiet:
        assert shown == ""
    elif terminal:
        assert shown.startswith("\rworking: 0 s")
        assert shown.endswith("\r\x1b[K")
    else:
        assert set(shown.splitlines()) == {"working: 0 s"}


def test_status_beside_other_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Stderr(True))
    with status.status("loading", alone=False):
        print("converting", file=sys.stderr)
    assert stderr.getvalue().splitlines() == ["loading", "converting", "loading: 0.0 s"]


@pytest.mark.parametrize(
    ("environment", "libtpu", "plugins", "expected"),
    [
        ({}, True, False, "cpu"),
        ({}, False, False, None),
        ({}, True, True, None),  # perhaps there is a GPU
        ({"TPU_NAME": "x"}, True, False, None),
        ({"JAX_PLATFORMS": "tpu"}, True, False, "tpu"),
    ],
)
def test_libtpu_is_left_alone_without_a_tpu(monkeypatch, environment, libtpu, plugins, expected):
    there = {"libtpu": libtpu, "jax_plugins": plugins}
    monkeypatch.setattr(early.importlib.util, "find_spec", lambda name: there[name] or None)
    monkeypatch.setattr(early, "_may_have_tpu", lambda: False)
    monkeypatch.setattr(early.os, "environ", environment)
    early.keep_libtpu_quiet()
    assert environment.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(capsys, shell):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    options = () if shell == "tcsh" else ("--max-new-tokens", "--allow-non-finite", "bfloat16")
    for part in ("generate", "convert", *options):
        assert part in script


def test_completion_without_its_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 2
    assert "[completion]" in capsys.readouterr().err
