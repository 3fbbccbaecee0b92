"""Multi-process runs: process ids and coordinator, and `jax.distributed` initialised once all processes have arrived.

A single process needs none of this, and importing the module has no effect.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from qwen2audio_jax.parallel.roll_call import PeersMissing, roll_call

COORDINATOR = "QWEN2AUDIO_COORDINATOR"
PROCESS_ID = "QWEN2AUDIO_PROCESS_ID"
NUM_PROCESSES = "QWEN2AUDIO_NUM_PROCESSES"
PEER_TIMEOUT = "QWEN2AUDIO_PEER_TIMEOUT"
PEER_NOTICE = "QWEN2AUDIO_PEER_NOTICE"
"""Environment variables; the last two in seconds."""

DEFAULT_TIMEOUT = 300.0
DEFAULT_NOTICE = 60.0


@dataclass(frozen=True)
class Processes:
    """A process's place in a multi-process run.

    Attributes:
        host: of process 0.
        port: free on that host.
        process_id: of this process, from 0.
        num_processes: at least 2.
        detected: whether the values come from the cluster environment rather than from the user.
    """

    host: str
    port: int
    process_id: int
    num_processes: int
    detected: bool = False


def initialize(
    coordinator: str | None = None,
    *,
    process_id: int | None = None,
    num_processes: int | None = None,
    timeout: float | None = None,
    notice: float | None = None,
) -> Processes | None:
    """Join the other processes of this run, if there are any; to be called before any other use of JAX.

    TPU pods and slices, Slurm, Open MPI and Kubernetes jobs need no arguments: JAX detects them. Elsewhere the first
    three arguments are needed, or the environment variables QWEN2AUDIO_COORDINATOR, QWEN2AUDIO_PROCESS_ID and
    QWEN2AUDIO_NUM_PROCESSES; arguments take precedence. `num_processes=1` runs alone, whatever the cluster reports.

    Args:
        coordinator: HOST:PORT of process 0, the port free; the same in all processes.
        process_id: from 0 to num_processes - 1.
        num_processes: the number of processes.
        timeout: seconds to wait for them; default: QWEN2AUDIO_PEER_TIMEOUT, else 300.
        notice: seconds between reports on stderr of how many processes have arrived; default: QWEN2AUDIO_PEER_NOTICE,
            else 60.

    Returns:
        The process's place in the run; None for a process that runs alone.

    Raises:
        PeersMissing: (a ValueError) not all processes arrived in time.
        ValueError: settings that are partial or contradict each other, or JAX was used before.
    """
    timeout = _seconds(timeout, name=PEER_TIMEOUT, default=DEFAULT_TIMEOUT)
    notice = _seconds(notice, name=PEER_NOTICE, default=DEFAULT_NOTICE)
    if jax.distributed.is_initialized():
        if (coordinator, process_id, num_processes) == (None, None, None):
            return None
        raise ValueError("the processes have been joined already (jax.distributed): initialize() is to be called once")
    place = processes(coordinator, process_id=process_id, num_processes=num_processes)
    if place is None:
        return None
    roll_call(
        place.host,
        place.port,
        process_id=place.process_id,
        num_processes=place.num_processes,
        timeout=timeout,
        notice=notice,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    try:
        jax.distributed.initialize(
            f"{_bracketed(place.host)}:{place.port}",
            place.num_processes,
            place.process_id,
            # The cluster environment may also assign devices to processes.
            cluster_detection_method=None if place.detected else "deactivate",
            initialization_timeout=max(int(timeout), 30),
        )
    except jax.errors.JaxRuntimeError as error:
        raise PeersMissing(f"the processes were all there, but could not be joined: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"the processes cannot be joined any more: {error}") from None
    return place


def processes(
    coordinator: str | None = None,
    *,
    process_id: int | None = None,
    num_processes: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Processes | None:
    """The process's place that `initialize` would use, from its arguments, the environment or the cluster.

    Raises:
        ValueError: as `initialize`.
    """
    coordinator = coordinator or environment.get(COORDINATOR) or None
    process_id = _number(process_id, PROCESS_ID, environment)
    num_processes = _number(num_processes, NUM_PROCESSES, environment)
    if num_processes == 1 and coordinator is None and process_id in (None, 0):
        return None
    given = {"coordinator": coordinator, "process id": process_id, "number of processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return detected()
    if coordinator is None or process_id is None or num_processes is None:
        raise ValueError(
            f"of several processes the {' and the '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"give --coordinator HOST:PORT, --process-id I and --num-processes N (or {COORDINATOR}, {PROCESS_ID} and "
            f"{NUM_PROCESSES})"
        )
    if num_processes < 1:
        raise ValueError(f"the number of processes is {num_processes}: there is at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process id {process_id} is out of range: {num_processes} processes are numbered from 0 on")
    host, port = _address(coordinator)
    return None if num_processes == 1 else Processes(host, port, process_id, num_processes)


def detected() -> Processes | None:
    """The place that a TPU pod, Slurm, Open MPI or Kubernetes reports; None for a single process or no cluster."""
    # Private API, the one jax.distributed.initialize itself uses; a test checks it on every supported release.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing cluster package is irrelevant to a single process
        try:
            address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, 60
            )
        except Exception:  # any error of a cluster client in an incomplete cluster environment
            return None
    if address is None or count is None or number is None or count < 2:
        return None
    host, port = _address(address)
    return Processes(host, port, number, count, detected=True)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator {coordinator!r} is not HOST:PORT with a port from 1 to 65535")
    return host, int(port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _number(value: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name)
    if value is not None or not text:
        return value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def _seconds(value: float | None, *, name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        seconds = value if value is not None else float(text) if text else default
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number of seconds") from None
    if not 0 < seconds <= 86400:
        raise ValueError(f"{seconds:g} s of waiting for other processes is out of range: more than 0, at most 86400")
    return seconds
