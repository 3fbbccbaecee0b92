"""The short form of benchmarks/serve_soak.py: clients that ask without a pause, and a server that stays as it is."""

from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("httpx", reason="the clients are httpx's")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow(seconds=150)
def test_sixteen_clients_lose_nothing_and_the_memory_stays(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path))
    from serve_soak import soak

    found = soak(seconds=30, clients=16, slots=4, warmup=128)
    assert (found["lost"], found["wrong"], found["slots in use at the end"]) == (0, 0, 0), found
    assert found["answered"] > 100
    assert found["left"] > 0
    assert found["most above the first tenth, %"] < 5
