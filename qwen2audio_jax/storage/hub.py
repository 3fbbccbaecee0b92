"""Hugging Face Hub downloads: checkpoints by hub id, through `huggingface_hub` and its own cache.

Its environment variables apply: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qwen2audio_jax.installed import pip_install

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Return True if `source` has the form owner/name."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None


def download(repo_id: str, *, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local snapshot of a repository, with at least its files that match `patterns`; its name is the commit.

    Raises:
        ValueError: huggingface_hub is not installed, or the repository, revision or connection is missing.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"{repo_id}: no such folder, and reading it from the hub needs huggingface_hub: {pip_install('hub')}"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        where = f"{repo_id}@{revision}" if revision else repo_id
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: no such folder, and the hub did not give it ({type(error).__name__}: {reason}); check the name, "
            "the connection and HF_HUB_OFFLINE, or give a local folder"
        ) from error
