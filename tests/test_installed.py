"""What messages say to install: a command that works for how the package was installed."""

import importlib.metadata
import json
import shlex
from types import SimpleNamespace

import pytest

from qwen2audio_jax import installed
from qwen2audio_jax.installed import pip_install

REQUIRES = [
    "numpy>=2.0",
    'huggingface_hub>=0.30; extra == "hub"',
    'x>=1; (a == "b") and extra == "hub"',
    'y; extra == "z"',
]


@pytest.fixture
def noted(monkeypatch):
    """Stands in for what pip has noted of the installation, and has pip on the path beside this Python."""

    def note(origin: dict | None) -> None:
        text = None if origin is None else json.dumps(origin)
        distribution = SimpleNamespace(read_text=lambda name: text, requires=REQUIRES)
        by_product = SimpleNamespace(read_text=lambda name: None, requires=REQUIRES)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [by_product, distribution])
        monkeypatch.setattr(installed, "__file__", "/site-packages/qwen2audio_jax/installed.py")

    monkeypatch.setattr(installed, "pip", lambda *arguments: shlex.join(["pip", "install", *arguments]))
    return note


def test_of_each_kind_of_installation(noted, tmp_path):
    checkout, wheel = tmp_path / "a checkout", tmp_path / "qwen2audio_jax-0.1.0-py3-none-any.whl"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text("")
    wheel.write_bytes(b"")
    noted(None)
    assert pip_install("hub") == "pip install 'qwen2audio-jax[hub]'"
    noted({"url": checkout.as_uri(), "dir_info": {"editable": True}})
    assert pip_install("hub") == f"pip install -e '{checkout}[hub]'"
    noted({"url": checkout.as_uri(), "dir_info": {}})
    assert pip_install("hub") == f"pip install '{checkout}[hub]'"
    noted({"url": wheel.as_uri(), "archive_info": {}})
    assert pip_install("hub") == f"pip install '{wheel}[hub]'"
    noted({"url": "https://a.example/x.whl", "archive_info": {}})
    assert pip_install("hub") == "pip install 'qwen2audio-jax[hub] @ https://a.example/x.whl'"
    noted({"url": "https://a.example/r.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}})
    assert pip_install("hub") == "pip install 'qwen2audio-jax[hub] @ git+https://a.example/r.git@c0ffee'"
    wheel.unlink()
    noted({"url": wheel.as_uri(), "archive_info": {}})
    assert pip_install("hub") == "pip install 'huggingface_hub>=0.30' 'x>=1'"


def test_of_this_installation():
    """As the tests run: editable, or from a checkout that was never installed."""
    words = shlex.split(pip_install("hub"))
    assert words[-2] == "-e"
    assert words[-1].endswith("[hub]")


def test_the_pip_of_this_python(monkeypatch):
    monkeypatch.setattr(installed.sys, "executable", "/here/bin/python")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [object()])
    for pip, expected in (
        ("/here/bin/pip", "pip install x"),
        ("/usr/bin/pip", "/here/bin/python -m pip install x"),
        (None, "/here/bin/python -m pip install x"),
    ):
        monkeypatch.setattr(installed.shutil, "which", lambda name, pip=pip: pip)
        assert installed.pip("x") == expected
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [])
    assert installed.pip("x") == "uv pip install --python /here/bin/python x"
