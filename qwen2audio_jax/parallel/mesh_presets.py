"""Mesh presets for common machines: the files `mesh-NAME.toml` in configs/, each with its rationale."""

import tomllib
from dataclasses import dataclass
from importlib import resources

_PREFIX, _SUFFIX = "mesh-", ".toml"


@dataclass(frozen=True)
class MeshPreset:
    """The layout of the published model over a machine.

    Attributes:
        devices: number of devices of the machine, as JAX counts them.
        data: number of groups; each holds the decoder and takes a share of the rows.
        model: devices per group.
        num_slices: parts of the machine connected only by a slow network.
        dtype: of weights and computation.
    """

    devices: int
    data: int
    model: int
    num_slices: int
    dtype: str


def mesh_preset_names() -> list[str]:
    """The names that `load_mesh_preset` accepts."""
    names = (entry.name for entry in resources.files("qwen2audio_jax.configs").iterdir())
    return sorted(
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        for name in names
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    )


def load_mesh_preset(name: str) -> MeshPreset:
    """The preset of that name, such as "v5e-8".

    Raises:
        ValueError: no such preset; the message lists them.
    """
    names = mesh_preset_names()
    if name not in names:
        raise ValueError(f"there is no mesh preset named {name!r}; there are: {', '.join(names)}")
    file = resources.files("qwen2audio_jax.configs") / f"{_PREFIX}{name}{_SUFFIX}"
    return MeshPreset(**tomllib.loads(file.read_text(encoding="utf-8")))
