"""The shares of the slow tests: disjoint, together all, about equally long, and the same in every process."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from slow_shares import SECONDS, deal


@dataclass(frozen=True)
class Item:
    nodeid: str
    marks: dict = field(default_factory=dict, hash=False)
    path: Path = Path("test_it.py")

    def get_closest_marker(self, name):
        return pytest.mark.slow(**self.marks).mark if name == "slow" and self.marks is not None else None


def items(*seconds):
    return [Item(f"test_{index:02}", {"seconds": value}) for index, value in enumerate(seconds)]


@pytest.mark.parametrize("shares", [1, 3, 7])
def test_every_slow_test_is_in_one_share_and_the_shares_take_equally_long(shares):
    draw = random.Random(shares)
    slow = items(*(draw.randint(1, 30) for _ in range(60)))
    dealt = deal([Item("quick", None), *slow], shares)
    together = [item for _, share in dealt for item in share]
    assert len(dealt) == shares
    assert len(together) == len(slow)
    assert set(together) == set(slow)
    assert [seconds for seconds, _ in dealt] == [sum(item.marks["seconds"] for item in share) for _, share in dealt]
    seconds = [seconds for seconds, _ in dealt]
    assert max(seconds) - min(seconds) <= 30


def test_the_longest_first_to_the_share_that_has_least():
    a, b, c, d = items(5, 5, 8, 20)
    assert deal([a, b, c, d], 2) == [(20, [d]), (18, [c, a, b])]
    assert deal([d, b, c, a], 2) == deal([a, b, c, d], 2)


def test_tests_that_prepare_one_thing_stay_together():
    pair = [Item(name, {"seconds": 6, "together": "one"}) for name in ("x", "y")]
    elsewhere = Item("z", {"seconds": 6, "together": "one"}, Path("test_other.py"))
    assert deal([pair[0], elsewhere, pair[1]], 2) == [(12, pair), (6, [elsewhere])]


def test_a_mark_without_seconds():
    assert deal([Item("x")], 2) == [(SECONDS, [Item("x")]), (0, [])]
