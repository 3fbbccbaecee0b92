"""Classification by label scores: how probable each label is after the prompt, whatever the model would say by itself.

The prompt with its clip is computed once, and each label after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.audio.load import load_clip
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.engine.prepare import Hearing, request_inputs
from qwen2audio_jax.engine.request import Request
from qwen2audio_jax.generation.scoring import score_continuations
from qwen2audio_jax.tasks.task import Task

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
    from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

SCORES = ("raw", "length", "calibrated")
"""Log-likelihood; the same a token; and less that of the label after silence of the clip's length."""


@dataclass(frozen=True)
class Classification:
    """The scores of labels.

    Attributes:
        labels: [n] in the order given.
        log_likelihoods: [n] float64, of each label's tokens after the prompt, in sum.
        tokens: [n] int, of each label.
        scores: [n] float64, what the probabilities are made of.
        probabilities: [n] float64, the softmax of the scores.
    """

    labels: tuple[str, ...]
    log_likelihoods: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray

    @property
    def best(self) -> str:
        """The most probable label; of equal ones the first."""
        return self.labels[int(np.argmax(self.probabilities))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = zip(self.labels, self.log_likelihoods, self.probabilities, strict=True)
        return {
            "label": self.best,
            "labels": {
                label: {"log_likelihood": round(float(found), 6), "probability": round(float(share), 6)}
                for label, found, share in rows
            },
        }


def classify(
    model: "Qwen2AudioForConditionalGeneration",
    processor: "Qwen2AudioProcessor",
    source: Any,
    *,
    task: Task,
    score: str = "raw",
    hearing: Mapping[str, Any] | None = None,
) -> Classification:
    """Score a task's labels after its prompt and a clip.

    Args:
        model: the model.
        processor: of the same checkpoint.
        source: of a clip, as for `load_audio`.
        task: with its labels.
        score: one of `SCORES`. A long label is less probable than a short one by its length alone ("length" mends
            that), and some labels are probable whatever is heard ("calibrated" does).
        hearing: other arguments of `load_audio`.

    Raises:
        AudioError: the clip cannot be heard.
        ValueError: there is no such score, or a label is empty.
        LogitsError: the model's logits are not numbers; a ValueError.
    """
    request = task.request(source)
    return score_labels(model, processor, request, task.labels, score=score, hearing=hearing)


def score_labels(
    model: "Qwen2AudioForConditionalGeneration",
    processor: "Qwen2AudioProcessor",
    request: Request,
    labels: Mapping[str, str],
    *,
    score: str = "raw",
    hearing: Mapping[str, Any] | None = None,
) -> Classification:
    """Score labels after the prompt of a request; arguments and errors as for `classify`.

    Args:
        model: the model.
        processor: of the same checkpoint.
        request: the prompt with its clips.
        labels: what is shown -> the text that is scored.
        score: one of `SCORES`.
        hearing: other arguments of `load_audio`.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is none of {', '.join(SCORES)}")
    clips = [load_clip(open_clip(clip), **(hearing or {})).samples for clip in request.clips]
    ids = [processor.tokenizer.encode(text) for text in labels.values()]
    found = _log_likelihoods(model, processor, replace(request, clips=tuple(clips)), ids)
    tokens = np.asarray(list(map(len, ids)))
    scores = found
    if score == "length":
        scores = found / tokens
    elif score == "calibrated":
        silent = tuple(map(np.zeros_like, clips))
        scores = found - _log_likelihoods(model, processor, replace(request, clips=silent), ids)
    shares = np.exp(scores - scores.max())
    return Classification(tuple(labels), found, tokens, scores, shares / shares.sum())


def _log_likelihoods(
    model: "Qwen2AudioForConditionalGeneration", processor: "Qwen2AudioProcessor", request: Request, ids: list[Any]
) -> np.ndarray:
    """[n] float64: of each label's tokens, in sum."""
    inputs = request_inputs(request, processor, Hearing())
    return np.asarray([np.sum(each, dtype=np.float64) for each in score_continuations(model.runtime, inputs, ids)])
