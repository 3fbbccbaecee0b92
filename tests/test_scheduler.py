"""Who goes when, by numbers alone; and which slot's row a prompt's beginning is copied from."""

import numpy as np

from qwen2audio_jax.engine.handle import Handle
from qwen2audio_jax.engine.placement import Residents
from qwen2audio_jax.engine.request import Request
from qwen2audio_jax.engine.scheduler import MOST_POSITIONS, Admission, Waiting
from qwen2audio_jax.engine.work import Work
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.prefix import text_tokens


def test_waiting_ones_go_by_priority_and_then_as_they_came():
    waiting = Waiting()
    for index, priority in enumerate((0, 2, 0, 1, 2)):
        waiting.add(index, priority=priority)
    assert waiting.first(3) == [1, 4, 3]
    assert waiting.take(2) == [1, 4]
    assert waiting.drop(lambda item: item == 0) == [0]
    assert waiting.take(9) == [3, 2]
    assert len(waiting) == 0
    for index in range(4):
        waiting.add(index, priority=index % 2)
    waiting.put_back([(item, item % 2) for item in waiting.take(3)])
    assert waiting.take(9) == [1, 3, 0, 2]


def test_prompts_begin_at_once_where_nothing_else_runs():
    admission = Admission(slots=128, reading=256)
    assert admission.choose([10], free=128, running=0) == 1
    assert admission.choose([10] * 200, free=128, running=0) == 128


def test_a_prefill_that_fills_the_device_begins_at_once():
    admission = Admission(slots=128, reading=256)
    assert admission.choose([200, 100], free=2, running=126) == 2
    assert admission.choose([20, 30], free=2, running=126) == 0


def test_short_prompts_wait_until_the_empty_slots_cost_as_much_as_a_prefill():
    """A row ends at every step: admitted one by one each would cost a prefill, which takes as long as a step."""
    admission, free, begun, calls = Admission(slots=64, reading=256), 0, 0, 0
    wasted = 0
    for _ in range(400):
        count = admission.choose([20] * 30, free=min(free, 30), running=64 - free)
        calls += count > 0
        begun += count
        free -= count
        wasted += free
        admission.stepped(free)
        free += 1
    assert begun > 390 - 30
    best = min(steps / 2 + 64 / steps for steps in range(1, 60))  # empty slots and prefills, in slot-steps a row
    assert (wasted + 64 * calls) / begun < 2 * best


def test_so_much_is_prefilled_between_two_steps_that_rows_do_not_wait_long():
    admission = Admission(slots=32, reading=24)
    assert admission.choose([3000] * 9, free=9, running=20) == MOST_POSITIONS // 3000
    assert admission.choose([2 * MOST_POSITIONS, 1], free=9, running=20) == 1


def work(ids, *, budget=9, issued=0, tokens=()):
    made = Work(Handle(Request(prompt="x"), decode=str, on_change=None), GenerationConfig(), 0, 0.0)
    made.key, made.budget, made.issued, made.tokens = text_tokens(np.asarray(ids)), budget, issued, list(tokens)
    return made


def test_a_beginning_is_copied_from_the_row_that_holds_most_of_it():
    residents = Residents(4, shared=True, capacity=256)
    common = list(range(100))
    first, second = work(common), work([*common[:90], 7, 7, 7])
    assert residents.plan([first]).whole == [first]
    residents.take(first)
    plan = residents.plan([second])
    [beginning] = plan.extended.values()
    assert (beginning.slot, beginning.tokens, beginning.width) == (0, 90, 16)
    residents.take(second)
    third = work([*common, 500])
    assert residents.plan([third]).extended[third].tokens == 100
    # What was generated counts as far as it was read and appended.
    first.issued, first.tokens = 4, [1000, 1001, 1002]
    turn = work([*common, 1000, 1001, 1002, 5])
    assert residents.plan([turn]).extended[turn].tokens == 103
    first.issued = 3
    assert residents.plan([turn]).extended[turn].tokens == 102
    assert residents.plan([work(range(50, 150))]).extended == {}


def test_a_rest_that_is_long_or_has_no_room_is_computed_whole():
    residents = Residents(2, shared=True, capacity=256)
    residents.take(work(range(200)))
    for rest, copied in ((1, True), (32, True), (56, False), (300, False)):
        more = work([*range(200), *range(900, 900 + rest)])
        assert bool(residents.plan([more]).extended) == copied


def test_equal_prompts_wait_for_the_first_of_them():
    residents = Residents(4, shared=True, capacity=256)
    works = [work(range(100)) for _ in range(3)] + [work(range(500, 600))]
    plan = residents.plan(works)
    assert (plan.whole, plan.later) == ([works[0], works[3]], works[1:3])
    assert residents.plan(works[1:], ahead=works[:1]).later == works[1:3]
    alone = Residents(4, shared=False, capacity=256)
    assert alone.plan(works).whole == works


def test_nobody_goes_before_one_that_waits_for_a_slot():
    residents = Residents(1, shared=True, capacity=256)
    first, again, other = work(range(100)), work(range(110)), work(range(500, 600))
    residents.take(first)
    plan = residents.plan([again, other])
    assert (plan.works, plan.later) == ([], [again, other])
    assert residents.plan([other, again]).whole == [other]
    residents.release(first)
    plan = residents.plan([again, other])
    assert (list(plan.extended), plan.whole, plan.later) == ([again], [other], [])


def test_the_slot_released_longest_ago_is_taken_but_for_those_that_are_kept():
    residents = Residents(3, shared=True, capacity=256)
    works = [work([index] * 60) for index in range(3)]
    assert [residents.take(one) for one in works] == [0, 1, 2]
    for index in (1, 0, 2):
        assert residents.release(works[index])
        assert not residents.release(works[index])
    assert (residents.free, residents.in_use, residents.works()) == (3, 0, [])
    assert residents.take(work([9] * 60), kept={1}) == 0
    assert residents.take(work([9] * 60)) == 1


def test_rows_that_a_smaller_cache_would_cut_are_forgotten():
    residents = Residents(2, shared=True, capacity=512)
    short, long = work(range(100), issued=5), work(range(300, 425), issued=5)
    residents.take(short)
    residents.take(long)
    residents.release(short)
    residents.release(long)
    residents.cut(128)
    again = [work([*one.key[:, 0], 7]) for one in (short, long)]
    plan = residents.plan(again)
    assert (list(plan.extended), plan.whole) == ([again[0]], [again[1]])
