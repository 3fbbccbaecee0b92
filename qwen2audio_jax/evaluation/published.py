"""Published figures, as data: `configs/published.toml`."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from qwen2audio_jax.command_line import nearest


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure.

    Attributes:
        name: data set and part: "librispeech/test-clean".
        layout: the data set's reader.
        split: part of it that this is the figure of; "" where there is one alone.
        model: hub id of the checkpoint.
        task: of `configs/tasks.toml`.
        language: of the task, or "".
        score: name of ours that it stands beside: "wer.qwen".
        value: percent, or points.
        source: where it stands.
        date: when that was published.
        groups: value of one of our groups alone: "domain=speech"; "" where it is of all records.
    """

    name: str
    layout: str
    split: str = ""
    model: str
    task: str
    language: str = ""
    score: str
    value: float
    source: str
    date: str
    groups: str = ""


@cache
def published_figures() -> tuple[Published, ...]:
    """All of them, in the file's order."""
    file = resources.files("qwen2audio_jax.configs") / "published.toml"
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    sources = data["sources"]
    return tuple(
        Published(**{**figure, "source": sources[figure["source"]]["title"], "date": sources[figure["source"]]["date"]})
        for figure in data["figures"]
    )


def find_published(name: str) -> list[Published]:
    """The figures of a data set.

    Raises:
        ValueError: there are none of that name.
    """
    found = [figure for figure in published_figures() if figure.name == name]
    if not found:
        names = list(dict.fromkeys(figure.name for figure in published_figures()))
        raise ValueError(
            f"there is no published figure of {name!r}{nearest(name, names)}; there are {', '.join(names)}"
        )
    return found


def published_of(layout: str, *, split: str | None, language: str | None) -> str | None:
    """The name of the figures of a part of a data set; None if there are none, or several are meant."""
    names = {
        figure.name
        for figure in published_figures()
        if figure.layout == layout
        and (split is None or split == figure.split)
        and (language is None or language == figure.language)
    }
    return names.pop() if len(names) == 1 else None
