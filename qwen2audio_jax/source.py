"""Model sources: an Orbax checkpoint, a Hugging Face folder, a hub id or the embedded model.

All but the first are converted once, by the normal converter, into the cache folder (see `conversion_cache`) and loaded
from there afterwards; weights that were converted before are not converted again. An Orbax checkpoint in a bucket that
Orbax cannot read is likewise copied.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from qwen2audio_jax.checkpoint.adapter import CONFIG
from qwen2audio_jax.checkpoint.conversion_cache import (
    default_cache_dir,
    earlier_states,
    holds_weights,
    is_usable,
    made_once,
    named,
)
from qwen2audio_jax.checkpoint.reader import MANIFEST, MARKER, PARAMS, is_checkpoint, read_in_place, read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED, model_folder
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.bucket import Folder, PathOrUrl, is_url
from qwen2audio_jax.storage.resolve_folder import resolve_folder

Source = PathOrUrl


def resolve_processor_files(source: Source, *, revision: str | None = None) -> Folder:
    """The folder with a source's tokenizer, template and preprocessor settings.

    A folder, local or in a bucket, is returned itself; `EMBEDDED` gives the package's folder; for a hub id everything
    but the weights is downloaded.

    Raises:
        ValueError: none of these, or a hub id that cannot be downloaded; `revision` with a folder or `EMBEDDED`.
    """
    if _is_embedded(source, revision=revision):
        return model_folder()
    if (folder := resolve_folder(source, revision=revision)) is not None:
        return folder
    from qwen2audio_jax.checkpoint.hf_folder import SETTINGS

    return hub.download(_hub_id(source), revision=revision, patterns=["config.json", *SETTINGS])


def resolve_checkpoint(
    source: Source, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Folder:
    """The Orbax checkpoint of a source, converted or copied on first use.

    Args:
        source: an Orbax checkpoint, a folder with safetensors weights, the URL of either in a bucket, a hub id such as
            "Qwen/Qwen2-Audio-7B", or `EMBEDDED`. An Orbax checkpoint in a bucket is returned itself if it is read
            from such buckets (gs://), else copied; a Hugging Face one is converted while it is read.
        revision: branch, tag or commit of a hub id.
        cache_dir: where conversions are kept; default: `default_cache_dir()`.

    Raises:
        ValueError: none of these, or the source cannot be converted (see `convert.convert`).
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if _is_embedded(source, revision=revision):
        return _from_package(cache)
    folder = resolve_folder(source, revision=revision)
    if folder is None:
        return _from_hub(_hub_id(source), revision=revision, cache=cache)
    from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint
    from qwen2audio_jax.checkpoint.hf_folder import looks_like_hf_folder, weight_files

    if is_checkpoint(folder):
        return folder if read_in_place(folder) else local_checkpoint(folder, cache_dir=cache)
    sent = is_url(folder) and (folder / PARAMS).exists() and not looks_like_hf_folder(folder)
    if sent or (folder / MANIFEST).exists() or (folder / MARKER).exists():
        read_manifest(folder)  # raises an error that names the problem

    check_holds_model(folder)
    contents = _contents([folder / "config.json", *weight_files(folder), *_beside(folder)])
    real = folder.resolve() if isinstance(folder, Path) else folder
    return _converted(folder, cache, label=real.name, where=str(real), what=contents)


def check_holds_model(folder: Folder) -> None:
    """Check that a folder is that of a model, by its files' names.

    Raises:
        ValueError: it is not; the message says what it holds.
    """
    if any((folder / name).is_file() for name in ("config.json", MANIFEST)) or (folder / MARKER).exists():
        return
    if (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder}: holds an adapter ({CONFIG}) and no model; name the model that it was trained on, and this "
            "folder as adapter= (--adapter)"
        )
    from qwen2audio_jax.checkpoint.hf_folder import contents_of

    raise ValueError(
        f"{folder}: holds neither an Orbax checkpoint ({MANIFEST}) nor a Hugging Face one (config.json with "
        f"model.safetensors or model.safetensors.index.json); {contents_of(folder)}; name the folder of a model, or a "
        "hub id"
    )


