"""Random requests to an engine: arrivals, lengths, options, cancellations and faults, each judged against `generate`.

Whole, by hand: `python tests/simulation.py --requests 5000`.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from prompts import row_alone

from qwen2audio_jax.engine import Engine, Request, RequestError
from qwen2audio_jax.generation import grammars, sampler_state, sampling, sampling_params


@dataclass
class Case:
    """A request, and what is to become of it."""

    request: Request
    wait: float
    cancel_after: int | None
    fault: str | None


def random_cases(
    name: str, count: int, *, seed: int, pool: int = 40, longest: int = 60, frames: int = 260
) -> list[Case]:
    """Cases with prompts out of a pool, so that clips and beginnings come again."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    prompts = []
    for index in range(pool):
        line = [int(rng.integers(1, longest))]
        if rng.random() < 0.6:
            line += [str(rng.integers(3, frames)) for _ in range(int(rng.choice([1, 1, 1, 3])))]
            line.append(int(rng.integers(1, min(20, longest))))
        prompts.append(row_alone(name, 0, (line,), seed=index % 7))
        if rng.random() < 0.5:  # another question after the same beginning
            same = {key: value.copy() for key, value in prompts[-1].items()}
            more = rng.integers(0, 300, (1, int(rng.integers(1, 12))))
            same["input_ids"] = np.concatenate([same["input_ids"], more], axis=1)
            same["attention_mask"] = np.ones_like(same["input_ids"])
            prompts.append(same)
    cases = []
    for index in range(count):
        inputs, fault = prompts[int(rng.integers(len(prompts)))], None
        options = {"max_new_tokens": int(rng.integers(1, 25))}
        if rng.random() < 0.4:
            options |= {
                "do_sample": True,
                "temperature": float(rng.uniform(0.5, 2)),
                "top_p": float(rng.uniform(0.3, 1)),
            }
            options["top_k"] = int(rng.choice([0, 1, 7, 50, 64, 65, 200]))
        if other.random() < 0.3:
            options["min_p"] = float(other.uniform(0, 0.5))
        if other.random() < 0.3:
            options["no_repeat_ngram_size"] = int(other.integers(1, 5))
        if rng.random() < 0.3:
            options["repetition_penalty"] = float(rng.uniform(0.8, 1.5))
        if rng.random() < 0.2:
            options["min_new_tokens"] = int(rng.integers(1, options["max_new_tokens"] + 1))
        if rng.random() < 0.3:
            options["eos_token_id"] = rng.integers(0, 300, int(rng.integers(1, 9))).tolist()
        if rng.random() < 0.1:
            options["stop_strings"] = ["a", "e "]
        if rng.random() < 0.1 and not options.get("do_sample") and grammars.available():
            options["regex"] = str(rng.choice(["[a-z ]{1,8}", "[a-m]+", "(ab|ba)*x"]))
            options["eos_token_id"] = [0]
        kind = rng.random()
        if kind < 0.02:
            options["temperature"], fault = -1.0, "input"
        elif kind < 0.04:
            inputs = {**inputs, "input_ids": np.full((1, 3), 9999), "attention_mask": np.ones((1, 3), int)}
            inputs.pop("input_features", None)
            fault = "input"
        elif kind < 0.06:
            request = Request(prompt="What is said?", clips=("/nowhere/clip.wav",), id=str(index), options=options)
            cases.append(Case(request, 0.0, None, "missing"))
            continue
        elif kind < 0.07:
            options["max_new_tokens"], fault = 30_000, "input"
            options.pop("min_new_tokens", None)
        request = Request(
            inputs=inputs,
            options=options,
            seed=int(rng.integers(2**32)),
            id=str(index),
            priority=int(rng.integers(3)),
        )
        wait = float(rng.exponential(0.003)) if rng.random() < 0.3 else 0.0
        cancel = int(rng.integers(0, 6)) if fault is None and rng.random() < 0.08 else None
        cases.append(Case(request, wait, cancel, fault))
    return cases


def run(engine: Engine, cases: list[Case]) -> list:
    """The outcome of each case: an answer, or an error."""
    handles = []

    def watch(case):
        def on_change(handle):
            if len(handle._tokens) >= case.cancel_after:
                handle.cancel()

        return on_change

    for case in cases:
        time.sleep(case.wait)
        handle = engine.submit(case.request, on_change=None if case.cancel_after is None else watch(case))
        if case.cancel_after == 0:
            handle.cancel()
        handles.append(handle)
    outcomes = []
    for handle in handles:
        try:
            outcomes.append(handle.result(timeout=300))
        except RequestError as error:
            outcomes.append(error)
    return outcomes


