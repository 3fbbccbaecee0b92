"""Compilation cache: compiled programs kept in the user's cache folder, so that the next process need not compile."""

import os
from pathlib import Path
from typing import Any

import jax

from qwen2audio_jax.checkpoint.conversion_cache import default_cache_dir

SWITCH = "QWEN2AUDIO_COMPILATION_CACHE"
"""Environment variable: a folder, or one of `OFF`."""
OFF = ("off", "0", "no", "false")
"""Values that switch the cache off, in capitals too: a folder of such a name would surprise whoever wrote it."""

MOST_BYTES = 4 << 30
"""Size of the cache; beyond it the programs go that were not used for longest."""


def compilation_cache_dir() -> Path | None:
    """The folder that this package gives to JAX's cache; None where it is switched off."""
    asked = os.environ.get(SWITCH, "")
    if asked.lower() in OFF:
        return None
    return Path(asked) if asked else default_cache_dir() / "compiled"


def _has_a_name() -> bool:
    """Whether the user is listed: in a container the id may be any, and JAX fails where it measures its cache."""
    try:
        import pwd

        pwd.getpwuid(os.getuid())
    except (ImportError, KeyError):
        return False
    return True


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, unless JAX's cache is configured already or `SWITCH` is one of `OFF`.

    JAX's own defaults keep only programs that take a second to compile; here all are kept. A folder that cannot be
    made leaves the cache off.
    """
    folder = compilation_cache_dir()
    config: Any = jax.config
    if folder is None or config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config.update("jax_compilation_cache_max_size", MOST_BYTES if _has_a_name() else -1)
    config.update("jax_compilation_cache_dir", str(folder))
