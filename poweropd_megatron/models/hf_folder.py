"""A Hugging Face checkpoint folder: config.json and tensors read by name, whole or in slices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError
from poweropd_megatron.json_file import read_json

INDEX_NAME = "model.safetensors.index.json"


def is_weight_file(place: str) -> bool:
    """Return whether an index's place is the name of a *.safetensors file, not a path elsewhere."""
    return Path(place).name == place and place.endswith(".safetensors")


class HFFolder:
    """Tensors of the *.safetensors files in a folder, through their index where there is one."""

    def __init__(self, path: str | Path, *, setting: str) -> None:
        """Read which file holds which tensor.

        Raises: InputError if the folder or a file is missing, truncated or not in safetensors
        format, or lacks a tensor that the index places in it; if the index places one outside of
        the folder; or if, without an index, two files hold the same tensor.
        """
        self.path = Path(path)
        self.setting = setting
        if not self.path.is_dir():
            raise InputError(f"{setting}: {self.path.absolute()} is not a folder")
        self._file_of = dict(self._locate())
        if not self._file_of:
            raise InputError(f"{setting}: no *.safetensors file in {self.path.absolute()}")

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        with self._open(self.file(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, *, dim: int = 0, start: int = 0, length: int | None = None) -> Any:
        """Return a tensor, or `length` rows (dim 0) or columns (dim 1) of it from `start`.

        Raises: InputError if the tensor is absent or its file is truncated.
        """
        with self._open(self.file(name)) as file:
            if length is None:
                return file.get_tensor(name)
            index = (slice(None),) * dim + (slice(start, start + length),)
            return file.get_slice(name)[index]

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor. Raises: InputError if there is no such tensor."""
        if name not in self._file_of:
            raise InputError(f"{self.setting}: {self.path} has no tensor {name}")
        return self.path / self._file_of[name]

    def _locate(self) -> Iterator[tuple[str, str]]:
        index_path = self.path / INDEX_NAME
        if index_path.exists():
            weight_map = read_json(index_path, self.setting).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{self.setting}: {index_path} has no weight_map")
            for name, place in weight_map.items():
                if not isinstance(place, str) or not is_weight_file(place):
                    raise InputError(
                        f"{self.setting}: {index_path} places {name} in {place!r}, expected the "
                        "name of a *.safetensors file in the folder"
                    )
            for file_name in sorted(set(weight_map.values())):
                names = [name for name, place in weight_map.items() if place == file_name]
                self._check_file_holds(self.path / file_name, names)
            yield from weight_map.items()
            return
        file_of: dict[str, str] = {}
        for file_path in sorted(self.path.glob("*.safetensors")):
            with self._open(file_path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in file_of:
                        raise InputError(
                            f"{self.setting}: {name} is in {self.path / file_of[name]} and in "
                            f"{file_path}: remove the one that doesn't belong there"
                        )
                    file_of[name] = file_path.name
        yield from file_of.items()

    def _check_file_holds(self, path: Path, names: list[str]) -> None:
        if not path.is_file():
            raise InputError(f"{self.setting}: {path} is missing")
        with self._open(path) as file:
            absent = sorted(set(names) - set(file.keys()))
        if absent:
            raise InputError(
                f"{self.setting}: {path} has no tensor {absent[0]}, though {INDEX_NAME} says so"
            )

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.setting}: {path} can't be read: {error}") from None
