"""Questions about sounds: AIR-Bench and MMAU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2audio_jax.config.strict_json import describe
from qwen2audio_jax.evaluation.layouts.files import Records, chosen, existing, inside, json_list, text_of

_DOMAINS = {
    "Audio_Grounding": "sound",
    "Acoustic_Scene_Classification": "sound",
    "vocal_sound_classification": "sound",
    "Spoken_Language_Identification": "speech",
    "Synthesized_Voice_Detection": "speech",
}
"""Tasks of AIR-Bench whose names do not begin with their domain."""
_LETTERS = ("choice_a", "choice_b", "choice_c", "choice_d")


def air_bench_chat(folder: Path, split: str | None, language: str | None) -> Records:
    """AIR-Bench, chat: Chat_meta.json, and the clips in TASK_DATASET; a split is a task. Source: Inference_Chat.py."""
    items, place = _air_bench("Chat", folder, split, language)
    return (
        {**_air_bench_record(item, place, where=where), "reference": text_of(item, "answer_gt", where=where)}
        for where, item in items
    )


def air_bench_foundation(folder: Path, split: str | None, language: str | None) -> Records:
    """AIR-Bench, foundation: Foundation_meta.json, likewise. Source: Inference_Foundation.py."""
    items, place = _air_bench("Foundation", folder, split, language)
    return (
        {
            **_air_bench_record(item, place, where=where),
            **_choices(
                [item[key] for key in _LETTERS if item.get(key) is not None], item.get("answer_gt"), where=where
            ),
        }
        for where, item in items
    )


def _air_bench(
    part: str, folder: Path, split: str | None, language: str | None
) -> tuple[list[tuple[str, Mapping[str, Any]]], Path]:
    """The items of a part of AIR-Bench, and the folder of the clips' folders."""
    if language is not None:
        raise ValueError(f"AIR-Bench has no language: leave {language!r} out")
    index = existing(
        folder / f"{part}_meta.json", folder / part / f"{part}_meta.json", what=f"the list of AIR-Bench's part {part}"
    )
    items = json_list(index)
    if split is not None:
        tasks = sorted({str(item.get("task_name")) for _, item in items})
        chosen("task", split, tasks, folder=index.parent)
        items = [(where, item) for where, item in items if item.get("task_name") == split]
    return items, index.parent


def _air_bench_record(item: Mapping[str, Any], place: Path, *, where: str) -> dict[str, Any]:
    task, path = text_of(item, "task_name", where=where), text_of(item, "path", where=where)
    if task == "Audio_Grounding":  # its list names wav files, and the clips are flac
        path = str(Path(path).with_suffix(".flac"))
    dataset = text_of(item, "dataset_name", where=where)
    return {
        "id": f"{task}_{dataset}-{item.get('uniq_id', path)}",
        "audio": inside(place, f"{task}_{dataset}/{path}", where=where),
        "question": text_of(item, "question", where=where),
        "groups": {"domain": _domain(task), "task": task},
        "meta": dict(item),
    }


def _domain(task: str) -> str:
    if "_and_" in task:
        return "mixed"
    first = task.partition("_")[0].lower()
    return _DOMAINS.get(task) or {"speaker": "speech"}.get(first, first)


def mmau(folder: Path, split: str | None, language: str | None) -> Records:
    """MMAU: mmau-test-mini.json, and the clips where its `audio_id` says. Source: Sakshi113/MMAU.

    The answers of the large test split are kept by its authors, so that it cannot be scored here.
    """
    if language is not None:
        raise ValueError(f"MMAU has no language: leave {language!r} out")
    split = chosen("split with answers", split or "test-mini", ["test-mini"], folder=folder)
    index = existing(folder / f"mmau-{split}.json", what="the list of MMAU")
    return (
        {
            "id": text_of(item, "id", where=where),
            "audio": inside(folder, item.get("audio_id"), where=where),
            "question": text_of(item, "question", where=where),
            **_choices(item.get("choices"), item.get("answer"), where=where),
            "groups": {key: str(item[key]) for key in ("task", "difficulty") if item.get(key)},
            "meta": dict(item),
        }
        for where, item in json_list(index)
    )


def _choices(choices: Any, answer: Any, *, where: str) -> dict[str, Any]:
    """Different choices, of which some lists have one twice, and the right one.

    Raises:
        ValueError: fewer than two, or the right one is not among them.
    """
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: the choices are {describe(choices)}; they must be texts")
    found = list(dict.fromkeys(choice.strip() for choice in choices))
    right = answer.strip() if isinstance(answer, str) else answer
    if len(found) < 2 or right not in found:
        raise ValueError(f"{where}: the answer is {describe(answer)}, and the choices are {', '.join(found)[:200]}")
    return {"choices": found, "answer": right}
