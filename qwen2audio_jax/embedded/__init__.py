"""The embedded model and example clips, which come with the package.

`from_pretrained()` without a path loads the model, which `EMBEDDED` names wherever a checkpoint is expected. On the
command line `example:NAME` stands for a clip.
"""

from pathlib import Path

EMBEDDED = "embedded:speech"
"""The name of the embedded model, the default checkpoint."""

FOLDER = Path(__file__).parent


def model_folder() -> Path:
    """The embedded model, a folder in the Hugging Face layout.

    Raises:
        ValueError: this copy of the package was built without it.
    """
    folder = FOLDER / "speech"
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ValueError(
            f"{folder}: this copy of the package was built without the embedded model; install the whole package, or "
            "name a checkpoint"
        )
    return folder


def examples() -> list[Path]:
    """The clips, wav files, sorted by name."""
    return sorted((FOLDER / "examples").glob("*.wav"))


def example(name: str) -> Path:
    """The clip of that name, written without `.wav`.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    clips = {path.stem: path for path in examples()}
    if name not in clips:
        raise ValueError(f"there is no example {name!r}; there are: {', '.join(clips) or 'none in this copy'}")
    return clips[name]
