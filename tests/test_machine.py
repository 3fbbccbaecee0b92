"""`qwen2audio doctor` without a checkpoint: its findings here, and problems reported for made-up facts."""

import json
import sys

import pytest
from processes import finish, free_port, start

from qwen2audio_jax.cli import machine as facts
from qwen2audio_jax.cli.machine import Machine
from qwen2audio_jax.cli.machine_checks import CHECKS, check_reserved
from qwen2audio_jax.cli.main import main

SOUND = {
    "versions": {"python": "3.12.1", "jax": "0.12.0", "jaxlib": "0.12.0"},
    "devices": [{"id": 0, "kind": "cpu", "memory_bytes": None}],
    "decoders": {"soundfile": "0.14.0", "av": "18.1.0"},
    "memory": {"total": 2**34, "free": 2**33},
    "cache": "/cache",
}


def problems(**changed):
    return [text for check in CHECKS for text in check(Machine(**(SOUND | changed))).problems]


def test_a_sound_machine_has_no_problems():
    assert problems() == []
    tpu = {"platform": "tpu", "tpu_chips": 4, "devices": [{"id": 0, "kind": "TPU v5 lite", "memory_bytes": 16 * 10**9}]}
    assert problems(**tpu, processes=2, pod_workers=2) == []
    # A CPU that was asked for, and libtpu that only compiles.
    assert problems(gpus=True, tpu_chips=4, asked_platforms="cpu") == []
    assert problems(versions={**SOUND["versions"], "libtpu": "0.0.42"}) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pod_workers": 4}, "of 4 workers of this TPU pod only 1 is running"),
        ({"peers_missing": "1 of 2 have arrived"}, "1 of 2 have arrived"),
        ({"tpu_holders": [77, 78]}, "libtpu is held by another process (77, 78)"),
        (
            {"device_error": "ABORTED: The TPU is already in use by process", "platform": None},
            "libtpu is held by another",
        ),
        ({"device_error": "libtpu multi-process lockfile", "platform": None}, "/tmp/libtpu_lockfile"),
        ({"device_error": "JAX has been looking for devices for 60 s"}, "only one worker was started"),
        ({"tpu_chips": 4}, "although there are 4 TPU chips: libtpu is not installed"),
        ({"tpu_chips": 4, "versions": {**SOUND["versions"], "libtpu": "1"}}, "4 TPU chips: libtpu did not start"),
        ({"gpus": True}, "although there are NVIDIA GPUs: its CUDA plugin is not installed"),
        ({"versions": {**SOUND["versions"], "jax-cuda13-plugin": "1"}}, "no GPU can be seen"),
        (
            {"versions": {**SOUND["versions"], "libtpu": "1", "libtpu-nightly": "2"}},
            "two versions of libtpu are mixed: libtpu 1, libtpu-nightly 2",
        ),
        ({"other_versions": {1: "jax 0.11"}}, "process 1 has other versions: jax 0.11"),
        ({"versions": {"jax": "0.12.0", "jaxlib": "0.10.2"}}, "jax 0.12.0 with jaxlib 0.10.2"),
        ({"decoders": {"soundfile": None}}, "soundfile does not load, so not every sound file can be read"),
        ({"cache_problem": "/cache cannot be written"}, "point QWEN2AUDIO_CACHE"),
        (
            {"platform": "gpu", "memory_fractions": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "90%"}},
            "XLA_PYTHON_CLIENT_MEM_FRACTION=90% is no share",
        ),
        (
            {"platform": "gpu", "memory_fractions": dict.fromkeys(facts.MEMORY_FRACTIONS, "0.9")},
            "XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION are both set",
        ),
        ({"compiled": "/x", "compiled_problem": "/x cannot be written"}, "point QWEN2AUDIO_COMPILATION_CACHE"),
    ],
)
def test_a_trap_is_named(changed, said):
    found = problems(**changed)
    assert any(said in text for text in found), found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"platform": "cpu"}, "nothing: none are used"),
        ({}, "0.75 of each at once (XLA_PYTHON_CLIENT_PREALLOCATE=unset); device 0: 60.0 GB now"),
        (
            {"preallocate": "false"},
            "what is used, as it is used, up to 0.75 of each (XLA_PYTHON_CLIENT_PREALLOCATE=false)",
        ),
        (
            {"preallocate": "true", "memory_fractions": {"XLA_CLIENT_MEM_FRACTION": "0.9"}},
            "0.9 of each at once (XLA_PYTHON_CLIENT_PREALLOCATE=true, XLA_CLIENT_MEM_FRACTION=0.9)",
        ),
    ],
)
def test_what_is_reserved_on_gpus_is_said(changed, said):
    device = {"id": 0, "kind": "NVIDIA H100", "memory_bytes": 8 * 10**10, "reserved_bytes": 60 * 10**9}
    gpu = {**SOUND, "platform": "gpu", "devices": [device], **changed}
    found = check_reserved(Machine(**gpu))
    assert said in found.found
    assert found.problems == []


def test_workers_of_a_pod():
    assert facts.pod_workers({}) is None
    assert facts.pod_workers({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == 4
    assert facts.pod_workers({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}) == 4


def test_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "not" / "there"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("ok ") for line in lines)
    assert "devices: cpu: 8 x cpu" in lines[1]
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["python"].startswith(f"{sys.version_info[0]}.")
    assert (report["platform"], len(report["devices"]), report["processes"]) == ("cpu", 8, 1)
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint"} <= set(report["versions"])


def test_something_wrong_is_an_exit_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    wrong = {one["name"]: one["problems"] for one in report["checks"] if one["problems"]}
    assert set(wrong) == {"processes", "cache folder", "compilation cache"}
    assert "is not a folder" in wrong["cache folder"][0]
    assert "is not a folder" in wrong["compilation cache"][0]
    assert main(["doctor", "--glass-clip", "x.wav"]) == 2


def test_jax_that_never_finds_its_devices(monkeypatch, capsys):
    monkeypatch.setattr(facts, "DEVICE_SECONDS", 0.05)
    monkeypatch.setattr(facts, "_find_devices", lambda found, versions: facts.threading.Event().wait(5))
    assert main(["doctor"]) == 1
    assert "only one worker was started" in capsys.readouterr().out


def doctor(port, number, *, timeout=60, **changed):
    arguments = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", number]
    return start("-m", "qwen2audio_jax", "doctor", "--json", *arguments, "--peer-timeout", timeout, **changed)


@pytest.mark.slow(seconds=8)
def test_two_processes():
    port = free_port()
    for code, out, err in finish([doctor(port, n) for n in range(2)]):
        assert code == 0, out + err
        report = json.loads(out.splitlines()[-1])
        assert report["processes"] == 2
        assert report["other_versions"] == {}


def test_two_processes_of_which_one_is_absent():
    port = free_port()
    ((code, out, err),) = finish([doctor(port, 0, timeout=3, QWEN2AUDIO_PEER_NOTICE="1")])
    assert code == 1, err
    assert "waiting for other processes for 1 s: 1 of 2 have arrived (missing: 1)" in err
    report = json.loads(out.splitlines()[-1])
    assert "gave up after 3 s: 1 of 2 have arrived" in report["peers_missing"]
