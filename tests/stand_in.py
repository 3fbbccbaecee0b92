"""A module with some of its functions changed, for one of ours to see in its place."""

from types import ModuleType, SimpleNamespace


def stand_in(module: ModuleType, **changes) -> SimpleNamespace:
    """All of `module`, and `changes` over it.

    Set as the module's name in one of ours, it changes that one alone: `time.sleep` itself is called by threads that
    other tests left running too.
    """
    return SimpleNamespace(**{**vars(module), **changes})
