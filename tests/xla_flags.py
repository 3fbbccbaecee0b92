"""Flags with which XLA compiles the tests' programs quickly.

Tests compile hundreds of programs to run each a few times, and most of their time is the compiler's. Half of that goes
without its optimisations, and half of the rest with the code that XLA emitted for fusions before it used MLIR, as long
as it has that.
"""

from importlib.metadata import version


def quick_flags(*, devices: int, by_hand: str | None = None) -> str:
    """XLA_FLAGS of a process with so many fake devices.

    Who sets flags by hand, as .ci/run does for the comparisons with the reference, gets the fusions that users have.
    """
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if by_hand is not None:
        flags.append(by_hand)
    elif version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
