"""Time to the first token of a first and of a second question about one clip of 30 s, through a session.

    python benchmarks/second_question.py

Random weights of configs/mid-size.json (0.72 B parameters) in float32. In every round a new session is asked about a
new clip; then, in the same session, a second question as the next turn of the chat, and another one about the clip
alone; and last the model is asked that second question without a session, which must give the same tokens. Times run
from the call to the first piece of text, in two ways: with the clip's log-mel features at hand, and with the time that
these take added, because a session is given whole prompts. One round before them compiles. Results:
second_question.md.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.model.qwen2_audio import init_params
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
CASES = ("first question", "second question, next turn", "second question, the clip alone", "the same from scratch")


class Ids:
    """A tokenizer that writes ids as they are, so that every token is a piece of text."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return "".join(f"{int(token)} " for token in ids)


def first_token(pieces: Generator[str, None, str], began: float) -> tuple[float, list[int]]:
    """Seconds from `began` to the first token, and all tokens."""
    text = next(pieces)
    seconds = time.perf_counter() - began
    return seconds, [int(token) for token in (text + "".join(pieces)).split()]


class Asker:
    """Prompts about one clip [n] after another, timed."""

    def __init__(self, config: Qwen2AudioConfig):
        self.model = Qwen2AudioForConditionalGeneration(config, init_params(config, seed=0))
        self.extractor = Qwen2AudioFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
        self.rng = np.random.default_rng(0)

    def text(self, count: int) -> np.ndarray:
        """Random text ids [count]."""
        return self.rng.integers(0, 256, count)

    def ask(self, source: Any, ids: np.ndarray, heard: dict[str, np.ndarray]) -> tuple[float, list[int]]:
        """One prompt to the model or to a session: see `first_token`."""
        began = time.perf_counter()
        return first_token(source.stream(input_ids=ids[None], **heard, tokenizer=Ids(), **OPTIONS), began)

    def round(self, seconds: float) -> dict[str, float]:
        """A clip and its questions."""
        samples = self.rng.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
        began = time.perf_counter()
        heard = dict(self.extractor([samples]))
        times = {"features": time.perf_counter() - began}
        vectors = token_count(int(heard["feature_attention_mask"].sum()))
        audio = np.full(vectors, self.model.config.audio_token_index)
        clip = np.concatenate([self.text(16), audio])
        question = np.concatenate([clip, self.text(16)])
        with self.model.session() as session:
            times[CASES[0]], answer = self.ask(session, question, heard)
            turn = np.concatenate([question, answer, self.text(24)])
            times[CASES[1]], _ = self.ask(session, turn, heard)
            again = np.concatenate([clip, self.text(24)])
            times[CASES[2]], short = self.ask(session, again, heard)
        times[CASES[3]], whole = self.ask(self.model, again, heard)
        if short != whole:
            raise AssertionError(f"a session answers {short}, the model {whole}")
        return times


def report(rounds: list[dict[str, float]]) -> str:
    """The medians, as a table; ratios are medians of each round's."""
    lines = [
        "| | first token, features at hand | ratio | from samples | ratio |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        ahead = [times[case] for times in rounds]
        whole = [times[case] + times["features"] for times in rounds]
        ratios = [statistics.median(t[case] / t[CASES[0]] for t in rounds)]
        ratios += [statistics.median((t[case] + t["features"]) / (t[CASES[0]] + t["features"]) for t in rounds)]
        cells = [f"{statistics.median(ahead):.3f} s", f"{ratios[0]:.3f}"]
        cells += [f"{statistics.median(whole):.3f} s", f"{ratios[1]:.3f}"]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mid-size.json", help="of the random model")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write every round's times there")
    options = parser.parse_args()
    asker = Asker(Qwen2AudioConfig.from_json_file(options.config))
    asker.round(options.seconds)
    rounds = [asker.round(options.seconds) for _ in range(options.rounds)]
    device = jax.devices()[0]
    print(f"{device.device_kind} ({os.cpu_count()} cores, {platform.machine()}), jax {jax.__version__}, ", end="")
    count = sum(leaf.size for leaf in jax.tree.leaves(asker.model.params))
    print(f"{count / 1e9:.2f} B parameters, clips of {options.seconds:g} s, medians of {len(rounds)} rounds")
    print(report(rounds))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rounds, file, indent=1)


if __name__ == "__main__":
    main()
