"""The report of an evaluation, as plain data and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_jax.evaluation.published import Published
from qwen2audio_jax.evaluation.scores import Score


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Attributes:
        task: name of the task, with its language.
        data: where the records come from.
        model: the checkpoint's name.
        prompt: what was asked.
        verified: whether the prompt is one that the model is known to have learned.
        records: how many there are.
        errors: kind -> number of records without an answer, which count as answered with nothing.
        audio_seconds: of all that was heard.
        rtfx: seconds of sound for a second of one host's time, loading and compiling included; None if unknown.
        scores: the one that is published first.
        groups: name -> group -> name of score -> value.
        published: figures to compare with.
        made: what all signatures end with.
    """

    task: str
    data: str
    model: str
    prompt: str
    verified: bool
    records: int
    errors: Mapping[str, int]
    audio_seconds: float
    rtfx: float | None
    scores: Sequence[Score]
    groups: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    made: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        scores = [score.to_dict() for score in self.scores]
        compared = [
            {**vars(figure), "ours": self.beside(figure), "same_model": self.model == figure.model}
            for figure in self.published
        ]
        return {**vars(self), "errors": dict(self.errors), "scores": scores, "published": compared}

    def beside(self, figure: Published) -> float | None:
        """Our value beside a published one; None where it was not computed."""
        if figure.groups:
            name, _, group = figure.groups.partition("=")
            return self.groups.get(name, {}).get(group, {}).get(figure.score)
        return next((score.value for score in self.scores if score.name == figure.score), None)

    def to_markdown(self) -> str:
        """The report for people."""
        parts = [self._head(), _table_of_scores(self.scores)]
        if self.published:
            parts.append(self._comparison())
        classes = next((score.details["classes"] for score in self.scores if "classes" in score.details), None)
        if classes:
            parts += [_table_of_classes(classes), "![confusion matrix](confusion.png)\n"]
        parts += [_table_of_group(name, groups) for name, groups in self.groups.items()]
        signatures = "".join(f"- `{score.signature}`\n" for score in self.scores)
        return "\n".join([*parts, f"## Signatures\n\n{signatures}"])

    def _head(self) -> str:
        speed = (
            "" if self.rtfx is None else f"; {self.rtfx:.1f} s of sound a second (RTFx), loading and compiling included"
        )
        errors = ", ".join(f"{number} {kind}" for kind, number in sorted(self.errors.items()))
        lines = [
            f"# {self.task}: {self.model} on {self.data}\n",
            f"{self.records} records, {self.audio_seconds / 3600:.3f} h of sound{speed}.",
            f"Without an answer, and counted as answered with nothing: {errors}." if errors else "All were answered.",
            f"Prompt{'' if self.verified else ' (made by analogy)'}: `{self.prompt}`" if self.prompt else "No prompt.",
        ]
        return "\n".join(lines) + "\n"

    def _comparison(self) -> str:
        rows = []
        for figure in self.published:
            ours = self.beside(figure)
            name = f"{figure.score}{f', {figure.groups}' if figure.groups else ''}"
            rows.append(
                (figure.name, name, _number(ours), f"{figure.value:g}", figure.model, f"{figure.source}, {figure.date}")
            )
        head = ("data", "score", "ours", "published", "of the model", "source")
        note = ""
        if any(figure.model != self.model for figure in self.published):
            note = f"\nOurs is of `{self.model}`: it can be compared where the models are the same.\n"
        return f"## Beside the published figures\n\n{_table(head, rows)}{note}"


def overview(reports: Sequence[Mapping[str, Any]]) -> str:
    """Several reports, as plain data, in one table: the first score of each, which is the one that is published."""
    rows = []
    for report in reports:
        first = report["scores"][0]
        between = "" if first["low"] is None else f"{first['low']:.2f} to {first['high']:.2f}"
        rows.append((report["task"], str(report["records"]), first["name"], _number(first["value"]), between))
    head = f"# {reports[0]['model']} on {reports[0]['data']}\n"
    signature = f"Signature of the first: `{reports[0]['scores'][0]['signature']}`\n"
    return "\n".join([head, _table(("task", "records", "score", "%", "95 % interval"), rows), signature])


def _table_of_scores(scores: Sequence[Score]) -> str:
    rows = [
        (
            score.name,
            _number(score.value),
            "" if score.low is None else f"{score.low:.2f} to {score.high:.2f}",
            _counts(score),
        )
        for score in scores
    ]
    return "## Scores\n\n" + _table(("score", "% or points", "95 % interval", "counts"), rows)


def _counts(score: Score) -> str:
    details = score.details
    if "substitutions" in details:
        counts = f"{details['insertions']} ins, {details['deletions']} del, {details['substitutions']} sub"
        return f"{counts} of {details['tokens']}; {details['right']} of {details['utterances']} right"
    right = details.get("accuracy", details)
    return f"{right['right']} of {right['of']}" if "of" in right else ""


def _table_of_classes(classes: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (label, *(f"{100 * found[name]:.2f}" for name in ("precision", "recall", "f1")), str(found["support"]))
        for label, found in classes.items()
    ]
    return "## Classes\n\n" + _table(("label", "precision", "recall", "F1", "records"), rows)


def _table_of_group(name: str, groups: Mapping[str, Mapping[str, float | None]]) -> str:
    scores = [each for each in next(iter(groups.values())) if each != "records"]
    rows = [
        (group, str(found["records"]), *(_number(found.get(each)) for each in scores))
        for group, found in groups.items()
    ]
    return f"## By {name}\n\n" + _table((name, "records", *scores), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
