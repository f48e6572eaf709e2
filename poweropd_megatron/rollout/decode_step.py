"""One more token on each row of a decoding batch, replayed as a CUDA graph where there is a GPU.

A step of one position is hundreds of small kernels, which a GPU finishes several times faster than
Python launches them. A graph launches all at once; it is recorded anew when rows leave, the cache
grows, or the part of it that a step looks at changes. Prompts that take the place of rows that
ended change none of these but, if they are long, the latter two.
Shapes: B sequences, Vp vocabulary columns on this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd_megatron.models.kv_cache import KVCache


class DecodeStep:
    """The forward of one position a row."""

    def __init__(
        self, forward: Callable[[Tensor], Tensor | None], cache: KVCache, *, with_graph: bool
    ) -> None:
        """Take the forward from tokens [B, 1] to logits [B, Vp], None off the last stage.

        With a graph, it must not wait for the GPU, and reads nothing that moves between steps.
        """
        self._forward = forward
        self._cache = cache
        self._with_graph = with_graph
        self._recorded: tuple[int, int, int] | None = None

    def __call__(self, tokens_B: Tensor) -> Tensor | None:
        """Return the logits of the token after these, which join the cache.

        With a graph, the next call overwrites them.
        """
        self._cache.advance()
        if not self._with_graph:
            return self._forward(tokens_B[:, None])
        if self._recorded != self._cache.shape:
            self._record(tokens_B)
        self._token_ids_B1.copy_(tokens_B[:, None])
        self._graph.replay()
        return self._logits_BVp

    def _record(self, tokens_B: Tensor) -> None:
        self._recorded = self._cache.shape
        self._token_ids_B1 = tokens_B[:, None].clone()
        self._logits_BVp: Tensor | None = None
        self._graph = torch.cuda.CUDAGraph()  # The graph before gives its memory back here.
        # Once outside of the graph, for what libraries set up when they meet a shape. The cache
        # is written to at the same places again.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(self._token_ids_B1)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits_BVp = self._forward(self._token_ids_B1)
