"""Startup barrier of a multi-process run, with progress reports: a few lines over TCP, on the coordinator's port.

JAX's own service blocks silently until all processes are connected, so a command started on only one worker of a pod
just hangs. Here process 0 first listens on the port that JAX's service will take, the others report to it, and every
process can print how many are missing. Once all have arrived the port is free again.
"""

import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

_GREETING = "qwen2audio-roll-call"
_LINE = 256
"""Longest line, in bytes; a peer that sends more is not a process of this run."""
_PAUSE = 0.2
"""Seconds between attempts to reach the coordinator."""


class PeersMissing(ValueError):
    """Error: not all processes arrived in time; the message says how many did."""


@dataclass
class _Clock:
    """Timer of the barrier: time waited, notice interval and timeout, all in seconds."""

    timeout: float
    notice: float
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.told = 0.0

    @property
    def waited(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.timeout - self.waited

    def tell(self, state: str) -> None:
        """Report the state if a notice is due."""
        if self.waited - self.told >= self.notice:
            self.told = self.waited
            self.say(f"waiting for other processes for {self.waited:.0f} s: {state}")


def roll_call(
    host: str,
    port: int,
    *,
    process_id: int,
    num_processes: int,
    timeout: float,
    notice: float,
    say: Callable[[str], None],
) -> None:
    """Block until all processes have called this.

    Args:
        host: of process 0.
        port: free on that host.
        process_id: of this process, from 0.
        num_processes: the number of processes.
        timeout: seconds to wait.
        notice: seconds between two reports of missing processes.
        say: called with each report.

    Raises:
        PeersMissing: not all arrived in time.
        ValueError: the port is taken, two processes have the same id, or they disagree on the number of processes.
    """
    clock = _Clock(timeout, notice, say)
    if process_id == 0:
        with _listener(port) as listener:
            peers = _gather(listener, num_processes=num_processes, clock=clock)
        # Only after the port is free again, so that the peers next find JAX's service on it.
        for peer in peers:
            with suppress(OSError), peer:
                peer.sendall(b"go\n")
    else:
        _report(host, port, process_id=process_id, num_processes=num_processes, clock=clock)


@contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    try:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            listener = socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): name another one, the same in all processes"
        ) from None
    with listener:
        yield listener


def _arrived(here: set[int], num_processes: int) -> str:
    missing = sorted(set(range(num_processes)) - here)
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"{len(here)} of {num_processes} have arrived (missing: {named})"


def _gather(listener: socket.socket, *, num_processes: int, clock: _Clock) -> list[socket.socket]:
    """The connections of all other processes, once all have arrived."""
    here: dict[socket.socket, int] = {}
    with ExitStack() as on_failure, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(here) < num_processes - 1:
            state = _arrived({0, *here.values()}, num_processes)
            if clock.left <= 0:
                raise PeersMissing(_give_up(state, clock))
            clock.tell(state)
            changed = False
            for key, _ in selector.select(min(_PAUSE, clock.left)):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is listener:
                    connection, _ = listener.accept()
                    on_failure.enter_context(connection)
                    connection.settimeout(5)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                number, answer = _admitted(connection, taken=set(here.values()), num_processes=num_processes)
                if connection in here or number is None:  # disconnected, or an unknown peer
                    changed |= here.pop(connection, None) is not None
                    selector.unregister(connection)
                    with suppress(OSError), connection:
                        connection.sendall(f"no {answer}\n".encode())
                    continue
                here[connection], changed = number, True
            if changed:
                line = f"here {_arrived({0, *here.values()}, num_processes)}\n".encode()
                for connection in here:
                    with suppress(OSError):
                        connection.sendall(line)
        for connection in here:
            selector.unregister(connection)
        on_failure.pop_all()
    return list(here)


def _admitted(connection: socket.socket, *, taken: set[int], num_processes: int) -> tuple[int | None, str]:
    """The id of the process that sent its line; None, and the answer to send, if it is rejected."""
    try:
        words = connection.recv(_LINE).decode("ascii").split()
    except (OSError, ValueError):
        words = []
    if len(words) != 3 or words[0] != _GREETING or not (words[1].isdecimal() and words[2].isdecimal()):
        return None, "this is a roll call of qwen2audio_jax"
    number, count = int(words[1]), int(words[2])
    if count != num_processes:
        return None, f"process {number} was told of {count} processes, process 0 of {num_processes}: make them agree"
    if number in taken or not 0 < number < num_processes:
        return None, f"there are two processes with the number {number}: give each its own"
    return number, ""


def _report(host: str, port: int, *, process_id: int, num_processes: int, clock: _Clock) -> None:
    unknown = f"1 of {num_processes} known to have arrived; process 0 does not answer at {host}:{port}"
    state = unknown
    while True:
        if clock.left <= 0:
            raise PeersMissing(_give_up(state, clock))
        clock.tell(state)
        try:
            with socket.create_connection((host, port), timeout=min(5.0, max(clock.left, 0.1))) as connection:
                connection.sendall(f"{_GREETING} {process_id} {num_processes}\n".encode())
                _until_go(connection, clock)
                return
        except OSError as error:
            state = f"{unknown} ({error.strerror or error})"
        time.sleep(_PAUSE)


def _until_go(connection: socket.socket, clock: _Clock) -> None:
    """Receive states from process 0 until it sends "go".

    Raises:
        OSError: the connection is lost.
        ValueError: process 0 rejected this process.
    """
    pending, state = b"", "process 0 has been reached"
    connection.settimeout(_PAUSE)
    while True:
        if clock.left <= 0:
            raise PeersMissing(_give_up(state, clock))
        clock.tell(state)
        try:
            received = connection.recv(_LINE)
        except TimeoutError:
            continue
        if not received:
            raise ConnectionResetError("it hung up")
        pending += received
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            word, _, rest = line.decode("ascii", "replace").partition(" ")
            if word == "no":
                raise ValueError(rest)
            if word != "here":
                # Either "go", or another listener on the port: JAX's own service, which needs no barrier.
                return
            state = rest
        if len(pending) > _LINE or not pending.isascii() or b"\0" in pending:
            return


def _give_up(state: str, clock: _Clock) -> str:
    return (
        f"gave up after {clock.waited:.0f} s: {state}. Start the command on every host, with the same coordinator and "
        "number of processes and a number of its own for each; or wait longer (--peer-timeout)"
    )