def judge(model, processor, cases: list[Case], outcomes: list) -> dict[str, int]:
    """Compare every outcome with `generate`; the numbers of each kind."""
    counts = {"equal": 0, "cancelled": 0, "errors": 0, "reused": 0, "decided by rounding": 0}
    known: dict[str, tuple] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        request = case.request
        if case.fault is not None:
            assert isinstance(outcome, RequestError), (request.id, outcome)
            assert outcome.kind == case.fault, (request.id, outcome.kind, str(outcome))
            counts["errors"] += 1
            continue
        assert not isinstance(outcome, RequestError), (request.id, outcome)
        seed = request.seed if request.options.get("do_sample") else None
        key = repr((request.inputs["input_ids"].tobytes(), sorted(request.options.items()), seed))
        if "input_features" in request.inputs:
            key += str(request.inputs["input_features"].sum())
        if key not in known:
            output = model.generate(
                **request.inputs,
                **request.options,
                seed=request.seed,
                tokenizer=processor,
                return_dict_in_generate=True,
            )
            width, length = request.inputs["input_ids"].shape[1], int(output.lengths[0])
            known[key] = output.sequences[0, width : width + length], output.log_probs[0, :length]
            known[key] += (output.finish_reasons[0],)
        ids, log_probs, reason = known[key]
        assert outcome.id == request.id
        got = len(outcome.token_ids)
        differ = outcome.token_ids != ids[:got] if got <= len(ids) else np.ones(1, bool)
        if seed is not None and differ.any():
            first = int(differ.argmax())
            assert rounding_decides(model, request, ids, first, int(outcome.token_ids[first])), (request.id, first)
            counts["decided by rounding"] += 1
            continue
        np.testing.assert_array_equal(outcome.token_ids, ids[:got], err_msg=f"request {request.id}: {request.options}")
        np.testing.assert_allclose(outcome.log_probs, log_probs[:got], atol=2e-4)
        if outcome.finish_reason == "cancelled":
            assert case.cancel_after is not None, request.id
            counts["cancelled"] += 1
        else:
            assert (got, outcome.finish_reason) == (len(ids), reason), request.id
            counts["equal"] += 1
        counts["reused"] += outcome.reused_tokens > 0
    return counts


def rounding_decides(model, request: Request, ids: np.ndarray, step: int, other: int) -> bool:
    """Whether logits that differ by float32's rounding draw another token at a step: both come of the same number.

    A draw falls between two tokens within the rounding of their probabilities about once in ten thousand.
    """
    made = ids[:step]
    prompt = request.inputs["input_ids"]
    inputs = {**request.inputs, "input_ids": np.concatenate([prompt, made[None]], axis=1)}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    logits = np.asarray(model(**inputs).logits)[0, -1]
    rows = 512
    noise = np.random.default_rng(0).uniform(-1e-5, 1e-5, (rows, len(logits)))
    config = model.generation_config.updated(**{name: value for name, value in request.options.items()})
    params = sampling_params.sampling_params(config, vocab_size=len(logits))
    seeds = np.full(rows, request.seed, np.uint32)
    sizes = {"vocab_size": len(logits), "positions": model.config.text_config.max_position_embeddings}
    state = sampler_state.init_state([inputs["input_ids"][0]] * rows, seeds, **sizes)
    state = jax.tree.map(jnp.asarray, replace(state, step=np.full(rows, step, np.int32)))
    drawn = np.asarray(
        sampling.next_token(jnp.asarray(logits + noise, jnp.float32), state, params, mode="sample").tokens
    )
    return {other, int(ids[step])} <= set(drawn.tolist())


def main() -> None:
    """Run a simulation from the command line, and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import tempfile
    from pathlib import Path

    from hf_layout import write_hf_checkpoint

    from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    with tempfile.TemporaryDirectory() as folder:
        write_hf_checkpoint(Path(folder) / "hf", "gqa")
        model = Qwen2AudioForConditionalGeneration.from_pretrained(Path(folder) / "hf", cache_dir=folder)
        processor = Qwen2AudioProcessor.from_pretrained(Path(folder) / "hf")
        cases = random_cases("gqa", arguments.requests, seed=arguments.seed)
        compiled = []
        with Engine(model, processor, slots=arguments.slots, positions=256) as engine:
            engine.warmup(seconds=3)
            jax.monitoring.register_event_duration_secs_listener(
                lambda event, seconds, fun_name=None, **_: (
                    compiled.append(fun_name) if "backend_compile" in event else 0
                )
            )
            memory, outcomes = [], []
            for start in range(0, len(cases), max(len(cases) // 10, 1)):
                outcomes += run(engine, cases[start : start + max(len(cases) // 10, 1)])
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
            figures = {"stats": engine.stats(), "resident_bytes": memory, "compiled": len(compiled)}
        print(json.dumps({**judge(model, processor, cases, outcomes), **figures}))


if __name__ == "__main__":
    main()
