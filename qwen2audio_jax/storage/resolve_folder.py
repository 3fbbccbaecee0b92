"""Sources of models: a path, a bucket's URL or a hub id."""

from qwen2audio_jax.storage.bucket import Folder, PathOrUrl, folder_at, is_url


def resolve_folder(source: PathOrUrl, *, revision: str | None = None) -> Folder | None:
    """The folder of a path or a URL; None where the source can only be a hub id.

    Raises:
        ValueError: a URL without a folder behind it, or `revision` with a folder.
    """
    folder = folder_at(source)
    if not is_url(source) and not folder.is_dir():
        return None
    if revision is not None:
        what = "a bucket's URL" if is_url(source) else "a local folder"
        raise ValueError(f"revision {revision!r} goes with a hub id, but {source} is {what}")
    if not folder.is_dir():
        raise ValueError(f"{source}: there is no such folder, nor such a bucket; check the URL")
    return folder
