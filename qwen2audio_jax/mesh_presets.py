"""Meshes for well-known machines, by name: the files `mesh-NAME.toml` in configs/, each of which says why."""

import tomllib
from dataclasses import dataclass
from importlib import resources

_PREFIX, _SUFFIX = "mesh-", ".toml"


@dataclass(frozen=True)
class MeshPreset:
    """How the published model is laid over a machine.

    Attributes:
        devices: how many the machine has, as JAX counts them.
        data: groups that each hold the decoder and share the rows.
        model: devices of a group.
        num_slices: parts of the machine that only a slow network joins.
        dtype: of weights and computation.
    """

    devices: int
    data: int
    model: int
    num_slices: int
    dtype: str


def mesh_preset_names() -> list[str]:
    """What `load_mesh_preset` takes."""
    names = (entry.name for entry in resources.files("qwen2audio_jax.configs").iterdir())
    return sorted(
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        for name in names
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    )


def load_mesh_preset(name: str) -> MeshPreset:
    """The preset of that name, such as "v5e-8".

    Raises:
        ValueError: there is none; the message lists them.
    """
    names = mesh_preset_names()
    if name not in names:
        raise ValueError(f"there is no mesh preset named {name!r}; there are: {', '.join(names)}")
    file = resources.files("qwen2audio_jax.configs") / f"{_PREFIX}{name}{_SUFFIX}"
    return MeshPreset(**tomllib.loads(file.read_text(encoding="utf-8")))
