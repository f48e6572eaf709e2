"""The container that torch.save puts around a tensor's bytes: written, and seen through.

A torch_dist file is a sequence of them. Knowing what stands before and after the bytes, they are
copied without being made into tensors.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd_megatron.conversion.arrays import Files
from poweropd_megatron.errors import InputError


@dataclass(frozen=True)
class Container:
    """What torch.save writes before and after the bytes of a tensor of some shape and dtype."""

    head: bytes
    tail: bytes

    def length(self, num_bytes: int) -> int:
        """Return the bytes of a whole item."""
        return len(self.head) + num_bytes + len(self.tail)


def container(shape: Sequence[int], dtype: torch.dtype) -> Container:
    """Return the container of a contiguous tensor, without the checksum of its bytes.

    The tensor's memory is never touched. torch doesn't compare checksums when it loads.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    sink = _Sink(tensor)
    computes_checksum = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, sink)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(computes_checksum)
    assert sink.is_past_tensor
    return Container(bytes(sink.head), bytes(sink.tail))


class Containers:
    """The container of each kind of item, made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Container] = {}

    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> Container:
        """Return the container of a tensor."""
        kind = (shape, dtype)
        if kind not in self._made:
            self._made[kind] = container(*kind)
        return self._made[kind]


class _Sink:
    """A file that takes what is written, but for the tensor's own memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = tensor.data_ptr()
        self.is_past_tensor = False
        self.head, self.tail = bytearray(), bytearray()

    def write(self, data: memoryview) -> int:
        if np.frombuffer(data, np.uint8).ctypes.data == self._address:
            self.is_past_tensor = True
        else:
            (self.tail if self.is_past_tensor else self.head).extend(data)
        return len(data)

    def flush(self) -> None:
        pass


def tensor_offset(
    files: Files, path: Path, offset: int, length: int, *, shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Return where in a file the bytes of a stored tensor begin.

    Raises: InputError if the item isn't a contiguous tensor of that shape and dtype.
    """
    where = f"{files.setting}: {path} holds at byte {offset}"
    view = io.BufferedReader(_View(files, path, offset, length))
    try:
        tensor: Any = torch.load(view, map_location="meta", weights_only=True)
        with zipfile.ZipFile(view) as archive:
            (record,) = [name for name in archive.namelist() if name.endswith("/data/0")]
            info = archive.getinfo(record)
        view.seek(info.header_offset)
        header = view.read(30)
    except InputError:
        raise
    except Exception as error:
        name = type(error).__name__
        raise InputError(f"{where} nothing that torch.save wrote ({name})") from error
    is_plain = tensor.is_contiguous() and tensor.storage_offset() == 0
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not is_plain:
        raise InputError(
            f"{where} a tensor of {tuple(tensor.shape)} {tensor.dtype}, "
            f"expected {tuple(shape)} {dtype}, contiguous"
        )
    num_bytes = tensor.numel() * tensor.element_size()
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != num_bytes:
        raise InputError(f"{where} a tensor that is compressed or cut off")
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return offset + info.header_offset + len(header) + name_bytes + extra_bytes


class _View(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, files: Files, path: Path, offset: int, length: int) -> None:
        super().__init__()
        self._files, self._path, self._offset, self._length = files, path, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        out = np.frombuffer(buffer, np.uint8)[:count]
        self._files.read(self._path, self._offset + self._position, out)
        self._position += count
        return count
