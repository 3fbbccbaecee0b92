"""Fuzzing of the reader of safetensors files and indices: no crash, no hang, no read outside the folder.

    python benchmarks/fuzz_checkpoints.py [--examples 50000]

The short form is tests/test_fuzz.py; results stand in convert_7b.md.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50_000)
    options = parser.parse_args()
    import checkpoint_fuzz

    seen: Counter[bool] = Counter()

    @settings(max_examples=options.examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(checkpoint_fuzz.folders())
    def fuzz(contents):
        seen[checkpoint_fuzz.attempt(contents)] += 1

    began = time.monotonic()
    fuzz()
    print(f"{seen.total()} folders in {time.monotonic() - began:.0f} s: {seen[False]} refused, {seen[True]} read whole")


if __name__ == "__main__":
    main()
