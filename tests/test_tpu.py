"""The decode step of the published 7B, compiled for eight TPU v5e chips and four v6e: no second copy of the cache.

Shapes only, at the published widths (8 layers; all 32 where a test is slow), through the step that `generate` runs;
benchmarks/decode_memory.py compiles it and reads the compiled program. It runs in a process of its own, because libtpu
allows one at a time.
"""

from functools import cache

import pytest
import tpu_programs
from tpu_programs import ROOT, needs_libtpu

FULL = 32
"""Layers."""


@cache
def report(*arguments: str) -> dict:
    return tpu_programs.report("benchmarks/decode_memory.py", *arguments)


# The larger mesh axis splits 32 KV heads in 8; the third mesh has two groups of rows as well.
STEPS = [
    pytest.param(("decode", "--mesh", "1x8", "--layers", "8"), id="1x8, 8 layers"),
    pytest.param(("decode", "--mesh", "1x8"), id="1x8", marks=pytest.mark.slow(seconds=5, together="1x8")),
    pytest.param(("decode", "--mesh", "2x4"), id="2x4", marks=pytest.mark.slow(seconds=5, together="2x4")),
    pytest.param(
        ("decode", "--topology", "v6e:2x2", "--mesh", "1x4"),
        id="v6e",
        marks=pytest.mark.slow(seconds=5, together="v6e"),
    ),
]


@needs_libtpu
@pytest.mark.parametrize("arguments", STEPS)
class TestDecodeStep:
    def test_is_the_published_model(self, arguments):
        got = report(*arguments)
        layers = int(arguments[arguments.index("--layers") + 1]) if "--layers" in arguments else FULL
        assert (got["layers"], got["rows"], got["capacity"]) == (layers, 8, 2048)
        v6e = "v6e:2x2" in arguments
        assert (got["topology"], got["mesh"]) == (
            "v6e:2x2" if v6e else "v5e:2x4",
            arguments[arguments.index("--mesh") + 1],
        )
        # Keys and values: 32 heads of 128, bfloat16, 8 rows of 2048 positions, an equal part on each chip.
        assert got["cache"] == 2 * layers * 8 * 32 * 2048 * 128 * 2 // (4 if v6e else 8)
        # The decoder's part is read by the step; what was not lowered with it could not be counted.
        assert got["arguments"] > got["cache"] + 0.2 * 2**30 * layers / 4

    def test_writes_the_cache_in_place(self, arguments):
        got = report(*arguments)
        assert got["cache"] <= got["aliased"] <= got["cache"] + 4096
        assert got["outputs"] - got["aliased"] < 0.01 * got["cache"]
        # However many layers there are, what a step holds beside the cache is the same.
        assert 0 < got["temporary"] <= 0.1 * got["cache"] * FULL / got["layers"]
        assert got["cache_copies"] == 0

    def test_lays_no_weight_out_anew(self, arguments):
        assert report(*arguments)["weights_relaid"] == 0

    def test_moves_only_activations_between_chips(self, arguments):
        got = report(*arguments)
        # Two sums a layer, one for the embedding, two for the choice of the token; the chips' best candidates.
        assert got["collectives"] == {"all-reduce": 2 * got["layers"] + 3, "all-gather": 2}
        # At most the hidden states [8, 4096]: neither weights nor logits [8, 156032] are brought together.
        assert 0 < got["largest_collective"] <= 8 * 4096 * 2


SLOTS = [
    pytest.param(("--mesh", "2x4", "--layers", "2"), id="2x4, 2 layers"),
    *(
        # One chip of v5e does not hold all 32 layers.
        pytest.param(
            ("--mesh", mesh, "--layers", str(layers)), id=mesh, marks=pytest.mark.slow(seconds=15, together=mesh)
        )
        for mesh, layers in (("1x8", FULL), ("2x4", FULL), ("8x1", 8))
    ),
]


@needs_libtpu
@pytest.mark.parametrize("arguments", SLOTS)
def test_an_engine_of_128_slots_copies_no_cache(arguments):
    stages = ("insert", "slots", "choose", "narrow", "copy-rows")
    insert, step, choice, *copies = report(*stages, *arguments, "--rows", "128", "--capacity", "1024")
    for got in (insert, step):
        assert got["cache"] == 2 * got["layers"] * 128 * 32 * 1024 * 128 * 2 // 8
        assert got["cache"] <= got["aliased"] <= got["cache"] + 4096
        assert got["cache_copies"] == got["cache_staged"] == 0
    # Rows that are copied out of it: a few that are continued apart, and one a group of devices to be extended.
    for got in copies:
        assert got["cache_copies"] == got["cache_staged"] == 0
        assert got["temporary"] < got["cache"]
    narrow, _ = copies
    assert insert["collectives"] == narrow["collectives"] == {}
    # Together as in the step of `generate`, and the largest n of all rows' rules of n-grams.
    if "8x1" not in arguments:
        more = 1 if "2x4" in arguments else 0
        assert step["collectives"] == {"all-reduce": 2 * step["layers"] + 1}
        assert choice["collectives"] == {"all-reduce": 2 + more, "all-gather": 2}
        assert step["largest_collective"] <= 128 * 4096 * 2
        assert choice["largest_collective"] <= 128 * 64 * 4 * 8


@needs_libtpu
def test_a_scan_over_stacked_buffers_is_seen_to_copy_the_cache():
    """The measurement can fail: a program known to need a second cache has one."""
    got = report("scan", "--layers", "2")
    assert got["temporary"] >= got["cache"]


def test_copies_within_main_memory_are_told_from_moves_to_the_chip(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import decode_memory

    layout = "bf16[8,4,2048,128]{3,2,1,0:T(8,128)(2,1)%s}"
    here, chip = layout % "", layout % "S(1)"
    program = f"""
  %copy.1 = {here} copy(%parameter.3), metadata={{}}
  %copy-start.1 = ({here}, {here}, u32[]{{:S(2)}}) copy-start(%parameter.3)
  %copy-start.2 = ({here}, {chip}, u32[]{{:S(2)}}) copy-start(%while.3)
  %copy.2 = bf16[4096,4,128]{{2,0,1:T(8,128)(2,1)}} copy(%parameter.9)
  ROOT %all-gather.1 = f32[8,156032]{{1,0:T(8,128)}} all-gather(%fusion.1)
"""
    assert decode_memory.cache_moves(program, shape=(8, 4, 2048, 128), dtype="bf16") == (2, 1)
    gathered = list(decode_memory.operations(program, "all-gather"))
    assert [decode_memory.type_bytes(printed) for _, printed, _ in gathered] == [8 * 156032 * 4]
