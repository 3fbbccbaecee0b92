"""The scores of an evaluation: rows of its batch job in, a value with its interval and signature out for each metric.

A record without an answer counts as one that was answered with nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_jax.evaluation import multiple_choice
from qwen2audio_jax.evaluation.classification import (
    OTHER,
    Share,
    classification,
    exact_label,
    share,
    spoken_label,
)
from qwen2audio_jax.evaluation.error_rate import error_rate
from qwen2audio_jax.evaluation.expected import Expected
from qwen2audio_jax.evaluation.extra import import_extra, versions
from qwen2audio_jax.evaluation.normalise import CHARACTERS, PROFILES, normaliser
from qwen2audio_jax.evaluation.translation import TextScore, bleu, chrf
from qwen2audio_jax.tasks.task import CLASSES, Task

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        metric: its name: "wer", "cer", "bleu", "chrf++", "accuracy", "macro_f1", ...
        profile: of normalisation, or the way of reading answers; "" where there is one way alone.
        value: percent, or points of BLEU and chrF++; None where nothing was to be scored.
        low: lower end of its 95 % interval; None where there is none.
        high: its upper end.
        signature: how it was made.
        details: plain data: counts, classes, the confusion matrix.
    """

    metric: str
    profile: str
    value: float | None
    low: float | None
    high: float | None
    signature: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Metric and profile: "wer.qwen"."""
        return f"{self.metric}.{self.profile}" if self.profile else self.metric

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, **vars(self), "details": dict(self.details)}


def require_packages(task: Task) -> None:
    """Check for the packages of a task's scores, before hours of answering.

    Raises:
        ValueError: one is not installed.
    """
    names = ["scipy"]
    if task.name in CLASSES:
        names += ["sklearn", "matplotlib"]
    elif task.name == "transcribe":
        names.append("kaldialign")
        for profile in PROFILES:
            normaliser(profile, task.language or "en")
    else:
        names += ["sacrebleu", "whisper_normalizer"]
        names += ["MeCab", "ipadic"] if (task.language or "").endswith("-ja") else []
    for name in names:
        import_extra(name)


def score(rows: Sequence[Row], *, task: Task, style: str = "plain", made: str = "") -> list[Score]:
    """The scores of rows, the one that is published first.

    Args:
        rows: of the job, with what is expected in their `meta`; at least one.
        task: what was asked.
        style: of multiple choice, as it was asked.
        made: end of every signature: model, prompt and so on.

    Raises:
        ValueError: a package of the extra is missing.
    """
    expected = [Expected.of(row["meta"]) for row in rows]
    said = [row.get("text", "") for row in rows]
    if task.name in CLASSES:
        found = _classes(rows, expected, said, task=task)
    elif any(one.choices for one in expected):
        found = _choices(rows, expected, said, style=style)
    elif task.name == "transcribe":
        found = _transcripts(expected, said, language=task.language or "en")
    else:
        found = _texts(expected, said, task=task)
    return [_signed(each, made) for each in found]


def by_group(rows: Sequence[Row], *, task: Task, style: str = "plain") -> dict[str, dict[str, dict[str, float | None]]]:
    """Name of groups -> group -> name of score -> value, with the number of records as "records"."""
    members: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for name, group in (Expected.of(row["meta"]).groups or {}).items():
            members.setdefault(name, {}).setdefault(group, []).append(row)
    return {
        name: {
            group: {"records": len(part), **{each.name: each.value for each in score(part, task=task, style=style)}}
            for group, part in sorted(groups.items())
        }
        for name, groups in sorted(members.items())
    }


def _signed(found: Score, made: str) -> Score:
    return Score(**{**vars(found), "signature": "|".join(filter(None, (found.name, found.signature, made)))})


def _transcripts(expected: Sequence[Expected], said: Sequence[str], *, language: str) -> list[Score]:
    scores = []
    pairs = [(one.references, text) for one, text in zip(expected, said, strict=True)]
    for profile in PROFILES:
        rules = normaliser(profile, language)
        if profile == "open-asr":  # the leaderboard leaves out clips in which nothing is said
            pairs = [(texts, text) for texts, text in pairs if any(map(rules.words, texts))]
        ways: dict[str, Callable[[str], list[str]]] = {"wer": rules.words, "cer": rules.characters}
        if language in CHARACTERS:
            del ways["wer"]
        for metric, tokens in ways.items():
            found = error_rate(
                [list(map(tokens, texts)) for texts, _ in pairs],
                [tokens(text) for _, text in pairs],
                compounds=rules.compounds and metric == "wer",
            )
            signature = f"profile:{profile}|language:{language}|normaliser:{rules.signature}|{versions('kaldialign')}"
            scores.append(_percent(metric, profile, found.rate, found.low, found.high, signature, found.to_dict()))
    return scores


def _texts(expected: Sequence[Expected], said: Sequence[str], *, task: Task) -> list[Score]:
    language = (task.language or "en").rpartition("-")[2]
    references = [one.references for one in expected]
    scores = [_points("bleu", bleu(references, said, language=language)), _points("chrf++", chrf(references, said))]
    if task.name == "translate":
        return scores
    rules = normaliser("qwen", "en")
    right = [
        rules.text(text).strip() in [rules.text(each).strip() for each in texts]
        for text, texts in zip(said, references, strict=True)
    ]
    return [_shared("accuracy", "text", share(right), f"normaliser:{rules.signature}"), *scores]


def _classes(rows: Sequence[Row], expected: Sequence[Expected], said: Sequence[str], *, task: Task) -> list[Score]:
    labels = tuple(task.labels)
    right = [one.label or "" for one in expected]
    ways = {
        "exact": [exact_label(text, task.labels) for text in said],
        "lenient": [spoken_label(text, task.labels) for text in said],
    }
    if scored := _scored(rows):
        ways["label-scored"] = scored
    scores = []
    for profile, answers in ways.items():
        found = classification(right, answers, labels=labels)
        signature = f"answers:{profile}|labels:{len(labels)}|{versions('scikit-learn')}"
        scores.append(_shared("accuracy", profile, found.accuracy, signature, found.to_dict()))
        scores.append(_percent("macro_f1", profile, found.macro_f1, None, None, signature))
    return scores


def _choices(rows: Sequence[Row], expected: Sequence[Expected], said: Sequence[str], *, style: str) -> list[Score]:
    pairs = list(zip(expected, said, strict=True))
    words = [multiple_choice.words_match(one.answer or "", text, one.choices) for one, text in pairs]
    exact = [text.strip() == one.answer for one, text in pairs]
    scores = [
        _shared("accuracy", "words", share(words), "answers:words, as MMAU's script"),
        _shared("accuracy", "exact", share(exact), "answers:exact"),
    ]
    if style == "letters":
        lettered = [multiple_choice.letter_of(text, one.choices) for one, text in pairs]
        right = [one.answer == each for one, each in zip(expected, lettered, strict=True)]
        answered = {"answered": sum(each is not None for each in lettered)}
        scores[0:0] = [_shared("accuracy", "letters", share(right), "answers:letters, as AIR-Bench's script", answered)]
    if scored := _scored(rows):
        right = [one.answer == each for one, each in zip(expected, scored, strict=True)]
        scores.append(_shared("accuracy", "label-scored", share(right), "answers:label-scored"))
    return scores


def _scored(rows: Sequence[Row]) -> list[str]:
    """The label of each row that the model finds most probable; none where labels were not scored."""
    if not any("scored" in row for row in rows):
        return []
    return [row["scored"]["label"] if "scored" in row else OTHER for row in rows]


def _shared(metric: str, profile: str, found: Share, signature: str, details: Mapping[str, Any] | None = None) -> Score:
    return _percent(
        metric, profile, found.value, found.low, found.high, signature, {**found.to_dict(), **(details or {})}
    )


def _percent(
    metric: str,
    profile: str,
    value: float | None,
    low: float | None,
    high: float | None,
    signature: str,
    details: Mapping[str, Any] | None = None,
) -> Score:
    value, low, high = (None if each is None else 100 * each for each in (value, low, high))
    return Score(metric, profile, value, low, high, signature, details or {})


def _points(metric: str, found: TextScore) -> Score:
    return Score(metric, "", found.score, found.low, found.high, found.signature)
