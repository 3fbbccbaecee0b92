"""A batch job in a process of its own, by an answerer that needs no model: [inputs, options of run_batch] as JSON."""

import json
import sys
import time

from qwen2audio_jax.batch import run_batch


class Echo:
    """Answers with what it was asked; `delay` seconds a record."""

    def __init__(self, *, delay: float = 0.0, **settings):
        self.delay, self.settings = delay, {"model": {"name": "echo"}, **settings}

    def __call__(self, records):
        time.sleep(self.delay * len(records))
        return [row(record) for record in records]


def row(record) -> dict:
    if record.prompt == "fail":
        return {"id": record.id, "error": {"kind": "input", "message": "it was to fail"}}
    text = f"{record.prompt} {len(record.clips)} {record.seed}"
    return {"id": record.id, "text": text, "finish_reason": "eos", "audio_seconds": 2.0, "tokens": 3}


if __name__ == "__main__":
    inputs, delay, options = json.loads(sys.argv[1])
    print("started", flush=True)
    summary = run_batch(inputs, answerer=Echo(delay=delay), **options)
    print(json.dumps([summary.state, summary.figures]), flush=True)
    assert "jax" not in sys.modules
    sys.exit({"finished": 0, "unfinished": 3}[summary.state])
