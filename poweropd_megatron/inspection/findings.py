"""What was found in a folder: the tensors as they are stored, and what is wrong with them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.model_config import ModelConfig

type Kind = Literal["hugging-face", "megatron", "training", "run"]

KIND_NAMES: dict[Kind, str] = {
    "hugging-face": "Hugging Face folder",
    "megatron": "Megatron weights (torch_dist)",
    "training": "training checkpoint (torch_dist)",
    "run": "a run's output_dir",
}
SETTING = "verify"
"""What readers name as the setting that a folder came from."""
NUM_NAMED = 5
"""How many tensors a message names before it only counts them."""


@dataclass(frozen=True)
class Facts:
    """A stored tensor's type (torch's name of it, where torch has one) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return its size; a name of a type ends with the bits of an element."""
        bits = re.search(r"\d+", self.dtype)
        return prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


@dataclass(kw_only=True)
class Findings:
    """A folder as it was found. It is complete and sound if there are no problems."""

    path: Path
    weights_path: Path
    """Where the weights lie: the folder itself, but in a converted one."""
    kind: Kind
    model: ModelConfig | None = None
    """None where the folder doesn't tell, or not in a way that is understood."""
    tensors: dict[str, Facts] = field(default_factory=dict)
    """The model's weights by the names they are stored under: Hugging Face's, or Megatron's."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of the files that hold them."""
    facts: dict[str, str] = field(default_factory=dict)
    """Whatever else the folder says of itself, in words: its step, who wrote it."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all stored weights."""
        return sum(prod(facts.shape) for facts in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all stored weights."""
        return sum(facts.num_bytes for facts in self.tensors.values())

    @property
    def dtypes(self) -> Counter[str]:
        """Return how many tensors have each type."""
        return Counter(facts.dtype for facts in self.tensors.values())

    def compare_shapes(
        self, expected: Mapping[str, tuple[int, ...]], *, optional: Iterable[str] = ()
    ) -> None:
        """Add a problem for tensors that are missing, unexpected, or of another shape."""
        self.add_tensors("missing", [name for name in expected if name not in self.tensors])
        known = {*expected, *optional}
        self.add_tensors("unexpected", [name for name in self.tensors if name not in known])
        for name, shape in expected.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                self.problems.append(
                    f"{name} has the shape {self.tensors[name].shape}, but the model's is {shape}"
                )

    def add_error(self, error: InputError) -> None:
        """Add a problem that a reader found: its message without the setting."""
        self.problems.append(str(error).removeprefix(f"{SETTING}: "))

    def add_tensors(self, what: str, names: list[str]) -> None:
        """Add a problem about tensors, the first of which are named."""
        if names:
            self.problems.append(f"{len(names)} tensors are {what}: {named(names)}")


def named(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
