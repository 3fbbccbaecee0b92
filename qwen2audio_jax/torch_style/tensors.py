"""Numpy arrays with the few methods of torch's tensors that code written for transformers calls on inputs and ids."""

import logging
from typing import Any

import numpy as np

LOG = logging.getLogger(__name__)
NO_MOVE = "arrays stay on the host: the model takes them to the devices of its mesh, in the dtypes that it computes in"
"""Why `to` and its kin change nothing."""


class Size(int):
    """A number of elements that can also be called, as `size(1)`, for the length of an axis."""

    shape: tuple[int, ...]

    def __call__(self, dim: int | None = None) -> Any:
        """The shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]


class TensorLike(np.ndarray[Any, np.dtype[Any]]):
    """A numpy array that also answers to `size(1)`, `to(device)`, `cpu()`, `detach()`, `numpy()` and `dim()`.

    It is made as a view, so nothing is copied. Its parts have these methods too; what is computed of it is plain numpy.
    """

    @property
    def size(self) -> Size:
        """The number of elements; called, the shape or the length of an axis."""
        size = Size(self.__array__().size)
        size.shape = self.shape
        return size

    def to(self, *_: Any, **__: Any) -> "TensorLike":
        """The array itself: it stays on the host, in its dtype; the model's calls take it from there."""
        LOG.debug(NO_MOVE)
        return self

    cpu = cuda = detach = contiguous = to

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """Results as numpy has them, scalars included."""
        plain = np.asarray(array).view(np.ndarray)
        return plain[()] if plain.ndim == 0 else plain

    def numpy(self) -> np.ndarray:
        """The same memory as a plain array."""
        return self.view(np.ndarray)

    def dim(self) -> int:
        """The number of axes."""
        return self.ndim


def tensor_like(array: np.ndarray) -> TensorLike:
    """A view of an array with these methods."""
    return array.view(TensorLike)
