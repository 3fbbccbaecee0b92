"""The manifest of an evaluation: records of a batch job, each with what is expected, checked before anything runs."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen2audio_jax.batch.inputs import LineFile, line_files
from qwen2audio_jax.batch.parts import to_line
from qwen2audio_jax.batch.records import read_record
from qwen2audio_jax.config.strict_json import present
from qwen2audio_jax.evaluation.expected import EXPECTED, Expected, read_expected
from qwen2audio_jax.processing.json_lines import iter_lines, parse_line
from qwen2audio_jax.tasks.task import Task


@dataclass(frozen=True)
class Manifest:
    """The records of an evaluation, ready for a batch job.

    Attributes:
        files: lines of batch records; what is expected stands in their `meta`.
        expected: of every record, in order.
        language: that all records state; None if none does.
    """

    files: list[LineFile]
    expected: list[Expected]
    language: str | None


def read_manifest(inputs: Sequence[str], *, task: Task, scratch: Path) -> Manifest:
    """The manifest in JSONL files (also .gz, patterns, bucket URLs, "-" for stdin).

    Args:
        inputs: the files.
        task: whose answers are expected.
        scratch: an empty folder for the batch job's lines.

    Raises:
        ValueError: a file cannot be read, or a record states what is expected in no usable way; the message names file
            and line.
    """
    found = line_files(inputs, scratch=scratch)
    for file in found:
        if not file.manifest:
            raise ValueError(
                f"{file.name}: holds sounds and not what is expected; name a JSONL manifest (docs/evaluation.md)"
            )
    return _manifest([(file, _lines(file)) for file in found], task=task, scratch=scratch)


def manifest_of(records: Iterable[Mapping[str, Any]], *, name: str, root: str, task: Task, scratch: Path) -> Manifest:
    """The manifest of records at hand, as a layout's reader gives them.

    Args:
        records: each as a line of a manifest.
        name: of where they come from, for messages.
        root: folder that relative paths of clips start from.
        task: whose answers are expected.
        scratch: an empty folder for the batch job's lines.

    Raises:
        ValueError: as `read_manifest`.
    """
    lines = ((number, dict(record)) for number, record in enumerate(records, start=1))
    return _manifest([(LineFile(Path(), name, root, True), lines)], task=task, scratch=scratch)


def _lines(file: LineFile) -> Iterator[tuple[int, Any]]:
    with file.path.open("rb") as lines:
        for number, _, line in iter_lines(lines):
            try:
                yield number, parse_line(line)
            except ValueError as error:
                raise ValueError(f"{file.name}:{number}: {error}") from None


def _manifest(sources: Sequence[tuple[LineFile, Iterable[tuple[int, Any]]]], *, task: Task, scratch: Path) -> Manifest:
    files: list[LineFile] = []
    expected: list[Expected] = []
    languages: dict[str, str] = {}
    ids: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for file, lines in sources:
        path, last = folder / f"{len(files)}.jsonl", 0
        with path.open("wb") as written:
            for number, value in lines:
                where = f"{file.name}:{number}"
                one, line = _checked(value, where=where, root=file.root, task=task)
                _check_id(value.get("id"), where=where, ids=ids)
                if value.get("language") is not None:
                    languages.setdefault(value["language"], where)
                expected.append(one)
                written.write(b"\n" * (number - last - 1) + line)  # so that lines have the numbers of the user's file
                last = number
        files.append(replace(file, path=path))
    if not expected:
        raise ValueError(f"{', '.join(file.name for file in files)}: there is no record in it")
    if len({bool(one.choices) for one in expected}) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{names}: some records have choices and some have none, which are scored apart: divide it")
    return Manifest(files, expected, _one_language(languages))


def _checked(value: Any, *, where: str, root: str, task: Task) -> tuple[Expected, bytes]:
    """What a record expects, and the batch job's line; what the job would refuse is refused here."""
    value = present(value) if isinstance(value, dict) else value
    try:
        expected = read_expected(value, task=task)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    line = to_line(batch_line(value, expected))
    record = read_record(line, id="", where=where, root=root, prompt=None)
    if record.problem is not None:
        raise ValueError(record.problem.message)
    return expected, line


def _check_id(id: Any, *, where: str, ids: dict[str, str]) -> None:
    if id is not None and ids.setdefault(str(id), where) != where:
        raise ValueError(f"{where}: the id {id!r} is that of {ids[str(id)]} too; ids must differ")


def _one_language(languages: Mapping[str, str]) -> str | None:
    if len(languages) > 1:
        (one, here), (other, there), *_ = languages.items()
        raise ValueError(
            f"{there}: the language is {other!r}, and that of {here} is {one!r}: one evaluation is of one language; "
            "divide the manifest"
        )
    return next(iter(languages), None)


def batch_line(value: Mapping[str, Any], expected: Expected) -> dict[str, Any]:
    """The batch job's record: what is expected travels in its `meta`, beside the record's own."""
    line = {key: value[key] for key in value if key not in EXPECTED}
    own = {} if value.get("meta") is None else {"meta": value["meta"]}
    return {**line, "meta": {"expected": expected.to_dict(), **own}}
