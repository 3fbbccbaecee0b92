"""Evaluation of a model on a data set of this package, with scored answers."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.parallel.process_rows import hear_all, share_of
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.speech.scoring import Answer, task_of

LONGEST_ANSWER = 32
"""Tokens; the longest right answer has about 20."""


def evaluate(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    *,
    data: str | PathLike[str],
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Ask the last question of every record, greedily; earlier turns of a conversation are given with their answers.

    Args:
        model: loaded.
        processor: of the same checkpoint.
        data: a folder that `write_dataset` wrote.
        batch: records at a time; those of similar length go together.
        progress: called with the numbers of records done and in total.

    Returns:
        the answers, in the order of the records.

    Raises:
        ValueError: the folder has no records, or one of them is not this package's.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    folder = Path(data)
    records = read_records(folder)
    # With several processes each takes its share of every batch: a call needs all of them.
    share = share_of(model.mesh) if jax.process_count() > 1 else None
    texts: dict[int, str] = {}
    done = 0
    # Raw prompts and conversations are processed differently, and a batch's cost is that of its longest clip.
    order = sorted(range(len(records)), key=lambda i: ("prompt" in records[i], _seconds(records[i]), i))
    raw = sum("prompt" in record for record in records)
    chats, prompts = order[: len(order) - raw], order[len(order) - raw :]
    for indices in (chats, prompts):
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            done += len(part)
            if share is not None:
                part = part[share.group :: share.groups] or part[:1]
            inputs = _inputs([records[i] for i in part], folder=folder, processor=processor)
            sequences = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            said = processor.batch_decode(sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            texts |= zip(part, said, strict=True)
            if progress is not None:
                progress(done, len(records))
    if share is not None:
        for other in hear_all(model.mesh, json.dumps(list(texts.items()))):
            texts |= json.loads(other)
    return [Answer(task_of(record), _expected(record), texts[i]) for i, record in enumerate(records)]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, each checked for scoring.

    Raises:
        ValueError: there are none, or one is not in the format of `write_dataset`; the message names file and line.
    """
    file = folder / "records.jsonl"
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; name a folder that `python -m qwen2audio_jax.speech data` wrote, or use --fresh"
        )
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            task_of(record), _expected(record), _seconds(record)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{file}:{number}: this is no record of qwen2audio_jax.speech ({e})") from None
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no records")
    return records


def _expected(record: dict[str, Any]) -> str:
    return record["response"] if "prompt" in record else record["messages"][-1]["content"]


def _seconds(record: dict[str, Any]) -> float:
    return max(clip["seconds"] for clip in record["meta"]["clips"])


def _inputs(records: list[dict[str, Any]], *, folder: Path, processor: Qwen2AudioProcessor) -> Any:
    if "prompt" in records[0]:
        clips = [[str(folder / name) for name in record["audios"]] for record in records]
        return processor(text=[record["prompt"] for record in records], audio=clips)
    conversations = [[_located(message, folder) for message in record["messages"][:-1]] for record in records]
    return processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True)


def _located(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The message with its clips' paths joined to the folder."""
    if isinstance(message["content"], str):
        return message
    content = [
        {**item, "audio": str(folder / item["audio"])} if "audio" in item else item for item in message["content"]
    ]
    return {**message, "content": content}
