"""CUDA graphs without a GPU: tapes of operations, replayed at the same places in memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITING = ("_local_scalar_dense", "nonzero", "equal")
"""Operations that wait for a GPU, which a graph can't hold."""


class Operation(NamedTuple):
    """An operation, and views of what it read and wrote."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: Any


class Tape(TorchDispatchMode):
    """Notes operations, and which of their results are in memory of the graph's own."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.own: dict[int, Tensor] = {}
        self._outer: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__.split(".")[0] in WAITING:
            raise RuntimeError(f"{func} waits for the GPU while a graph is recorded")
        arguments, keywords = _views((args, kwargs or {}))
        results = func(*args, **(kwargs or {}))
        self._outer |= {_place(used) for used in _tensors((arguments, keywords))} - set(self.own)
        for made in _tensors(results):
            if _place(made) not in self._outer:
                self.own[_place(made)] = made.detach()
        self.operations.append(Operation(func, arguments, keywords, _views(results)))
        return results

    def poison(self) -> None:
        """Overwrite what only a replay makes: recording a graph runs nothing."""
        for made in self.own.values():
            made.fill_(torch.nan if made.is_floating_point() else 0)


class TapedGraph:
    """What stands for torch.cuda.CUDAGraph."""

    num_recorded = 0
    num_replayed = 0

    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        """Run the operations again on what is in memory now."""
        TapedGraph.num_replayed += 1
        for function, arguments, keywords, results in self.tape.operations:
            if "empty" in function.__name__:
                continue
            again = function(*arguments, **keywords)
            for kept, new in zip(_tensors(results), _tensors(again), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class _Stream:
    def wait_stream(self, _other: "_Stream") -> None:
        pass


@contextmanager
def _record(graph: TapedGraph, **_settings: Any) -> Iterator[None]:
    TapedGraph.num_recorded += 1
    with graph.tape:
        yield
    graph.tape.poison()


def use_taped_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda's graphs and streams be tapes, counted from zero, until the test ends."""
    monkeypatch.setattr(TapedGraph, "num_recorded", 0)
    monkeypatch.setattr(TapedGraph, "num_replayed", 0)
    for name, stand_in in (
        ("CUDAGraph", TapedGraph),
        ("Stream", _Stream),
        ("current_stream", _Stream),
        ("stream", nullcontext),
        ("graph", _record),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _views(tree: Any) -> Any:
    """Return the same with views of the tensors, which keep their memory and their shapes."""
    return tree_map_only(Tensor, torch.ops.aten.alias.default, tree)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
