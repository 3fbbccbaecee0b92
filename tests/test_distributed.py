"""Multi-process startup: process detection, the arrival barrier, and reports of missing processes."""

import os
import re
import socket
import threading
import time

import pytest
from processes import finish, free_port, start

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.parallel import distributed
from qwen2audio_jax.parallel.distributed import Processes, processes
from qwen2audio_jax.parallel.roll_call import PeersMissing, roll_call

NAMES = (distributed.COORDINATOR, distributed.PROCESS_ID, distributed.NUM_PROCESSES)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_joins_nothing(monkeypatch):
    monkeypatch.setattr(distributed, "roll_call", None)
    assert processes(environment={}) is None
    assert distributed.initialize() is None
    assert distributed.initialize(num_processes=1) is None


def test_arguments_and_environment():
    environment = dict(zip(NAMES, ("head:1234", "1", "4"), strict=True))
    assert processes(environment=environment) == Processes("head", 1234, 1, 4)
    assert processes("[::1]:99", process_id=3, environment=environment) == Processes("::1", 99, 3, 4)
    assert processes("head:1", process_id=0, num_processes=1, environment={}) is None


def test_a_cluster_is_asked(monkeypatch):
    """Slurm's own variables, as JAX reads them in every release that is supported."""
    slurm = {
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    found = processes(environment={})
    assert (found.host, found.process_id, found.num_processes, found.detected) == ("node003", 1, 2, True)
    assert processes(num_processes=1, environment={}) is None
    assert main(["chat"]) == 2
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes(environment={}) is None


def test_processes_share_a_model_by_a_mesh_alone(monkeypatch, capsys):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert main(["generate", "--audio", "example:high-voice-306", "Which digits are spoken?"]) == 2
    assert "2 processes share a model by --mesh alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_id": 1}, "the coordinator and the number of processes are missing"),
        ({"coordinator": "head:1", "process_id": 1}, "the number of processes is missing"),
        ({"num_processes": 2}, "the coordinator and the process id are missing"),
        ({"coordinator": "head:1", "process_id": 2, "num_processes": 2}, "process id 2 is out of range: 2 processes"),
        ({"coordinator": "head:1", "process_id": -1, "num_processes": 2}, "process id -1 is out of range"),
        ({"process_id": 3, "num_processes": 1}, "coordinator is missing"),
        ({"coordinator": "head:1", "process_id": 0, "num_processes": 0}, "number of processes is 0"),
        ({"coordinator": "head", "process_id": 0, "num_processes": 2}, "'head' is not HOST:PORT"),
        ({"coordinator": "head:70000", "process_id": 0, "num_processes": 2}, "is not HOST:PORT"),
    ],
)
def test_settings_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        processes(**given, environment={})


def test_environment_that_makes_no_sense(monkeypatch):
    with pytest.raises(ValueError, match="QWEN2AUDIO_PROCESS_ID='one' is not a number"):
        processes(environment={distributed.PROCESS_ID: "one"})
    monkeypatch.setenv(distributed.PEER_NOTICE, "soon")
    with pytest.raises(ValueError, match="QWEN2AUDIO_PEER_NOTICE='soon' is not a number of seconds"):
        distributed.initialize()
    with pytest.raises(ValueError, match="-1 s of waiting"):
        distributed.initialize(timeout=-1, notice=1)


def test_the_first_word_comes_after_a_minute(monkeypatch):
    called = {}

    def absent(*address, **options):
        called.update(options)
        raise PeersMissing("1 of 2 have arrived")

    monkeypatch.setattr(distributed, "roll_call", absent)
    with pytest.raises(PeersMissing):
        distributed.initialize("127.0.0.1:1", process_id=0, num_processes=2)
    assert (called["notice"], called["timeout"]) == (60, 300)


def call(port, number, count, results, *, timeout=20.0, notice=0.3):
    said = []
    try:
        roll_call(
            "127.0.0.1", port, process_id=number, num_processes=count, timeout=timeout, notice=notice, say=said.append
        )
        results[number] = "go", said
    except ValueError as error:
        results[number] = error, said


def together(port, count, numbers, **options):
    results = {}
    threads = [threading.Thread(target=call, args=(port, n, count, results), kwargs=options) for n in numbers]
    for thread in threads:
        thread.start()
    return threads, results


