"""Hugging Face checkpoint folders: tensors by safetensors file, and the settings files beside them.

File names in an index are untrusted: only regular files of the folder itself are opened. Links are followed within the
folder, into the `blobs` of a hub cache, and to a file of the same name elsewhere, as people link a checkpoint's files
together: such a link cannot pass off anything else, a secret of another name, as a file of the checkpoint.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2audio_jax.checkpoint.ranges import REQUEST_BYTES
from qwen2audio_jax.checkpoint.safetensors_file import Entry, SafetensorsFile
from qwen2audio_jax.config.strict_json import read_json_object
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.bucket import BucketPath, Folder, is_there

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SETTINGS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "training.json",  # of our own training: an export makes its card from it
)
"""Files copied beside the parameters as they are."""

_USUAL = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, under its name in the file."""

    name: str
    file: SafetensorsFile

    @property
    def entry(self) -> Entry:
        """Its dtype, shape and position in the file."""
        return self.file.entries[self.name]

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """Its rows in blocks: see `SafetensorsFile.blocks`."""
        return self.file.blocks(self.name)


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of a checkpoint, and the mismatches between its index and its files as messages."""

    tensors: list[StoredTensor]
    problems: list[str] = field(default_factory=list)


def contents_of(folder: Folder) -> str:
    """The files of a folder in words, for messages about one that is no model's."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return "the folder is empty"
    return f"the folder holds {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def looks_like_hf_folder(folder: Folder) -> bool:
    """Return True if the folder holds safetensors weights under their usual names."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def weight_files(folder: Folder) -> list[Folder]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: there are none, or both kinds, or the index is malformed or names a file outside the folder.
    """
    single, index = (folder / WEIGHTS).exists(), (folder / INDEX).exists()
    if single and index and not _names_the_single_file(folder):
        raise ValueError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if single:
        return [inside(folder, WEIGHTS)]
    if index:
        return [inside(folder, name) for name in sorted(set(_read_index(folder).values()))]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ValueError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run any code when opened and is never read; "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; give a folder saved with save_pretrained")


@contextmanager
def open_weights(folder: Folder, *, request_bytes: int = REQUEST_BYTES) -> Iterator[StoredWeights]:
    """Open all files of a checkpoint and read their headers; from a bucket, at most `request_bytes` at once.

    Raises:
        ValueError: see `weight_files` and `SafetensorsFile`.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(SafetensorsFile(path, request_bytes=request_bytes)) for path in weight_files(folder)
        ]
        tensors = [StoredTensor(name, file) for file in files for name in file.entries]
        problems = [
            f"duplicate {name}: in {count} files"
            for name, count in Counter(t.name for t in tensors).items()
            if count > 1
        ]
        if (folder / INDEX).exists():
            problems += _index_problems(_read_index(folder), tensors)
        yield StoredWeights(tensors, problems)


def check_unchanged(folder: Folder, files: Iterable[SafetensorsFile]) -> None:
    """Raise a `ValueError` if objects of a bucket have changed since they were opened.

    Each request may have been answered from a different version; an open local file stays the same one.
    """
    if isinstance(folder, BucketPath):
        now = folder.again()
        for file in files:
            if not (now / file.path.name).is_file() or (now / file.path.name).stamp != file.stamp:
                raise ValueError(f"{file.path}: was changed while it was read; begin again")


def _index_problems(index: dict[str, str], tensors: list[StoredTensor]) -> list[str]:
    held = {(tensor.name, tensor.file.path.name) for tensor in tensors}
    missing = [f"missing {name}: {INDEX} puts it in {file}" for name, file in index.items() if (name, file) not in held]
    extra = [
        f"unexpected {tensor.name}: in {tensor.file.path.name}, but not in {INDEX}"
        for tensor in tensors
        if tensor.name not in index
    ]
    return missing + extra


def _names_the_single_file(folder: Folder) -> bool:
    """Return True for an index that has every tensor in model.safetensors."""
    weight_map = read_json_object(inside(folder, INDEX)).get("weight_map")
    return isinstance(weight_map, dict) and bool(weight_map) and all(file == WEIGHTS for file in weight_map.values())


def _read_index(folder: Folder) -> dict[str, str]:
    path = inside(folder, INDEX)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map from tensor to file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: tensor {name!r} is in {file!r}; it must be the name of a .safetensors file")
    return weight_map


def inside(folder: Folder, name: str) -> Folder:
    """The path of a file of the folder.

    Raises:
        ValueError: `name` is more than a plain file name, or the file is missing, not regular, or a link that is not
            followed (see the module).
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{folder}: names the file {name!r}; only plain names of files in the folder itself are read")
    path = folder / name
    if isinstance(path, BucketPath):  # where nothing is a link
        if not path.is_file():
            problem = "is not an object" if path.exists() else "no such object"
            raise ValueError(f"{path}: {problem}; copy the whole folder")
        return path
    real = Path(os.path.realpath(path))
    if not (real.is_relative_to(os.path.realpath(path.parent)) or _is_blob(real) or _is_namesake(real, name)):
        raise ValueError(
            f"{path}: is a link to outside its folder ({real}), to a file of another name; copy the file itself there"
        )
    try:
        mode = real.stat().st_mode
    except OSError as error:  # For example, a name too long for the file system.
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        if name == "config.json":
            what = f"{what} ({contents_of(folder)})"
        raise ValueError(f"{path}: {what}; copy the whole folder") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is not a regular file; copy the whole folder")
    return path


def _is_blob(real: Path) -> bool:
    """Return True for a file in a hub cache's models--<owner>--<name>/blobs, to which snapshots link."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")


def _is_namesake(real: Path, name: str) -> bool:
    """Return True for a file of the link's own name, which for weights must be one that no index can choose."""
    return real.name == name and (not name.endswith(".safetensors") or _USUAL.fullmatch(name) is not None)


def read_settings(folder: Folder) -> dict[str, bytes]:
    """The settings files of the folder, by name.

    Raises:
        ValueError: one is too large, or not a file of the folder.
    """
    found = {}
    for name in SETTINGS:
        if is_there(folder / name):
            path = inside(folder, name)
            if path.stat().st_size > LIMITS.json_bytes:
                raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {LIMITS.json_bytes} are read")
            found[name] = path.read_bytes()
    return found
