"""Tokens drawn by the last pipeline stage, on their way to the other ranks of a model copy.

Shapes: B rows, Vp vocabulary columns on this rank.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.sampling import Draw, Sampling, draw_tokens


class PendingDraw:
    """Tokens that the speaking rank draws and the others are being told."""

    def __init__(
        self, drawn_3B: Tensor, work: dist.Work | None, stream: torch.cuda.Stream | None
    ) -> None:
        self._drawn_3B = drawn_3B
        self._work = work
        self._stream = stream

    def wait(self) -> Draw:
        """Return them, on the CPU. Waits for them alone: not for forwards queued since."""
        on_stream: AbstractContextManager[object] = (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        with on_stream:
            if self._work is not None:
                self._work.wait()
            drawn_3B = self._drawn_3B.cpu()
        return Draw(drawn_3B[0].long(), drawn_3B[1].float(), drawn_3B[2].float())


class TokenDrawer:
    """Draws on the rank that speaks for its model copy, and tells the others of it.

    A broadcast is started, and waited for only when its tokens are needed.
    """

    def __init__(self, layout: Layout, *, vocab_size: int, sampling: Sampling) -> None:
        self._layout = layout
        self._vocab_size = vocab_size
        self._sampling = sampling
        self._is_alone = dist.get_world_size(layout.groups.mp) == 1
        self._stream = (
            torch.cuda.Stream()  # type: ignore[no-untyped-call]
            if layout.device.type == "cuda" and not self._is_alone
            else None
        )

    def start(self, logits_BVp: Tensor | None, uniform_B: Tensor) -> PendingDraw:
        """Begin to draw a token a row; called by all ranks of a model copy, in the same order.

        Shapes: logits_BVp on the last stage, None elsewhere.
        Cost: with TP a gather of the logits, with TP or PP a broadcast of 24 bytes a row.
        """
        whole_BV = None if logits_BVp is None else self._gather_vocabulary(logits_BVp)
        drawn_3B = torch.zeros(3, len(uniform_B), dtype=torch.float64, device=self._layout.device)
        if whole_BV is not None:
            drawn_3B[0], drawn_3B[1], drawn_3B[2] = draw_tokens(whole_BV, uniform_B, self._sampling)
        work = None
        if not self._is_alone:
            work = dist.broadcast(
                drawn_3B,
                src=self._layout.speaker,
                group=self._layout.groups.mp,
                async_op=True,
            )
        return PendingDraw(drawn_3B, work, self._stream)

    def _gather_vocabulary(self, logits_BVp: Tensor) -> Tensor | None:
        """Return the logits over the whole vocabulary, without padding, on the rank that draws."""
        if self._layout.tp_size == 1:
            return logits_BVp[:, : self._vocab_size]
        shards = (
            [torch.empty_like(logits_BVp) for _ in range(self._layout.tp_size)]
            if self._layout.speaks_for_model
            else None
        )
        dist.gather(logits_BVp, shards, dst=self._layout.speaker, group=self._layout.groups.tp)
        return None if shards is None else torch.cat(shards, dim=1)[:, : self._vocab_size]
