"""Where a model comes from: an Orbax checkpoint, a Hugging Face folder, a hub id or the package itself.

All but the first are converted once, by the normal converter, into a cache folder ($QWEN2AUDIO_CACHE, else
~/.cache/qwen2audio_jax) and load from there after. A conversion's name in it tells what the source held then: a source
that changes is converted anew.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from qwen2audio_jax import hub
from qwen2audio_jax.checkpoint import MANIFEST, MARKER, is_checkpoint, read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED, model_folder

Source = str | os.PathLike[str]


def default_cache_dir() -> Path:
    """The folder that conversions go to."""
    configured = os.environ.get("QWEN2AUDIO_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "qwen2audio_jax"


def resolve_processor_files(source: Source, *, revision: str | None = None) -> Path:
    """The local folder with a source's tokenizer, template and preprocessor settings.

    A folder is its own answer, `EMBEDDED` the package's; of a hub id everything but the weights is downloaded.

    Raises:
        ValueError: none of these, or a hub id that the hub does not give; `revision` with a folder or `EMBEDDED`.
    """
    if _is_embedded(source, revision=revision):
        return model_folder()
    if _is_local_folder(source, revision=revision):
        return Path(source)
    from qwen2audio_jax.convert.hf_folder import SETTINGS

    return hub.download(_hub_id(source), revision=revision, patterns=["config.json", *SETTINGS])


def resolve_checkpoint(
    source: Source, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The Orbax checkpoint of a source, converted now if that has not been done yet.

    Args:
        source: an Orbax checkpoint, a folder with safetensors weights, a hub id such as "Qwen/Qwen2-Audio-7B", or
            `EMBEDDED`.
        revision: branch, tag or commit of a hub id.
        cache_dir: where conversions are kept; default: `default_cache_dir()`.

    Raises:
        ValueError: none of these, or the source cannot be converted (see `convert.convert`).
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if _is_embedded(source, revision=revision):
        return _from_package(cache)
    if not _is_local_folder(source, revision=revision):
        return _from_hub(_hub_id(source), revision=revision, cache=cache)
    folder = Path(source)
    if is_checkpoint(folder):
        return folder
    if (folder / MANIFEST).exists() or (folder / MARKER).exists():
        read_manifest(folder)  # says what is wrong with it
    from qwen2audio_jax.convert.hf_folder import weight_files

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: holds neither an Orbax checkpoint ({MANIFEST}) nor a Hugging Face one (config.json with "
            "model.safetensors or model.safetensors.index.json)"
        )
    contents = _contents([folder / "config.json", *weight_files(folder), *_beside(folder)])
    real = folder.resolve()
    return _converted(folder, cache, label=real.name, where=str(real), what=contents)


def load_config(
    source: Source, *, dtype: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[Path, Qwen2AudioConfig]:
    """The Orbax checkpoint of a source, and its configuration with the dtype that was asked for.

    Args:
        source: as for `resolve_checkpoint`.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        revision: as for `resolve_checkpoint`.
        cache_dir: as for `resolve_checkpoint`.

    Raises:
        ValueError: as `resolve_checkpoint`, and for another dtype; that before anything is read or converted.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not one of 'auto', 'float32', 'bfloat16', 'float16'")
    path = resolve_checkpoint(source, revision=revision, cache_dir=cache_dir)
    config = Qwen2AudioConfig.from_pretrained(path)
    return path, config if dtype == "auto" else replace(config, dtype=dtype)


def read_adapter(source: Source, *, config: Qwen2AudioConfig) -> tuple[dict[str, Any], float]:
    """A LoRA adapter in PEFT's format, and its scale: see `convert.adapter.load_adapter`.

    Args:
        source: a folder, or a hub id whose adapter files are downloaded.
        config: of the model that it is for.

    Raises:
        ValueError: neither of the two, or an adapter that is not supported or does not fit the model.
    """
    from qwen2audio_jax.convert import adapter

    if Path(source).is_dir():
        return adapter.load_adapter(source, config=config)
    if not hub.is_hub_id(source):
        raise ValueError(
            f"{os.fspath(source)}: no such adapter folder, nor a hub id of the form owner/name; give a folder with "
            f"{adapter.CONFIG} and {adapter.WEIGHTS}"
        )
    folder = hub.download(os.fspath(source), revision=None, patterns=[adapter.CONFIG, adapter.WEIGHTS])
    return adapter.load_adapter(folder, config=config)


