"""The slow tests dealt out into shares that take about equally long: `pytest -m slow --slow-share K/N`.

`@pytest.mark.slow(seconds=...)` says how long a test takes alone on two cores from an empty compilation cache, its
fixtures included; `together="..."` names what the tests of a file prepare once, so that they stay together.
"""

from collections import defaultdict
from collections.abc import Sequence

import pytest

SECONDS = 10
"""Of a test whose mark says nothing."""


def deal(items: Sequence[pytest.Item], shares: int) -> list[tuple[float, list[pytest.Item]]]:
    """(seconds, tests) of each share: the longest first, each to the share that has the least."""
    units = defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("slow")) is not None:
            units[str(item.path), mark.kwargs.get("together", item.nodeid)].append(item)
    weighed = [(sum(seconds_of(item) for item in unit), unit[0].nodeid, unit) for unit in units.values()]
    dealt: list[tuple[float, list[pytest.Item]]] = [(0.0, []) for _ in range(shares)]
    for seconds, _, unit in sorted(weighed, key=lambda each: (-each[0], each[1])):
        least = min(range(shares), key=lambda share: dealt[share][0])
        dealt[least] = dealt[least][0] + seconds, dealt[least][1] + unit
    return dealt


def seconds_of(item: pytest.Item) -> float:
    mark = item.get_closest_marker("slow")
    assert mark is not None
    return mark.kwargs.get("seconds", SECONDS)