def load_config(
    source: Source, *, dtype: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[Folder, Qwen2AudioConfig]:
    """The Orbax checkpoint of a source, and its configuration with the requested dtype.

    Args:
        source: as for `resolve_checkpoint`.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        revision: as for `resolve_checkpoint`.
        cache_dir: as for `resolve_checkpoint`.

    Raises:
        ValueError: as `resolve_checkpoint`, and for another dtype, before anything is read or converted.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not one of 'auto', 'float32', 'bfloat16', 'float16'")
    path = resolve_checkpoint(source, revision=revision, cache_dir=cache_dir)
    config = Qwen2AudioConfig.from_pretrained(path)
    return path, config if dtype == "auto" else replace(config, dtype=dtype)


def _is_embedded(source: Source, *, revision: str | None) -> bool:
    if source != EMBEDDED:
        return False
    if revision is not None:
        raise ValueError(f"revision {revision!r} goes with a hub id, but the model is the embedded one; name a hub id")
    return True


def _hub_id(source: Source) -> str:
    if not isinstance(source, str) or not hub.is_hub_id(source):
        raise ValueError(
            f"{source}: no such folder, nor a hub id of the form owner/name; give an Orbax checkpoint, a folder saved "
            "with save_pretrained, the URL of either in a bucket, or a hub id"
        )
    return source


def _from_hub(repo_id: str, *, revision: str | None, cache: Path) -> Path:
    from qwen2audio_jax.checkpoint.hf_folder import INDEX, SETTINGS

    names = ["config.json", *SETTINGS]
    # The settings give the commit; once that commit is converted, its weights need not be downloaded any more.
    settings = hub.download(repo_id, revision=revision, patterns=names)
    commit = settings.name
    done = named(cache, label=repo_id, told_by=(repo_id, commit))
    if is_usable(done):
        return done
    Qwen2AudioConfig.from_pretrained(settings)  # an error now costs no download of the weights
    folder = hub.download(repo_id, revision=commit, patterns=[*names, "model*.safetensors", INDEX])
    return _converted(folder, cache, label=repo_id, where=repo_id, what=commit)


def _from_package(cache: Path) -> Path:
    """The embedded model's conversion, keyed by content: all installations of one release share it."""
    from qwen2audio_jax.checkpoint.hf_folder import weight_files

    folder = model_folder()
    digest = hashlib.sha256()
    for path in [folder / "config.json", *weight_files(folder), *_beside(folder)]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return _converted(folder, cache, label="embedded-speech", where=EMBEDDED, what=digest.hexdigest())


def _beside(folder: Folder) -> list[Folder]:
    from qwen2audio_jax.checkpoint.hf_folder import INDEX, SETTINGS

    return [folder / name for name in (INDEX, *SETTINGS) if (folder / name).is_file()]


def _contents(files: Iterable[Folder]) -> str:
    """Name, length and modification time of every file that a conversion reads, which identify the source's state."""
    return json.dumps([(path.name, *_stamp(path)) for path in files])


def _stamp(path: Folder) -> list[Any]:
    if isinstance(path, Path):
        return [path.stat().st_size, path.stat().st_mtime_ns]
    if path.stamp is None:
        raise ValueError(
            f"{path}: its file system tells neither an etag nor a time of change, so that a changed source could "
            "not be told; convert it (qwen2audio convert) and load the result"
        )
    return path.stamp


def _converted(folder: Folder, cache: Path, *, label: str, where: str, what: str) -> Path:
    place = named(cache, label=label, told_by=(where, what))
    if is_usable(place):
        return place
    # Imported here: it takes Orbax, a tenth of a short command.
    from qwen2audio_jax.checkpoint.progress import progress_bar, tell
    from qwen2audio_jax.convert import convert, share

    with made_once(place, source=folder, doing="converting"):
        if is_usable(place):
            return place
        before = [other for other in sorted(cache.iterdir()) if other != place and holds_weights(other)]
        if (other := share(folder, place, among=before)) is not None:
            tell(f"{folder}: its weights were converted before, into {other}")
            return place
        if jax.process_count() > 1:  # Orbax would wait for all of them, and they for the lock.
            raise ValueError(
                f"{folder}: cannot be converted by processes that run together; convert it first (qwen2audio convert) "
                "and give them the result"
            )
        tell(f"{folder}: converting once into {place}")
        with progress_bar("converting") as progress:
            convert(folder, place, on_progress=progress)
        for other in filter(holds_weights, earlier_states(place)):
            tell(f"{other}: from an earlier state of the same source; qwen2audio models removes it")
    return place