def test_all_come_and_the_port_is_free_again():
    port = free_port()
    threads, results = together(port, 4, (3, 1, 2))
    time.sleep(0.8)
    call(port, 0, 4, results)
    for thread in threads:
        thread.join()
    assert [results[n][0] for n in range(4)] == ["go"] * 4
    assert any(
        f"1 of 4 known to have arrived; process 0 does not answer at 127.0.0.1:{port}" in t for t in results[1][1]
    )
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_one_does_not_come():
    port = free_port()
    threads, results = together(port, 3, (0, 2), timeout=1.5)
    for thread in threads:
        thread.join()
    for number in (0, 2):
        outcome, said = results[number]
        assert isinstance(outcome, PeersMissing)
        assert "gave up after" in str(outcome)
        assert any("2 of 3 have arrived (missing: 1)" in text for text in said), said
    assert "2 of 3 have arrived (missing: 1)" in str(results[0][0])


def test_one_leaves_and_comes_again():
    port = free_port()
    threads, results = together(port, 3, (0,))
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", port)) as visitor:
        visitor.sendall(b"qwen2audio-roll-call 1 3\n")
        assert visitor.recv(200) == b"here 2 of 3 have arrived (missing: 2)\n"
    time.sleep(0.5)
    more, others = together(port, 3, (1, 2))
    for thread in (*threads, *more):
        thread.join()
    assert {results[0][0], others[1][0], others[2][0]} == {"go"}


@pytest.mark.parametrize(
    ("number", "count", "message"),
    [(1, 3, "two processes with the number 1"), (2, 4, "process 2 was told of 4 processes, process 0 of 3")],
)
def test_processes_that_do_not_agree(number, count, message):
    port = free_port()
    threads, _ = together(port, 3, (0, 1), timeout=3)
    time.sleep(0.6)
    others = {}
    call(port, number, count, others)
    for thread in threads:
        thread.join()
    assert message in str(others[number][0])


def test_strangers_are_not_counted():
    port = free_port()
    threads, results = together(port, 2, (0,))
    time.sleep(0.3)
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4000, b"qwen2audio-roll-call 0 2\n"):
        with socket.create_connection(("127.0.0.1", port)) as visitor:
            visitor.sendall(greeting)
            assert visitor.recv(200).startswith(b"no ")
    assert not results
    call(port, 1, 2, results)
    for thread in threads:
        thread.join()
    assert (results[0][0], results[1][0]) == ("go", "go")


def test_a_service_that_is_there_already_needs_no_roll_call():
    with socket.create_server(("127.0.0.1", 0)) as server:
        results = {}
        thread = threading.Thread(target=call, args=(server.getsockname()[1], 1, 2, results))
        thread.start()
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"\0\0\x18\x04\0\0\0\0\0")  # how an HTTP/2 server begins
            thread.join()
    assert results[1][0] == "go"


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        results = {}
        call(server.getsockname()[1], 0, 2, results)
    assert "cannot listen on port" in str(results[0][0])


JOIN = """
import sys
import qwen2audio_jax
from qwen2audio_jax.parallel.distributed import initialize
place = initialize()
import jax
print(place.process_id, jax.process_index(), jax.process_count(), len(jax.devices()), len(jax.local_devices()))
"""


def test_two_processes_join():
    shared = {"QWEN2AUDIO_COORDINATOR": f"127.0.0.1:{free_port()}", "QWEN2AUDIO_NUM_PROCESSES": "2"}
    both = [start("-c", JOIN, devices=2, **shared, QWEN2AUDIO_PROCESS_ID=str(n)) for n in range(2)]
    results = finish(both)
    assert [code for code, *_ in results] == [0, 0], results
    assert [out.splitlines()[-1] for _, out, _ in results] == ["0 0 2 4 2", "1 1 2 4 2"]


@pytest.mark.parametrize("absent", [0, pytest.param(1, marks=pytest.mark.slow(seconds=7))])
def test_the_command_says_who_is_missing(absent):
    arguments = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", 1 - absent]
    command = ["-m", "qwen2audio_jax", "generate", *arguments, "--peer-timeout", "1.2", "hello"]
    ((code, out, err),) = finish([start(*command, QWEN2AUDIO_PEER_NOTICE="0.4")])
    assert code == 2, err
    assert out == ""
    assert re.search(r"^waiting for other processes for \d s: 1 of 2 ", err, flags=re.MULTILINE), err
    assert err.splitlines()[-1].startswith("qwen2audio generate: gave up after 1 s: 1 of 2")


def test_options_that_make_no_sense(capsys):
    assert main(["evaluate", "--fresh", "1", "--process-id", "1"]) == 2
    assert "the coordinator and the number of processes are missing" in capsys.readouterr().err
    assert not [name for name in NAMES if name in os.environ]