def _is_embedded(source: Source, *, revision: str | None) -> bool:
    if source != EMBEDDED:
        return False
    if revision is not None:
        raise ValueError(f"revision {revision!r} goes with a hub id, but the model is the embedded one; name a hub id")
    return True


def _is_local_folder(source: Source, *, revision: str | None) -> bool:
    if not Path(source).is_dir():
        return False
    if revision is not None:
        raise ValueError(f"revision {revision!r} goes with a hub id, but {os.fspath(source)} is a local folder")
    return True


def _hub_id(source: Source) -> str:
    if not hub.is_hub_id(source):
        raise ValueError(
            f"{os.fspath(source)}: no such folder, nor a hub id of the form owner/name; give an Orbax checkpoint, a "
            "folder saved with save_pretrained, or a hub id"
        )
    return os.fspath(source)


def _from_hub(repo_id: str, *, revision: str | None, cache: Path) -> Path:
    from qwen2audio_jax.convert.hf_folder import INDEX, SETTINGS

    settings = ["config.json", *SETTINGS]
    # The settings name the commit; with that commit converted already, its weights need not be there any more.
    commit = hub.download(repo_id, revision=revision, patterns=settings).name
    done = _place(cache, label=repo_id, where=repo_id, what=commit)
    if is_checkpoint(done):
        return done
    folder = hub.download(repo_id, revision=commit, patterns=[*settings, "model*.safetensors", INDEX])
    return _converted(folder, cache, label=repo_id, where=repo_id, what=commit)


def _from_package(cache: Path) -> Path:
    """Told by content: every installation of the same release shares one conversion."""
    from qwen2audio_jax.convert.hf_folder import weight_files

    folder = model_folder()
    digest = hashlib.sha256()
    for path in [folder / "config.json", *weight_files(folder), *_beside(folder)]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return _converted(folder, cache, label="embedded-speech", where=EMBEDDED, what=digest.hexdigest())


def _beside(folder: Path) -> list[Path]:
    from qwen2audio_jax.convert.hf_folder import INDEX, SETTINGS

    return [folder / name for name in (INDEX, *SETTINGS) if (folder / name).is_file()]


def _contents(files: list[Path]) -> str:
    """Name, length and time of change of every file that a conversion reads: what a changed source differs in."""
    stats = [(path.name, path.stat()) for path in files]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _place(cache: Path, *, label: str, where: str, what: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", label).strip(".-") or "checkpoint"
    digests = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (where, what)]
    return cache / "-".join([name, *digests])


def _converted(folder: Path, cache: Path, *, label: str, where: str, what: str) -> Path:
    from qwen2audio_jax.convert import convert
    from qwen2audio_jax.convert.progress import progress_bar

    place = _place(cache, label=label, where=where, what=what)
    if is_checkpoint(place):
        return place
    if jax.process_count() > 1:  # Orbax would wait for all of them, and they for the lock below.
        raise ValueError(
            f"{folder}: cannot be converted by processes that run together; convert it first (qwen2audio convert) and "
            "give them the result"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_process(place, source=folder):
            if not is_checkpoint(place):
                _tidy(place)
                print(f"{folder}: converting once into {place}", file=sys.stderr)
                with progress_bar("converting") as progress:
                    convert(folder, place, on_progress=progress)
    except PermissionError as error:
        raise ValueError(
            f"{cache}: the cache folder cannot be written ({error.strerror}); point QWEN2AUDIO_CACHE at one that can"
        ) from None
    return place


@contextmanager
def _one_process(place: Path, *, source: Path) -> Iterator[None]:
    lock = FileLock(f"{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{source}: another process is converting it; waiting", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tidy(place: Path) -> None:
    """Remove what killed conversions of earlier states of this source left, and name finished ones that are stale."""
    prefix = place.name.rsplit("-", 1)[0] + "-"
    for other in place.parent.iterdir():
        if other == place or not other.name.startswith(prefix) or not other.is_dir():
            continue
        if is_checkpoint(other):
            print(f"{other}: from an earlier state of the same source; remove it if unused", file=sys.stderr)
        elif (other / MARKER).exists():
            with suppress(Timeout), FileLock(f"{other}.lock").acquire(timeout=0):  # Timeout: it is still being written
                shutil.rmtree(other)
