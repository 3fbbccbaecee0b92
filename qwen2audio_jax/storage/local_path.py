"""Local paths, checked before they are used: `Path.exists` raises for some texts and says False for others."""

import errno
import os


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError for a text that no file can have as its path."""
    if not os.fspath(path):
        raise ValueError("the path is empty; name a file or a folder ('.' is the one that you are in)")
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            if error.errno != errno.ENAMETOOLONG:
                return  # none of this name, or not for us to see: for those to say who read it
            reason = f"{len(os.fspath(path))} characters are too many"
        raise ValueError(f"{os.fspath(path)[:80]!r} is no path ({reason}); check the name") from None
