"""The TPU's attention kernel compiled for TPUs: one call a device, and no row's scores in memory.

At the published heads, clips of 30 s and prompts of 780 tokens; benchmarks/attention_memory.py compiles both forms, in
a process of its own, because libtpu allows one at a time.
"""

from functools import cache

import pytest
import tpu_programs
from tpu_programs import needs_libtpu

TOPOLOGIES = ("v5e:2x4", "v6e:2x2")


@cache
def report(*arguments: str) -> dict[str, list[dict]]:
    return tpu_programs.report("benchmarks/attention_memory.py", *TOPOLOGIES, *arguments)


@needs_libtpu
@pytest.mark.parametrize(
    "grouped",
    [
        pytest.param(False, id="published", marks=pytest.mark.slow(seconds=32, together="published")),
        pytest.param(True, id="grouped heads", marks=pytest.mark.slow(seconds=20, together="grouped")),
    ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernel_holds_no_scores(topology, grouped):
    # 8 key heads for 32 divide over both meshes.
    measured = report(
        *(("--prefill", "780", "--kv-heads", "8") if grouped else ("--encoder", "1500", "--prefill", "780"))
    )
    chips = {"v5e:2x4": 8, "v6e:2x2": 4}[topology]
    pairs = list(zip(measured[topology][::2], measured[topology][1::2], strict=True))
    assert [plain["stage"] for plain, _ in pairs] == (["prefill"] if grouped else ["encoder", "prefill"])
    for plain, flash in pairs:
        assert (plain["attention"], flash["attention"]) == ("xla", "pallas")
        assert (plain["kernels"], flash["kernels"]) == (0, 1)
        # float32 scores of every query and key, of one chip's rows and heads: what the plain form holds.
        rows, heads = (1, flash["heads"]) if flash["stage"] == "encoder" else (8, flash["heads"] // chips)
        scores = 4 * rows * heads * flash["tokens"] ** 2
        assert plain["temporary"] > 0.5 * scores
        assert flash["temporary"] < 0.5 * plain["temporary"]
