"""The host's own time in `generate`: CPU time of the thread that calls it, for a call and for each step.

    python benchmarks/host_time.py

While the device computes, the thread waits, which costs no CPU time. A call of 1 token is what checking, preparing and
issuing cost; from there each token more is a step. Random weights of the mid-size configuration, a clip of 5 s; the
median of `--rounds`, as JSON with the machine. Needs the extra `test`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from side_by_side import inputs_of, machine, prepare

STEPS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mid-size", help="configuration of random weights (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, model = prepare(arguments.model, "float32", Path(folder))
        inputs = inputs_of(model.config, (5,), 30)

        def host_ms(tokens: int) -> float:
            began = time.thread_time()
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=[], pad_token_id=0)
            return 1000 * (time.thread_time() - began)

        host_ms(1 + STEPS)
        one = statistics.median(host_ms(1) for _ in range(arguments.rounds))
        many = statistics.median(host_ms(1 + STEPS) for _ in range(arguments.rounds))
    figures = {"call of 1 token, ms": round(one, 2), "each further step, ms": round((many - one) / STEPS, 3)}
    print(json.dumps({"model": arguments.model, **figures, "machine": machine()}))


if __name__ == "__main__":
    main()
