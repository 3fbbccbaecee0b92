"""Machine facts for `qwen2audio doctor`: versions, devices, memory, decoders, folders, processes."""

import importlib.metadata
import os
import platform
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen2audio_jax.checkpoint.compilation_cache import compilation_cache_dir
from qwen2audio_jax.source import default_cache_dir

PACKAGES = ("qwen2audio-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "libtpu", "libtpu-nightly")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "jax-rocm60-plugin")
_ALPHABET_CHIPS = "0x1ae0"  # PCI vendor of TPUs
MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
DEVICE_SECONDS = 60.0
"""Seconds that JAX's device discovery may take: on a single worker of a pod it never ends."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts about a machine that the checks evaluate.

    Attributes:
        versions: of packages and Python; those that are not installed are left out.
        platform: JAX's backend ("cpu", "gpu", "tpu"); None if unknown.
        devices: of this process: kind, and if the device reports them total and used bytes of memory and the bytes
            that JAX has taken from it, in use or kept for later.
        preallocate: $XLA_PYTHON_CLIENT_PREALLOCATE.
        memory_fractions: $XLA_CLIENT_MEM_FRACTION and its older name, $XLA_PYTHON_CLIENT_MEM_FRACTION, where set.
        device_error: the error of device discovery.
        asked_platforms: $JAX_PLATFORMS.
        tpu_chips: number of chips on the machine's PCI bus.
        tpu_holders: ids of other processes that have one open.
        gpus: whether there are NVIDIA devices.
        processes: number of joined processes, this one included.
        peers_missing: why not all could be joined.
        pod_workers: number of workers that the machine's pod or job reports; None if it reports none.
        other_versions: processes whose versions differ from this one's, and their versions.
        memory: of the host in bytes, total and free.
        decoders: decoder -> version; None if it is missing.
        cache: the folder for conversions.
        cache_problem: why it cannot be written.
        cache_free: free bytes on its disk.
        compiled: the folder of the compilation cache; empty if it is switched off.
        compiled_problem: why it cannot be written.
    """

    versions: dict[str, str]
    platform: str | None = "cpu"
    devices: list[dict[str, Any]] = field(default_factory=list)
    preallocate: str = ""
    memory_fractions: dict[str, str] = field(default_factory=dict)
    device_error: str | None = None
    asked_platforms: str = ""
    tpu_chips: int = 0
    tpu_holders: list[int] = field(default_factory=list)
    gpus: bool = False
    processes: int = 1
    peers_missing: str | None = None
    pod_workers: int | None = None
    other_versions: dict[int, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    decoders: dict[str, str | None] = field(default_factory=dict)
    cache: str = ""
    cache_problem: str | None = None
    cache_free: int | None = None
    compiled: str = ""
    compiled_problem: str | None = None


def look(*, peers_missing: str | None = None) -> Machine:
    """Gather the facts; several processes have been joined before, or `peers_missing` says why not."""
    versions = _versions()
    holders = _tpu_holders()
    found: dict[str, Any] = {}
    # If discovery never ends, the thread is abandoned.
    thread = threading.Thread(target=_find_devices, args=(found, ", ".join(f"{k} {v}" for k, v in versions.items())))
    thread.daemon = True
    thread.start()
    thread.join(DEVICE_SECONDS)
    if thread.is_alive():
        found = {"platform": None, "device_error": f"JAX has been looking for devices for {DEVICE_SECONDS:.0f} s"}
    cache = default_cache_dir()
    problem, free = _folder(cache)
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", "") or str(compilation_cache_dir() or "")
    return Machine(
        versions=versions,
        **found,
        preallocate=os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", ""),
        memory_fractions={name: os.environ[name] for name in MEMORY_FRACTIONS if os.environ.get(name)},
        asked_platforms=os.environ.get("JAX_PLATFORMS", ""),
        tpu_chips=_tpu_chips(),
        tpu_holders=holders,
        gpus=any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")),
        peers_missing=peers_missing,
        pod_workers=pod_workers(os.environ),
        memory=_memory(),
        decoders=_decoders(),
        cache=str(cache),
        cache_problem=problem,
        cache_free=free,
        compiled=compiled,
        compiled_problem=_folder(Path(compiled))[0] if compiled and "://" not in compiled else None,
    )


def pod_workers(environment: Mapping[str, str]) -> int | None:
    """The number of workers that the environment of a TPU pod names."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    return len(names.split(",")) * int(environment.get("MEGASCALE_NUM_SLICES") or 1) if names else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *PLUGINS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _find_devices(found: dict[str, Any], versions: str) -> None:
    import jax
    from jax.experimental import multihost_utils

    result: dict[str, Any] = {"platform": None}
    try:
        devices = jax.local_devices()
        result["platform"] = devices[0].platform
        result["devices"] = [_device(device) for device in devices]
        result["processes"] = jax.process_count()
        if jax.process_count() > 1:
            line = np.zeros(512, np.uint8)
            own = np.frombuffer(versions.encode()[:512], np.uint8)
            line[: len(own)] = own
            said = [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(line)]
            result["other_versions"] = {i: text for i, text in enumerate(said) if text != versions}
    except Exception as error:  # any error of a backend is to be reported
        result["device_error"] = " ".join(f"{type(error).__name__}: {error}".split())
    found.update(result)


def _device(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # not every backend reports memory
        stats = {}
    return {
        "id": device.id,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "used_bytes": stats.get("bytes_in_use"),
        "reserved_bytes": stats.get("pool_bytes", stats.get("bytes_reserved")),
    }


def _tpu_chips() -> int:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return sum(_read(vendor).strip() == _ALPHABET_CHIPS for vendor in vendors)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _tpu_holders() -> list[int]:
    """Other processes that have a TPU's device file open, as far as visible to this user."""
    holders = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("/dev/accel") or (target.startswith("/dev/vfio/") and target[10:].isdecimal()):
            holders.add(int(link.parts[2]))
    return sorted(holders - {os.getpid()})


def _memory() -> dict[str, int]:
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    names = {"MemTotal:": "total", "MemAvailable:": "free"}
    return {names[words[0]]: int(words[1]) * 1024 for words in lines if words and words[0] in names}


def _decoders() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    try:
        import soundfile

        found["soundfile"] = f"{soundfile.__version__} (libsndfile {soundfile.__libsndfile_version__})"
    except (ImportError, OSError):
        found["soundfile"] = None
    try:
        import av

        found["av"] = av.__version__
    except (ImportError, OSError):
        found["av"] = None
    return found


def _folder(path: Path) -> tuple[str | None, int | None]:
    """The problem with writing to a folder, or to its nearest existing parent, and the free bytes there."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is not a folder", None
    free = shutil.disk_usage(there).free
    return (None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"), free
