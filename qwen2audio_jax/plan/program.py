"""Parser of a compiled program's text: operations, sizes, and collectives."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_SIZES = {
    **{"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2},
    **{"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1},
}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z\d]*|pred)\[([\d,]*)\]")


def operations(program: str, *kinds: str) -> Iterator[tuple[str, str, str]]:
    """(kind, printed type of the result, rest of the line) of every operation of these kinds in a program's text."""
    pattern = re.compile(r"^\s*(?:ROOT )?\S+ = (.*?) (" + "|".join(kinds) + r")\((.*)$", re.MULTILINE)
    for match in pattern.finditer(program):
        yield match[2], match[1], match[3]


def array_bytes(printed: str) -> list[int]:
    """Bytes of every array in a printed type, without padding."""
    return [
        _SIZES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in _ARRAY.findall(printed)
    ]


def type_bytes(printed: str) -> int:
    """Bytes of the largest array in a printed type, without padding."""
    return max(array_bytes(printed))


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, each time that it runs.

    Attributes:
        kind: one of `COLLECTIVES`.
        bytes: of the whole arrays, as one device sees them: the reduced or the gathered array.
        group: number of participating devices.
    """

    kind: str
    bytes: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends if the group is a ring, the minimum."""
        if self.kind == "collective-permute":
            return self.bytes
        share = (self.group - 1) / self.group
        return (2 * share if self.kind == "all-reduce" else share) * self.bytes


def collectives(program: str, *, devices: int) -> list[Collective]:
    """Every exchange in a program's text; those inside a loop once. Groups of one device are left out.

    Args:
        program: `compiled.as_text()`.
        devices: number of devices of the program: the group's size if the text does not state it.
    """
    # An asynchronous exchange is two operations; only its start is counted.
    names = [*COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES)]
    found = []
    for name, printed, rest in operations(program, *names):
        kind = name.removesuffix("-start")
        arrays = array_bytes(printed)
        group = group_size(rest, devices=devices)
        if name == "all-reduce-start" or not name.endswith("-start"):
            size = sum(arrays)
        else:
            # The result of these starts holds the operand too (and flags): the larger one is what is gathered.
            size = max(arrays)
        if kind == "reduce-scatter" and not name.endswith("-start"):
            size *= group
        if group > 1:
            found.append(Collective(kind, size, group))
    return found


def group_size(attributes: str, *, devices: int) -> int:
    """Devices of a group, of the forms {{0,1},{2,3}}, [2,4]<=[8] and mesh['a'=2,'b'=4] {'b'}; by default all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\S* \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return 2 if match[1] else 1
    return devices


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Count and total bytes of collectives, by kind."""
    result: dict[str, dict[str, int]] = {}
    for one in found:
        entry = result.setdefault(one.kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += one.bytes
    return result
