"""Named tensors that may live in memory or in a safetensors file."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """Read-only mapping over a safetensors file; a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def store(tensors: Mapping[str, Tensor], path: Path) -> StoredTensors:
    """Write the tensors to `path` (safetensors) and return the lazy view of them.

    Raises OSError if the disk is full; safetensors itself raises an error that is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise
    return StoredTensors(path)


def in_memory(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All of them at once; one by one, a file of thousands of tensors takes minutes to read."""
    return load_file(tensors.path) if isinstance(tensors, StoredTensors) else tensors


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
