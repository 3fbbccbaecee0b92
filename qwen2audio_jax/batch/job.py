"""The identity of a job: a fingerprint of manifest, model, prompt and options, kept in the output folder.

A run whose identity differs from the folder's is refused with what differs, so that one folder never mixes answers.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.batch.parts import Output
from qwen2audio_jax.storage.bucket import BucketPath, Folder

_FILE = re.compile(r"job-([0-9a-f]{16})\.json")
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10
"""Pieces of a file of weights that go into a model's digest."""


@dataclass(frozen=True)
class Job:
    """What determines the answers.

    Attributes:
        settings: plain data: manifest, prompt, model, options, number of shards.
    """

    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def seed(self, id: str) -> int:
        """The seed of a record's draws, in 0..2**32 - 1: from the job and the id, whatever else runs."""
        digest = hashlib.sha256(f"{self.fingerprint} {id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:4], "little")

    def check(self, output: Output) -> bool:
        """Whether the folder is this job's already.

        Raises:
            ValueError: it is another job's; the message says what differs.
        """
        found = {match[1] for match in map(_FILE.fullmatch, output.names()) if match}
        for other in sorted(found - {self.fingerprint}):
            raise ValueError(
                f"{output.place}: belongs to another job: {self._differences(output.read(f'job-{other}.json'))}; go on "
                "with its settings, or choose another folder"
            )
        return self.fingerprint in found

    def claim(self, output: Output) -> None:
        """Make the folder this job's, if it is no other's.

        Raises:
            ValueError: as `check`.
        """
        if self.check(output):
            return
        name = f"job-{self.fingerprint}.json"
        output.write(name, (json.dumps(self.settings, indent=2, sort_keys=True) + "\n").encode())
        try:
            self.check(output)  # another job may have begun in the same moment
        except ValueError:
            output.remove(name)
            raise

    def _differences(self, content: bytes) -> str:
        try:
            theirs = dict(_flat(json.loads(content)))
        except ValueError:
            return "its job file is damaged"
        ours = dict(_flat(self.settings))
        names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        return ", ".join(f"{name} is {_shown(ours.get(name))} and was {_shown(theirs.get(name))}" for name in names[:8])


def model_digest(folder: Folder) -> str:
    """A digest of a checkpoint or an adapter: settings and manifests whole, weights by their sizes and samples.

    In a bucket weights count by what the store tells of them. Another training run of the same model differs.
    """
    digest = hashlib.sha256()
    for name, size, path in _files(folder):
        digest.update(f"{name} {size}\n".encode())
        if size <= 1 << 20 or name == "manifest.json":
            digest.update(path.read_bytes())
        elif isinstance(path, BucketPath):
            digest.update(json.dumps(path.stamp).encode())
        else:
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _files(folder: Folder) -> Iterator[tuple[str, int, Folder]]:
    """The files of a model at the top of its folder, sorted; an Orbax manifest stands for the parameters below."""
    paths: list[Folder] = list(folder.iterdir())
    for path in sorted(paths, key=lambda path: path.name):
        if path.is_file() and (path.suffix in (".safetensors", ".jinja") or path.suffix == ".json"):
            yield path.name, path.stat().st_size, path


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
