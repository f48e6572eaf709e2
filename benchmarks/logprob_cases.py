"""Ways to the log-prob of a target token from logits that are there already.

`forward` is without autograd, as for scoring; `both` is forward and backward with a gradient for
each row. All start from a fresh copy of the logits, which is made outside the timing: some of them
overwrite it.
Shapes: N tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.ops.logprob import vocab_parallel_logprob
from poweropd_megatron.ops.rows import combine, row_grad_, row_stats

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCK_ROWS = 64
_TOLERANCE = 1e-4
"""Of a log-prob around -20 against fp64; fp32 sums in any order stay well below it."""


class Logits:
    """Random logits [N, V], a target and an upstream gradient for each row."""

    def __init__(self, num_tokens: int, vocab_size: int, dtype: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = min(_BLOCK_ROWS, num_tokens)
        block = 3 * torch.randn(rows, vocab_size, generator=generator)
        self._block = block.to(device, DTYPES[dtype])
        self.logits_NV = self._block.new_empty(num_tokens, vocab_size).requires_grad_()
        targets_N = torch.randint(vocab_size, (num_tokens,), generator=generator)
        self.targets_N = targets_N.to(device)
        self.grad_N = torch.randn(num_tokens, generator=generator).to(device)
        self.group = group_of_one(device)
        self.prepare()

    def prepare(self) -> None:
        """Write the logits anew: one block of rows over and over."""
        with torch.no_grad():
            for rows in self.logits_NV.split(len(self._block)):
                rows.copy_(self._block[: len(rows)])

    def check(self, logp_N: Tensor) -> None:
        """Return if these are the log-probs. Raises: ValueError if not."""
        rows = slice(0, 4)
        truth_n = self._block[rows].double().log_softmax(1)
        truth_n = truth_n.gather(1, self.targets_N[rows, None])[:, 0]
        error = (logp_N[rows].detach().double() - truth_n).abs().max().item()
        if not error <= _TOLERANCE:
            raise ValueError(f"log-probs differ from those of fp64 by {error}")


class Differentiable:
    """A function from logits and targets to log-probs, differentiated by autograd."""

    def __init__(
        self,
        make: Callable[[Logits], Callable[[Tensor, Tensor], Tensor]],
        num_tokens: int,
        vocab_size: int,
        dtype: str,
        device: str,
    ) -> None:
        self._data = Logits(num_tokens, vocab_size, dtype, device)
        self._logprob = make(self._data)
        self.steps = {"forward": self._forward, "both": self._both}
        self._data.check(self._forward())
        self.prepare()
        self._data.check(self._both())

    def prepare(self) -> None:
        """Write the logits anew."""
        self._data.prepare()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self._logprob(self._data.logits_NV, self._data.targets_N)

    def _both(self) -> Tensor:
        logp_N = self._logprob(self._data.logits_NV, self._data.targets_N)
        torch.autograd.grad(logp_N, self._data.logits_NV, self._data.grad_N)
        return logp_N


def op(data: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """Return this project's op, whose log-probs come with the entropy."""

    def logprob(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        return vocab_parallel_logprob(
            logits_NV,
            targets_N,
            vocab_size=logits_NV.shape[1],
            tp_group=data.group,
            inplace_backward=True,
        ).logp_N

    return logprob


def log_softmax(_: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what scripts write: the log-softmax of all columns, and one of them taken."""
    return lambda logits_NV, targets_N: (
        logits_NV.float().log_softmax(1).gather(1, targets_N[:, None])[:, 0]
    )


def compiled(_: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the target's logit less the logsumexp, by torch.compile."""

    def logprob(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        scores_NV = logits_NV.float()
        return scores_NV.gather(1, targets_N[:, None])[:, 0] - scores_NV.logsumexp(1)

    return torch.compile(logprob)


def megatron(data: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """Return Megatron-Core's cross entropy, negated."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return lambda logits_NV, targets_N: (
        -vocab_parallel_cross_entropy(logits_NV, targets_N, tp_group=data.group)
    )


def megatron_fused(data: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """Return Megatron-Core's fused cross entropy, negated."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return lambda logits_NV, targets_N: (
        -fused_vocab_parallel_cross_entropy(logits_NV, targets_N, data.group)
    )


class Kernels:
    """This project's kernels without autograd."""

    def __init__(
        self, with_entropy: bool, num_tokens: int, vocab_size: int, dtype: str, device: str
    ) -> None:
        self._data = Logits(num_tokens, vocab_size, dtype, device)
        self._with_entropy = with_entropy
        self._columns = {"first_column": 0, "vocab_size": vocab_size}
        self.steps = {"forward": self._forward, "both": self._both}
        self._data.check(self._forward())

    def prepare(self) -> None:
        """Write the logits anew."""
        self._data.prepare()

    def _forward(self) -> Tensor:
        return self._softmaxes().logp_N

    def _both(self) -> None:
        softmax = self._softmaxes()
        row_grad_(
            self._data.logits_NV.detach(),
            self._data.targets_N,
            maximum_N=softmax.maximum_N,
            inverse_sum_N=softmax.inverse_sum_N,
            grad_N=self._data.grad_N,
            **self._columns,
        )

    def _softmaxes(self):
        stats_N4 = row_stats(
            self._data.logits_NV.detach(),
            self._data.targets_N,
            with_entropy=self._with_entropy,
            **self._columns,
        )
        return combine(stats_N4[None], self._data.targets_N, with_entropy=self._with_entropy)


class PlainRead:
    """Ways to read the logits' bytes once, on all threads or one; the best is the memory's rate."""

    def __init__(self, num_tokens: int, vocab_size: int, dtype: str, device: str) -> None:
        self._data = Logits(num_tokens, vocab_size, dtype, device)
        flat = self._data.logits_NV.detach().view(-1)
        floats_NV = flat.view(torch.float32).view(num_tokens, -1)
        integers = flat[: flat.numel() // 8 * 8].view(torch.int64)
        self.steps = {
            "sum of rows": lambda: floats_NV.sum(1),
            "sum of int64": lambda: integers.sum(),
            "maximum": lambda: floats_NV.max(),
            "maximum of rows": lambda: floats_NV.amax(1),
        }
        if device == "cpu":
            self.steps["maximum by numpy"] = lambda: floats_NV.numpy().max()

    def prepare(self) -> None:
        """Write the logits anew, as all others do."""
        self._data.prepare()


def group_of_one(device: str) -> dist.ProcessGroup:
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
