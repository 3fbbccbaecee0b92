"""Layouts of public data sets, read where they lie: each clip a record of an evaluation's manifest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2audio_jax.evaluation.layouts import questions, sounds, speech
from qwen2audio_jax.evaluation.layouts.files import Records, begun


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
        task: of the evaluation, one of `tasks.task_names`.
        read: (folder, split, language) -> records; what cannot be right is an error before the first.
    """

    task: str
    read: Callable[[Path, str | None, str | None], Records]


LAYOUTS: Mapping[str, Layout] = {
    "librispeech": Layout("transcribe", speech.librispeech),
    "common-voice": Layout("transcribe", speech.common_voice),
    "fleurs": Layout("transcribe", speech.fleurs),
    "aishell-2": Layout("transcribe", speech.aishell2),
    "covost2": Layout("translate", speech.covost2),
    "meld": Layout("emotion", sounds.meld),
    "vocalsound": Layout("vocal_sound", sounds.vocalsound),
    "air-bench-chat": Layout("ask", questions.air_bench_chat),
    "air-bench-foundation": Layout("ask", questions.air_bench_foundation),
    "mmau": Layout("ask", questions.mmau),
}
"""Name -> layout."""


def read_layout(name: str, folder: str | Path, *, split: str | None = None, language: str | None = None) -> Records:
    """The records of a data set's split, in the order of its index; the absolute path of each clip is its `audio`.

    A clip that is missing is an error of its record alone, when it is asked about, unless it is the first.

    Args:
        name: a key of `LAYOUTS`.
        folder: as the data set comes out of its archive, or the folder above it.
        split: default: the one that results are given for, such as "test" or "test-clean"; of AIR-Bench a task.
        language: "en", or "en-de" of a translation; default: the data set's only one, else "en" or "en-de".

    Raises:
        ValueError: there is no such layout, folder, index, split or language; the message names what is there. Later:
            a line or item that cannot be read, or a path that leads out of the folder.
    """
    if name not in LAYOUTS:
        raise ValueError(f"there is no layout {name!r}; there are {', '.join(LAYOUTS)}")
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ValueError(f"{folder} is no folder: name the one of the data set")
    return begun(LAYOUTS[name].read(place, split, language), _check_first, what=f"{folder} as {name}")


def _check_first(record: dict[str, Any]) -> None:
    if not Path(record["audio"]).is_file():
        raise ValueError(f"{record['audio']} is missing, the first clip: unpack the sound where the index expects it")
