"""Table of chips: memory, bandwidth, FLOP/s and link rates. Every number is the manufacturer's.

Sources. TPUs: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs/v5e and so
on) for memory and FLOP/s; "How to Scale Your Model", chapter "How to Think About TPUs"
(jax-ml.github.io/scaling-book/tpus), for the int8 rates and the links. GPUs: NVIDIA's data sheets of the A100, the
H100, the H200 and the L4 Tensor Core GPU, dense rates (without sparsity).
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["tpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        name: as in a topology's name.
        kind: TPUs are planned for by compiling, GPUs by arithmetic.
        hbm_bytes: of its nominal memory; programs may use less.
        hbm_bandwidth: bytes/s.
        bf16_flops: FLOP/s of matrix products in bfloat16.
        int8_ops: operations/s of matrix products in int8.
        link_bandwidth: bytes/s that a chip sends along one ring of its network, in both directions together.
        source: the source of these numbers.
        libtpu: libtpu's name for it; empty for GPUs.
        libtpu_options: further arguments of libtpu's topologies.
        aliases: other names.
    """

    name: str
    kind: Kind
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    int8_ops: float
    link_bandwidth: float
    source: str
    libtpu: str = ""
    libtpu_options: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()


GIB = 1 << 30
GB = 10**9
# Two cores that compile and count as one device.
_MEGACORE = (("chip_config_name", "megacore"),)


def _cloud(page: str) -> str:
    return f'Google Cloud\'s page "{page}"; int8 rate and links: "How to Scale Your Model", chapter on TPUs'


def _sheet(name: str) -> str:
    return f"NVIDIA's data sheet of the {name} Tensor Core GPU, dense rates"


CHIPS = (
    Chip(
        name="v4",
        kind="tpu",
        hbm_bytes=32 * GIB,  # "TPU v4": 32 GiB, 1200 GB/s, 275 TFLOP/s in bf16 or int8
        hbm_bandwidth=1.2e12,
        bf16_flops=2.75e14,
        int8_ops=2.75e14,
        link_bandwidth=9.0e10,  # Scaling book: 4.5e10 each way
        source=_cloud("TPU v4"),
        libtpu="v4",
        libtpu_options=_MEGACORE,
    ),
    Chip(
        name="v5e",
        kind="tpu",
        hbm_bytes=16 * GIB,  # "TPU v5e": 16 GB, 819 GB/s, 197 TFLOP/s
        hbm_bandwidth=8.19e11,
        bf16_flops=1.97e14,
        int8_ops=3.94e14,  # Scaling book (Google Cloud: 393 TOP/s)
        link_bandwidth=9.0e10,  # Scaling book: 4.5e10 each way; "TPU v5e": 400 GB/s over its four links
        source=_cloud("TPU v5e"),
        libtpu="v5e",
        aliases=("v5litepod", "v5lite"),
    ),
    Chip(
        name="v5p",
        kind="tpu",
        hbm_bytes=95 * GIB,  # "TPU v5p": 95 GB, 2765 GB/s, 459 TFLOP/s
        hbm_bandwidth=2.765e12,
        bf16_flops=4.59e14,
        int8_ops=9.18e14,  # Scaling book
        link_bandwidth=1.8e11,  # Scaling book: 9e10 each way
        source=_cloud("TPU v5p"),
        libtpu="v5",
        libtpu_options=_MEGACORE,
        aliases=("v5",),
    ),
    Chip(
        name="v6e",
        kind="tpu",
        hbm_bytes=32 * GIB,  # "TPU v6e": 32 GB, 1640 GB/s (later 1600), 918 TFLOP/s
        hbm_bandwidth=1.64e12,
        bf16_flops=9.18e14,
        int8_ops=1.836e15,  # "TPU v6e": 1836 TOP/s
        link_bandwidth=1.8e11,  # Scaling book: 9e10 each way
        source=_cloud("TPU v6e"),
        libtpu="v6e",
        aliases=("trillium",),
    ),
    Chip(
        name="a100",
        kind="gpu",
        hbm_bytes=80 * GB,  # A100 80GB SXM: 2039 GB/s, 312 TFLOP/s, 624 TOP/s, NVLink 600 GB/s both ways
        hbm_bandwidth=2.039e12,
        bf16_flops=3.12e14,
        int8_ops=6.24e14,
        link_bandwidth=3.0e11,
        source=_sheet("A100"),
        aliases=("a100-80gb",),
    ),
    Chip(
        name="a100-40gb",
        kind="gpu",
        hbm_bytes=40 * GB,  # A100 40GB SXM: 1555 GB/s, else as the larger one
        hbm_bandwidth=1.555e12,
        bf16_flops=3.12e14,
        int8_ops=6.24e14,
        link_bandwidth=3.0e11,
        source=_sheet("A100"),
    ),
    Chip(
        name="h100",
        kind="gpu",
        hbm_bytes=80 * GB,  # H100 SXM: 3.35 TB/s, 989 TFLOP/s, 1979 TOP/s, NVLink 900 GB/s both ways
        hbm_bandwidth=3.35e12,
        bf16_flops=9.89e14,
        int8_ops=1.979e15,
        link_bandwidth=4.5e11,
        source=_sheet("H100"),
    ),
    Chip(
        name="h200",
        kind="gpu",
        hbm_bytes=141 * GB,  # H200 SXM: 4.8 TB/s, else as the H100
        hbm_bandwidth=4.8e12,
        bf16_flops=9.89e14,
        int8_ops=1.979e15,
        link_bandwidth=4.5e11,
        source=_sheet("H200"),
    ),
    Chip(
        name="l4",
        kind="gpu",
        hbm_bytes=24 * GB,  # L4: 300 GB/s, 121 TFLOP/s, 242 TOP/s, PCIe 4.0 x16: 64 GB/s both ways
        hbm_bandwidth=3.0e11,
        bf16_flops=1.21e14,
        int8_ops=2.42e14,
        link_bandwidth=3.2e10,
        source=_sheet("L4"),
    ),
)


def find_chip(name: str) -> Chip | None:
    """The chip of a name or alias; None if the table has none."""
    return next((chip for chip in CHIPS if name in (chip.name, *chip.aliases)), None)
