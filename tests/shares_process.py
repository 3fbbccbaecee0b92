"""One of several processes of test_shares.py, as a program: CASE (JSON), coordinator, folder for the results."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import tiny
from prompts import RAGGED, random_inputs

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.parallel.distributed import initialize

OPTIONS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": tiny.IM_END, "do_sample": False, "repetition_penalty": 1.1}

# Of the four ragged rows (0, 1, 2 and 3 clips), one of them by itself without any clip.
PARTS = {2: [(1, 2, 3), (0,)], 4: [(0,), (1, 2), (3,), (2,)]}
BUDGETS = (9, 12, 7, 12)


def of_rows(rows):
    return random_inputs("gqa", [RAGGED[i] for i in rows], seed=3)


def work(case, folder):
    """One process of a test: everything it is asked for, into a file."""
    own, results = case["process"], {}
    mesh = make_mesh(data=case["data"], model=case["model"])
    model = Qwen2AudioForConditionalGeneration.from_pretrained(case["checkpoint"], mesh=mesh)
    inputs = of_rows(case["rows"])
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    called = model(**inputs, labels=labels)
    results["logits"], results["loss"] = np.asarray(called.logits), np.asarray(called.loss)
    budget = BUDGETS[case["group"]]
    results["tokens"] = model.generate(**inputs, **OPTIONS, max_new_tokens=budget)
    if case["full"]:
        sampled = {"do_sample": True, "temperature": 1.2, "num_return_sequences": case["copies"], "max_new_tokens": 6}
        results["sampled"] = model.generate(**inputs, **{**OPTIONS, **sampled}, seed=case["seed"])
        drawn = model.generate(**inputs, **{**OPTIONS, **sampled})
        assert drawn.shape == results["sampled"].shape
        if "input_features" in inputs:
            heard = inputs["input_features"], inputs["feature_attention_mask"]
        else:
            heard = tuple(of_rows((1,))[name] for name in ("input_features", "feature_attention_mask"))
        features = model.encode_audio(*heard)
        results["projected"], results["lengths"] = np.asarray(features.projected), np.asarray(features.lengths)
    said = {}
    wrong = {**inputs, "input_ids": inputs["input_ids"] + 400} if own == 1 else inputs
    for name, call in {
        "wrong": lambda: model.generate(**wrong, **OPTIONS, max_new_tokens=3),
        "options": lambda: model.generate(**inputs, **{**OPTIONS, "repetition_penalty": 1.0 + own}, max_new_tokens=3),
        "stream": lambda: model.stream(**inputs, tokenizer=None),
        "rows": lambda: model(**{**inputs, "input_ids": np.where(inputs["input_ids"] < 290, own, inputs["input_ids"])}),
    }.items():
        try:
            call()
            said[name] = "done"
        except ValueError as error:
            said[name] = str(error)
    assert jax.process_count() == case["processes"]
    np.savez(Path(folder, f"{own}.npz"), said=json.dumps(said), **results)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    initialize(sys.argv[2], process_id=case["process"], num_processes=case["processes"], timeout=120)
    work(case, sys.argv[3])
