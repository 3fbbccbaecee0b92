"""int8 on a TPU, from the compiled programs: neither a weight nor the cache is ever widened in memory.

At the published widths, some layers with embedding and head; benchmarks/int8_memory.py compiles and reads them, in a
process of its own, because libtpu allows one at a time.
"""

from functools import cache

import pytest
import tpu_programs
from tpu_programs import ROOT, needs_libtpu

STEP = ("--layers", "4", "--capacity", "2048", "--stages", "decode")
# The decoder split over eight chips and over four, and one chip that holds the model.
MACHINES = {
    "v5e:2x4, both": ("--mesh", "1x8", "--layers", "2", "--capacity", "1024"),
    "one v5e": ("--mesh", "1x1", "--layers", "1", "--capacity", "1024"),
    "v5e:2x4": ("--mesh", "1x8", *STEP),
    "v6e:2x2": ("--mesh", "1x4", *STEP, "--topology", "v6e:2x2"),
}
SLOW = [
    pytest.param(machine, marks=pytest.mark.slow(seconds=seconds, together=machine))
    for machine, seconds in (("one v5e", 13), ("v5e:2x4, both", 12), ("v5e:2x4", 12), ("v6e:2x2", 3))
]


@cache
def report(machine: str) -> dict[str, dict]:
    stages = tpu_programs.report("benchmarks/int8_memory.py", *MACHINES[machine], timeout=1800)
    return {each["stage"]: each for each in stages}


def sizes(machine: str) -> tuple[int, int, int]:
    """Chips, layers and capacity."""
    arguments = MACHINES[machine]
    return int(arguments[1].removeprefix("1x")), int(arguments[3]), int(arguments[5])


@needs_libtpu
@pytest.mark.parametrize("machine", SLOW)
def test_no_weight_is_widened(machine):
    got = report(machine)
    assert set(got) == ({"decode"} if "--stages" in MACHINES[machine] else {"decode", "prefill"})
    for stage in got.values():
        assert stage["weights_widened"] == []
        assert stage["cache_widened"] == []


@needs_libtpu
@pytest.mark.parametrize("machine", SLOW)
def test_a_step_reads_codes_alone(machine):
    got = report(machine)["decode"]
    chips, layers, capacity = sizes(machine)
    # Layers, embedding and head at a byte a weight; keys and values of 8 rows with a scale a token and head.
    weights = (layers * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 2 * 156032 * 4096) // chips
    cache_bytes = layers * 2 * 8 * 32 * capacity * (128 + 4) // chips
    assert got["codes"] == weights
    assert got["cache"] == cache_bytes
    # All weights are resident: beside the codes those of the encoder, which are not int8, norms, biases and scales.
    assert got["weights"] + cache_bytes < got["arguments"] < 1.01 * (got["weights"] + cache_bytes)
    assert got["aliased"] >= cache_bytes
    # Some 100 MiB however many layers and positions there are; a chip's eighth of the head, widened, would be 152.
    assert 0 < got["temporary"] <= 120 * 2**20
    assert got["weights_relaid"] == got["cache_copies"] == []


@needs_libtpu
@pytest.mark.parametrize("machine", SLOW[1:])
def test_a_step_sends_activations_alone(machine):
    """See test_tpu.py; the embedding takes one sum more, of the scales beside that of the codes."""
    got = report(machine)["decode"]
    assert got["collectives"] == {"all-reduce": 2 * sizes(machine)[1] + 4, "all-gather": 2}
    # Hidden states [8, 4096], those of the embedding before they are rounded to bfloat16.
    assert 0 < got["largest_collective"] <= 8 * 4096 * 4


def test_fused_conversions_are_told_from_arrays_in_memory(monkeypatch):
    """The measurement can fail."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import int8_memory

    program = """HloModule step
%fused.1 (p: s8[4096,11008]) -> bf16[8,11008] {
  %p = s8[4096,11008]{1,0} parameter(0)
  %convert.1 = bf16[4096,11008]{1,0} convert(%p)
}
ENTRY %main (a: s8[4096,11008]) -> bf16[8,11008] {
  %a = s8[4096,11008]{1,0:T(32,128)(4,1)} parameter(0)
  %convert.2 = bf16[4096,11008]{1,0} convert(%a)
  ROOT %fusion.1 = bf16[8,11008]{1,0} fusion(%a), kind=kOutput, calls=%fused.1
}
"""
    arrays = [array for _, found in int8_memory.results(program) for array in found]
    assert arrays == [("s8", (4096, 11008)), ("bf16", (4096, 11008)), ("bf16", (8, 11008))]
    shards = {(4096, 11008)}
    assert int8_memory.same_values((11008, 4096), shards)
    assert int8_memory.same_values((4096, 86, 128), shards)
    assert not int8_memory.same_values((8, 11008), shards)
