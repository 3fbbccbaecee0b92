"""Installations that cannot be written, users without a home or a name: nothing is written beside the package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sounds

from qwen2audio_jax.checkpoint import compilation_cache, conversion_cache
from qwen2audio_jax.checkpoint.conversion_cache import default_cache_dir

ROOT = Path(__file__).resolve().parent.parent

# Every file that Python opens for writing, every folder that it makes, anywhere but in one place.
WATCH = """
import os, sys
place = os.path.realpath(sys.argv[1])
stray = []
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event == "os.mkdir":
        path, writes = arguments[0], True
    else:
        return
    if writes and isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(path))
        if not path.startswith((place, "/dev", "/proc")):
            stray.append((event, path))
sys.addaudithook(watch)
exec(sys.argv[4])
assert not {"numba", "librosa", "llvmlite", "scipy.signal", "matplotlib"} & set(sys.modules), sorted(sys.modules)
assert not stray, stray
"""


INPUTS = """
from qwen2audio_jax import Qwen2AudioProcessor
content = [{"type": "audio", "audio": path} for path in sys.argv[2:4]]
messages = [{"role": "user", "content": content}]
print(Qwen2AudioProcessor.from_pretrained().apply_chat_template(messages, tokenize=True))
"""
ANSWER = """
from qwen2audio_jax.cli.main import main
assert main(["generate", "--audio", sys.argv[2], "--audio", sys.argv[3], "--max-new-tokens", "3", "What is it?"]) == 0
from pathlib import Path
[folder] = Path(sys.argv[1]).glob("qwen2audio_jax-*")
assert folder.stat().st_mode & 0o077 == 0
assert any(folder.glob("embedded-speech-*"))
"""


def run(program: str, *arguments, **environment) -> subprocess.CompletedProcess:
    base = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env={**base, **environment}, capture_output=True, text=True, cwd="/", timeout=300, check=False
    )


@pytest.mark.parametrize("program", [INPUTS, pytest.param(ANSWER, marks=pytest.mark.slow)], ids=["inputs", "answer"])
def test_nothing_is_written_beside_the_package(tmp_path, program):
    """A home that cannot be made: the conversion goes to the temporary files, and nothing anywhere else."""
    for kind, rate in (("wav", 44_100), ("mp3", 24_000)):
        (tmp_path / f"clip.{kind}").write_bytes(sounds.encode(kind, sounds.speech(rate, rate=rate), rate))
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "HOME": "/proc/no/such/home"}
    done = run(WATCH, tmp_path / "tmp", tmp_path / "clip.wav", tmp_path / "clip.mp3", program, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_resampling_in_an_installation_that_numba_cannot_write(tmp_path):
    (tmp_path / "clip.wav").write_bytes(sounds.encode("wav", sounds.speech(44_100, rate=44_100), 44_100))
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "librosa", "llvmlite"):
            raise ImportError("cannot cache function: no locator available")
sys.meta_path.insert(0, Refuse())
from qwen2audio_jax import load_audio
from qwen2audio_jax.audio import log_mel
print(len(load_audio(sys.argv[1])), log_mel(load_audio(sys.argv[1]))[0].shape)
"""
    done = run(program, tmp_path / "clip.wav")
    assert done.stdout == "16000 (128, 3000)\n", done.stderr


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """A folder of temporary files, and a home that cannot be made."""
    monkeypatch.delenv("QWEN2AUDIO_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/no/such/home")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_home_that_can_be_written_comes_first(tmp_path, temporary, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    assert default_cache_dir() == home / ".cache" / "qwen2audio_jax"
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "named"))
    assert default_cache_dir() == tmp_path / "named"


@pytest.mark.parametrize("home", ["/proc/no/such/home", "", "relative"])
def test_homes_that_cannot_be_written(temporary, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    if home == "":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that the system does not know
    folder = default_cache_dir()
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert default_cache_dir() == folder


@pytest.mark.parametrize("made", ["open to others", "another user's", "a link", "a file"])
def test_folders_of_others_are_not_used(temporary, monkeypatch, made):
    """Anyone can make a folder among the temporary files; what is in it could be anything."""
    folder = temporary / f"qwen2audio_jax-{os.getuid()}"
    if made == "a file":
        folder.touch()
    elif made == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(temporary / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
        if made == "open to others":
            folder.chmod(0o777)
        else:
            monkeypatch.setattr(conversion_cache.os, "getuid", lambda: 4321)
            folder.rename(temporary / "qwen2audio_jax-4321")
    assert default_cache_dir() == Path("/proc/no/such/home/.cache/qwen2audio_jax")


def test_user_id_without_a_name(monkeypatch):
    """JAX looks names up where it bounds its cache."""
    assert compilation_cache._has_a_name()
    monkeypatch.setattr(compilation_cache.os, "getuid", lambda: 123_456_789)
    assert not compilation_cache._has_a_name()


@pytest.mark.slow
def test_an_unprivileged_user_in_an_installation_of_another(tmp_path):
    """As in containers that run under an id that nobody has."""
    if os.getuid() != 0 or not Path("/usr/bin/setpriv").exists():
        pytest.skip("needs root and setpriv, to become another user")
    (tmp_path / "tmp").mkdir()
    for folder in (tmp_path, *tmp_path.parents[:3], tmp_path / "tmp"):
        folder.chmod(0o777 if folder.name == "tmp" else 0o755)
    caps = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search")
    become = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *caps]
    program = "import sys; from qwen2audio_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    question = ["generate", "--audio", "example:digits-4719", "Which digits are spoken?"]
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*become, sys.executable, "-c", program, *question],
        env={**environment, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.stdout == "The digits are 4 7 1 9.\n", done.stderr
    assert "Warning" not in done.stderr
