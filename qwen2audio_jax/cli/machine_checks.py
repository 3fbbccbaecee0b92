"""Machine checks of `qwen2audio doctor`: one line for each, and its problems, each with the remedy."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from qwen2audio_jax.cli.machine import PLUGINS, Machine
from qwen2audio_jax.installed import pip, pip_install

DEFAULT_FRACTION = "0.75"
"""XLA's share of a GPU's memory where no environment variable says another."""


@dataclass(frozen=True)
class Checked:
    """The result of one check: its name, the finding, and its problems."""

    name: str
    found: str
    problems: list[str]


def check_versions(machine: Machine) -> Checked:
    """Check package versions: a single libtpu, and the same versions in all processes."""
    versions = machine.versions
    problems = []
    both = [name for name in ("libtpu", "libtpu-nightly") if name in versions]
    if len(both) > 1:
        problems.append(
            f"two versions of libtpu are mixed: {', '.join(f'{name} {versions[name]}' for name in both)} overwrite "
            f"each other's files; pip uninstall libtpu libtpu-nightly, then {pip_install('tpu')}"
        )
    if versions.get("jax") != versions.get("jaxlib"):
        problems.append(
            f"jax {versions.get('jax', 'is missing')} with jaxlib {versions.get('jaxlib', 'missing')}: install them "
            "together, in one version"
        )
    for process, text in machine.other_versions.items():
        problems.append(f"process {process} has other versions: {text}; install the same on every host")
    return Checked("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), problems)


def check_devices(machine: Machine) -> Checked:
    """Check that JAX finds devices in reasonable time."""
    problems = []
    if machine.device_error is not None:
        problems.append(machine.device_error)
        if "looking for devices" in machine.device_error:
            problems.append(
                "on a TPU pod that is what happens where only one worker was started: start the command on every worker"
            )
    kinds: dict[str, int] = {}
    for device in machine.devices:
        size = device.get("memory_bytes")
        kind = device["kind"] + (f" with {size / 1e9:.1f} GB" if size else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    found = f"{machine.platform}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Checked("devices", found if machine.devices else "none", problems)


def check_reserved(machine: Machine) -> Checked:
    """Check how much of the GPUs' memory JAX takes at once, which other programs then lack."""
    if machine.platform != "gpu":
        return Checked("reserved on GPUs", "nothing: none are used", [])
    problems = []
    fractions = machine.memory_fractions
    if len(fractions) > 1:
        problems.append(f"{' and '.join(fractions)} are both set, which JAX refuses: unset one")
    for name, value in fractions.items():
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", value):
            problems.append(f"{name}={value} is no share of a GPU's memory: set it above 0 and up to 1, as in 0.9")
    share = next(iter(fractions.values()), DEFAULT_FRACTION)
    at_once = machine.preallocate not in ("0", "false", "False")
    how = f"{share} of each at once" if at_once else f"what is used, as it is used, up to {share} of each"
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": machine.preallocate or "unset", **fractions}
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    taken = [
        f"; device {device['id']}: {device['reserved_bytes'] / 1e9:.1f} GB now"
        for device in machine.devices
        if device.get("reserved_bytes") is not None
    ]
    return Checked("reserved on GPUs", f"{how} ({said}){''.join(taken)}", problems)


def check_fallback(machine: Machine) -> Checked:
    """Check that an existing accelerator is used."""
    hardware = [f"{machine.tpu_chips} TPU chips"] * (machine.tpu_chips > 0) + ["NVIDIA GPUs"] * machine.gpus
    plugins = [name for name in PLUGINS if name in machine.versions]
    found = f"the machine has {' and '.join(hardware) or 'no accelerator'}"
    if machine.asked_platforms:
        return Checked("accelerator", f"{found}; JAX_PLATFORMS={machine.asked_platforms}", [])
    problems = []
    if machine.platform == "cpu" and machine.tpu_chips:
        have = "libtpu" in machine.versions or "libtpu-nightly" in machine.versions
        why = (
            "libtpu did not start; see the devices, and who holds them"
            if have
            else f"libtpu is not installed: {pip_install('tpu')}"
        )
        problems.append(f"JAX fell back to the CPU although there are {machine.tpu_chips} TPU chips: {why}")
    if machine.platform == "cpu" and machine.gpus:
        why = (
            "its CUDA plugin did not start; see nvidia-smi for the driver"
            if plugins
            else f"its CUDA plugin is not installed: {pip_install('cuda')}"
        )
        problems.append(f"JAX fell back to the CPU although there are NVIDIA GPUs: {why}")
    elif machine.platform == "cpu" and plugins:
        problems.append(
            f"JAX fell back to the CPU: {', '.join(plugins)} is installed, but no GPU can be seen (driver, or the "
            "container was started without GPUs?); JAX_PLATFORMS=cpu says that this is meant"
        )
    return Checked("accelerator", found, problems)


