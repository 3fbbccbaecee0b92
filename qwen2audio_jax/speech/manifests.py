"""A data set of this package as manifests of evaluations, one for each task that it has questions for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2audio_jax.speech.evaluate import read_records
from qwen2audio_jax.speech.tasks import COUNTED, KINDS

_CLIPS = ("The first clip.", "The second clip.")
_COUNTS = ("One digit is spoken.", *(f"{number} digits are spoken." for number in COUNTED[2:]))


def records_of(folder: Path, *, task: str) -> list[dict[str, Any]]:
    """The records for one of `MADE`, as an evaluation's manifest has them; paths are relative to the folder.

    Raises:
        ValueError: the folder is none that `write_dataset` wrote, or has no question for the task.
    """
    if task not in MADE:
        raise ValueError(f"fresh data has nothing for the task {task!r}; it has {', '.join(MADE)}")
    made = [MADE[task](record) for record in read_records(folder)]
    found = [record for record in made if record is not None]
    if not found:
        raise ValueError(f"{folder}: none of its records is for the task {task!r}: synthesise more, with --fresh N")
    return found


def _transcribe(record: dict[str, Any]) -> dict[str, Any] | None:
    if record["task"] != "transcribe":
        return None
    return {"id": record["id"], "audio": record["audios"], "language": "en", "reference": record["response"]}


def _labelled(name: str, labels: dict[str, str]) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    said = {sentence: label for label, sentence in labels.items()}

    def make(record: dict[str, Any]) -> dict[str, Any] | None:
        if record["task"] != name:
            return None
        asked, answer = record["messages"]
        clips = [part["audio"] for part in asked["content"] if part["type"] == "audio"]
        return {"id": record["id"], "audio": clips, "label": said[answer["content"]]}

    return make


def _sum(record: dict[str, Any]) -> dict[str, Any] | None:
    if record["task"] != "sum":
        return None
    *asked, answer = record["messages"]
    return {"id": record["id"], "messages": asked, "reference": answer["content"]}


def _choices(record: dict[str, Any]) -> dict[str, Any] | None:
    choices = {"pair": _CLIPS, "count": _COUNTS}.get(record["task"])
    if choices is None:
        return None
    *asked, answer = record["messages"]
    chosen = {"choices": list(choices), "answer": answer["content"]}
    return {"id": record["id"], "messages": asked, **chosen, "groups": {"question": record["task"]}}


MADE: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "transcribe": _transcribe,
    "sound_kind": _labelled("kind", KINDS),
    "voice": _labelled("voice", {"high": "The voice is high.", "low": "The voice is low."}),
    "voice_chat": _sum,
    "ask": _choices,
}
"""Task -> what makes its record of one of the data set's, or None."""
