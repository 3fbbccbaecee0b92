"""Response files: answers in the layout that the scripts of other benchmarks read.

AIR-Bench's scripts read JSON lines of its own records with a `response`, MMAU's a JSON list of its own with a
`model_prediction`. The records' own keys come from the `meta` of the manifest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen2audio_jax.evaluation.expected import own_meta

AIR_BENCH = ("path", "question", "answer_gt", "task_name", "dataset_name", "uniq_id")
"""Keys of AIR-Bench's records that its response files repeat."""
AIR_BENCH_CHAT = ("meta_info", *AIR_BENCH)
AIR_BENCH_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
MMAU = ("id", "question", "choices", "answer")


def response_files(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Name -> content of the response files that rows of a job make; none where their records are of no benchmark.

    Names are those that the scripts read: `Chat_result_modelx.jsonl` and `Foundation_result_modelx.jsonl` of AIR-Bench,
    `mmau_predictions.json` for MMAU's `--input`.
    """
    own = [own_meta(row) for row in rows]
    said = [row.get("text", "") for row in rows]
    if _all_have(own, AIR_BENCH_CHAT):
        return {"Chat_result_modelx.jsonl": _lines(_air_bench(own, said, AIR_BENCH_CHAT))}
    if _all_have(own, (*AIR_BENCH, *AIR_BENCH_CHOICES[:2])):
        return {"Foundation_result_modelx.jsonl": _lines(_air_bench(own, said, (*AIR_BENCH, *AIR_BENCH_CHOICES)))}
    if _all_have(own, MMAU):
        found = [{**meta, "model_prediction": text} for meta, text in zip(own, said, strict=True)]
        return {"mmau_predictions.json": (json.dumps(found, ensure_ascii=False, indent=2) + "\n").encode()}
    return {}


def _all_have(own: Sequence[Any], names: Sequence[str]) -> bool:
    return bool(own) and all(isinstance(meta, dict) and set(names) <= set(meta) for meta in own)


def _air_bench(own: Sequence[Any], said: Sequence[str], names: Sequence[str]) -> Iterable[dict[str, Any]]:
    for meta, text in zip(own, said, strict=True):
        yield {**{name: meta.get(name) for name in names}, "response": text}


def _lines(values: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
