"""Shards: which records belong together, and which of a job's hosts does which of them. Pure, no jax.

Nothing is reserved or locked. A host does its own shards, then those that are still missing: what a dead host left is
done by the others, and a shard that two hosts do comes out the same.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

FEWEST, MOST, RECORDS = 64, 16_384, 128
"""Shards of a job: about one for `RECORDS` records, between these two counts."""


@dataclass(frozen=True)
class Host:
    """The place of a process among the hosts of a job: `index` from 0, of `count`; `told_by` names what says so."""

    index: int
    count: int
    told_by: str


def shard_count(records: int) -> int:
    """The number of shards of so many records; it does not depend on the hosts, whose number may change."""
    return min(max(records // RECORDS, FEWEST), MOST, max(records, 1))


class Shards:
    """The positions of each shard's records, in input order.

    Attributes:
        count: number of shards; some may be empty.
        of: [N] uint16, the shard of each record.
    """

    def __init__(self, hashes: np.ndarray, *, count: int):
        """Divide records by the hashes of their ids, [N] uint64."""
        self.count = count
        self.of = (hashes % np.uint64(count)).astype(np.uint16)
        self._order = np.argsort(self.of, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self.of, minlength=count))])

    def positions(self, shard: int) -> np.ndarray:
        """[n] int64, ascending."""
        return self._order[self._starts[shard] : self._starts[shard + 1]]

    def sizes(self) -> np.ndarray:
        """[count] int64, the number of records of each."""
        return np.diff(self._starts)


def order_of_work(count: int, host: Host, *, fingerprint: str, others: bool = True) -> Iterator[int]:
    """The shards in the order in which a host looks at them: its own, then the others' from a place of its own."""
    yield from range(host.index, count, host.count)
    rest = [shard for shard in range(count) if shard % host.count != host.index]
    if rest and others:
        digest = hashlib.sha256(f"{fingerprint} {host.index}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % len(rest)
        yield from rest[start:]
        yield from rest[:start]


def find_host(shard: str | None, environment: Mapping[str, str]) -> Host:
    """The place of this process: from "I/N" where it is given, else from the scheduler's variables, else alone.

    Known are Slurm arrays, indexed Kubernetes jobs and JobSets (whose number of completions must be stated, as they
    tell their containers the index alone), SkyPilot, and TPU workers.

    Raises:
        ValueError: the text has another form, or the variables contradict each other.
    """
    if shard is not None:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"the shard {shard!r} is not I/N with I from 0 to N - 1; of three: 0/3, 1/3 and 2/3")
        return Host(int(found[1]), int(found[2]), f"--shard {shard}")
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = _number("SLURM_ARRAY_TASK_MIN", environment, 0)
        count = _number("SLURM_ARRAY_TASK_COUNT", environment, None)
        index = _number("SLURM_ARRAY_TASK_ID", environment, 0) - first
        if "SLURM_ARRAY_TASK_MAX" in environment and count > 1:
            step, rest = divmod(_number("SLURM_ARRAY_TASK_MAX", environment, None) - first, count - 1)
            if rest or not step or index % step:
                raise ValueError("the Slurm array has gaps; write --array=0-N, or give --shard I/N")
            index //= step
        return _checked(index, count, "SLURM_ARRAY_TASK_ID")
    if "JOB_COMPLETION_INDEX" in environment:
        index, count = _number("JOB_COMPLETION_INDEX", environment, 0), _kubernetes_count(environment)
        if "JOB_INDEX" in environment and "REPLICATED_JOB_REPLICAS" in environment:
            index += count * _number("JOB_INDEX", environment, 0)
            count *= _number("REPLICATED_JOB_REPLICAS", environment, None)
        return _checked(index, count, "JOB_COMPLETION_INDEX")
    if "SKYPILOT_NODE_RANK" in environment or "SKYPILOT_JOB_RANK" in environment:
        nodes = _number("SKYPILOT_NUM_NODES", environment, 1)
        index = _number("SKYPILOT_JOB_RANK", environment, 0) * nodes + _number("SKYPILOT_NODE_RANK", environment, 0)
        return _checked(index, nodes * _number("SKYPILOT_NUM_JOBS", environment, 1), "SKYPILOT_NODE_RANK")
    if "TPU_WORKER_ID" in environment and environment.get("TPU_WORKER_HOSTNAMES"):
        names = environment["TPU_WORKER_HOSTNAMES"].split(",")
        return _checked(_number("TPU_WORKER_ID", environment, 0), len(names), "TPU_WORKER_ID")
    return Host(0, 1, "alone")


def _kubernetes_count(environment: Mapping[str, str]) -> int:
    for name in ("JOB_COMPLETIONS", "PROCESSES_IN_JOB"):
        if name in environment:
            return _number(name, environment, None)
    raise ValueError(
        "JOB_COMPLETION_INDEX is set, but not of how many: set JOB_COMPLETIONS to the job's completions, or give "
        "--shard I/N"
    )


def _checked(index: int, count: int, name: str) -> Host:
    if not 0 <= index < count:
        raise ValueError(f"{name} makes this host {index} of {count}, counted from 0; give --shard I/N instead")
    return Host(index, count, name)


def _number(name: str, environment: Mapping[str, str], default: int | None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"{name} is {text!r}, which is no number; give --shard I/N instead")
    return int(text)
