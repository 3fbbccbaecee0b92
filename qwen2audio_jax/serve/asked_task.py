"""Tasks in chat requests: `task` names what is asked, in the words that the model was trained on, about the sound."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_jax.engine.request import Request
from qwen2audio_jax.serve.errors import bad
from qwen2audio_jax.tasks.task import Task, find_task

ELSEWHERE = {
    "transcribe": "post the sound to /v1/audio/transcriptions",
    "translate": "post the sound to /v1/audio/translations",
    "ask": "leave task out and write the question as text",
}
"""Tasks that have an address or a form of their own."""


def asked_task(
    name: str | None, labels: Sequence[Any] | None, messages: Sequence[Mapping[str, Any]], *, kind: str
) -> Task | None:
    """The task that a request names; None if it names none.

    Args:
        name: the field `task`.
        labels: the field of that name: what a classification chooses from.
        messages: checked ones.
        kind: of the model.

    Raises:
        ApiError: the kind of model has no such task, or there is more than one message with sound and nothing else.
    """
    if name is None:
        if labels is not None:
            raise bad("labels are those of a task: name it, as in task='emotion'", param="labels")
        return None
    if name in ELSEWHERE:
        raise bad(f"task={name!r}: {ELSEWHERE[name]}", param="task")
    # They may stand in a raw prompt, where control tokens are what they are.
    if labels is not None and not all(isinstance(label, str) and label and "<|" not in label for label in labels):
        raise bad("labels: give texts, without control tokens", param="labels")
    try:
        task = find_task(name[:100], kind=kind, labels=labels)
    except ValueError as error:
        raise bad(str(error), param="task") from None
    if len(messages) != 1 or messages[0]["role"] != "user" or not _clips(messages[0]):
        raise bad(f"task={name!r} has words of its own: send one message of the user with sound alone", param="task")
    return task


def request_of(
    messages: Sequence[Mapping[str, Any]], task: Task | None, *, options: Mapping[str, Any], seed: int | None
) -> Request:
    """The engine's request for a conversation, or for a task about the sound of its one message."""
    if task is None:
        return Request(messages=messages, options=options, seed=seed)
    return task.request(*_clips(messages[0]), options=options, seed=seed)


def _clips(message: Mapping[str, Any]) -> tuple[str, ...]:
    """The sound of a message as URLs; none if it has anything else."""
    content = message["content"]
    if isinstance(content, str) or any(item["type"] == "text" for item in content):
        return ()
    return tuple(
        item["audio_url"]["url"]
        if item["type"] == "audio_url"
        else f"data:audio/wav;base64,{item['input_audio']['data']}"
        for item in content
    )