def check_holders(machine: Machine) -> Checked:
    """Check that no other process holds the TPU."""
    error = machine.device_error or ""
    problems = []
    if machine.tpu_holders:
        pids = ", ".join(map(str, machine.tpu_holders))
        problems.append(f"libtpu is held by another process ({pids}): end it first, only one can use a TPU at a time")
    elif any(word in error for word in ("already in use", "lockfile", "Device or resource busy")):
        problems.append(
            "libtpu is held by another process, perhaps another user's: end it; if there is none, a killed one left "
            "/tmp/libtpu_lockfile, which can be removed"
        )
    return Checked("TPU held by others", "no" if not problems else "yes", problems)


def check_processes(machine: Machine) -> Checked:
    """Check that all workers of a pod were started."""
    workers = machine.pod_workers
    problems = []
    if machine.peers_missing is not None:
        problems.append(machine.peers_missing)
    elif workers is not None and workers > machine.processes:
        running = "1 is" if machine.processes == 1 else f"{machine.processes} are"
        problems.append(
            f"of {workers} workers of this TPU pod only {running} running this: JAX waits for the others without a "
            "word; start the command on every worker at once (gcloud compute tpus tpu-vm ssh NAME --worker=all "
            "--command=...)"
        )
    found = f"{machine.processes}" + (f" of the pod's {workers} workers" if workers else "")
    return Checked("processes", found, problems)


def check_memory(machine: Machine) -> Checked:
    """Report the host's memory; no amount of it is a problem in itself."""
    sizes = (f"{name} {size / 1e9:.1f} GB" for name, size in machine.memory.items())
    return Checked("host memory", ", ".join(sizes) or "unknown", [])


def check_decoders(machine: Machine) -> Checked:
    """Check that audio files can be decoded."""
    problems = []
    for name in ("soundfile", "av"):
        if machine.decoders.get(name) is None:
            problems.append(f"{name} does not load, so not every sound file can be read: {pip(name)}")
    found = ", ".join(f"{name} {version}" for name, version in machine.decoders.items() if version is not None)
    return Checked("decoders", found, problems)


def check_cache(machine: Machine) -> Checked:
    """Check that converted checkpoints can be stored."""
    problems = []
    if machine.cache_problem is not None:
        problems.append(f"{machine.cache_problem}: point QWEN2AUDIO_CACHE at a folder that can")
    free = "" if machine.cache_free is None else f", {machine.cache_free / 1e9:.1f} GB free"
    return Checked("cache folder", f"{machine.cache}{free}", problems)


def check_compiled(machine: Machine) -> Checked:
    """Check that JAX's compilation cache can be written, unless it is off."""
    problems = []
    if machine.compiled_problem is not None:
        problems.append(f"{machine.compiled_problem}: point QWEN2AUDIO_COMPILATION_CACHE at a folder that can")
    off = "off, every process compiles anew (QWEN2AUDIO_COMPILATION_CACHE)"
    return Checked("compilation cache", machine.compiled or off, problems)


CHECKS: tuple[Callable[[Machine], Checked], ...] = (
    check_versions,
    check_devices,
    check_reserved,
    check_fallback,
    check_holders,
    check_processes,
    check_memory,
    check_decoders,
    check_cache,
    check_compiled,
)
