"""Objectives over the whole vocabulary: what each adds up of two distributions, and its gradient.

p is the teacher, q the student, z the student's logits. Each works on some rows of a rank's columns
at a time: first the sums of these columns, then, given the sums over all ranks, the gradient.
Shapes: n rows, v columns of the vocabulary on this rank, K sums.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Distributions(NamedTuple):
    """Both models' natural log-probs over some rows and columns, fp32.

    All are finite or NaN: the most negative number stands for -inf, so that 0 log 0 comes out as 0,
    and a token that one model alone excludes as a loss that overflows.
    """

    student_logp_nv: Tensor
    teacher_logp_nv: Tensor
    is_top_nv: Tensor | None = None
    """Which columns are among the most likely ones, for objectives that tell these apart."""


class VocabularyObjective(Protocol):
    """An objective of each token's two distributions."""

    @property
    def top_k(self) -> int | None:
        """Return how many tokens are told apart, or None for all."""
        ...

    @property
    def top_of(self) -> Literal["student", "teacher"]:
        """Return by which model's logits they are chosen."""
        ...

    @property
    def num_logs(self) -> int:
        """Return how many of the sums are logarithms."""
        ...

    def sums(self, pair: Distributions) -> list[Tensor]:
        """Return what this objective adds up over the columns beside KL(q || p), each [n].

        The last num_logs of them are natural logarithms of sums, which would underflow.
        """
        ...

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the loss of each row, [n], from KL(q || p) and the sums over the vocabulary."""
        ...

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:
        """Return the gradient of the loss over the student's logits, [n, v]."""
        ...


def kl_divergence(a_logp_nv: Tensor, b_logp_nv: Tensor) -> Tensor:
    """Return what these columns add to KL(a || b), [n]."""
    return (a_logp_nv - b_logp_nv).mul_(a_logp_nv.exp()).sum(1)


def power_rewards(teacher_logp: Tensor, student_logp: Tensor, *, alpha: float) -> Tensor:
    """Return p**alpha - q**alpha of finite log-probs, in operations that torch vectorizes.

    The form is that of ops.rewards.token_reward, whose kernel takes tokens one by one on a CPU.
    """
    gap = teacher_logp - student_logp
    shrunk = gap.abs().mul_(-alpha).expm1_().neg_()
    size = torch.maximum(teacher_logp, student_logp).mul_(alpha).exp_().mul_(shrunk)
    return size.copysign_(gap)


class _OverAllTokens:
    top_k = None
    num_logs = 0
    top_of: Literal["student", "teacher"] = "student"


@dataclass(frozen=True)
class ReverseKL(_OverAllTokens):
    """KL(q || p) = sum_v q_v (log q_v - log p_v); d/dz_v = q_v (log q_v - log p_v - KL)."""

    def sums(self, pair: Distributions) -> list[Tensor]:  # noqa: ARG002
        """Return nothing: the KL is added up for all objectives."""
        return []

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the KL."""
        return sums_nK[:, 0]

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:
        """Return the gradient, exactly 0 where both distributions are the same bits."""
        gap_nv = pair.student_logp_nv - pair.teacher_logp_nv
        return gap_nv.sub_(sums_nK[:, :1]).mul_(pair.student_logp_nv.exp())


@dataclass(frozen=True)
class PowerExact(_OverAllTokens):
    """The policy gradient of the power reward in expectation over the token: no sampling noise.

    The gradient is - sum_v q_v r_v grad log q_v, r_v = p_v^alpha - q_v^alpha held constant, over
    the logits - q_v (r_v - sum_u q_u r_u). The loss is the sampled one's expectation, - sum_v q_v
    r_v log q_v.
    """

    alpha: float

    def sums(self, pair: Distributions) -> list[Tensor]:
        """Return the expected reward of these columns, and the expected r log q."""
        gains_nv = self._rewards(pair).mul_(pair.student_logp_nv.exp())
        return [gains_nv.sum(1), (gains_nv * pair.student_logp_nv).sum(1)]

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the expected sampled loss."""
        return -sums_nK[:, 2]

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:
        """Return the gradient, exactly 0 where both distributions are the same bits."""
        excess_nv = sums_nK[:, 1:2] - self._rewards(pair)
        return excess_nv.mul_(pair.student_logp_nv.exp())

    def _rewards(self, pair: Distributions) -> Tensor:
        return power_rewards(pair.teacher_logp_nv, pair.student_logp_nv, alpha=self.alpha)


@dataclass(frozen=True)
class ForwardKL(_OverAllTokens):
    """KL(p || q) = sum_v p_v (log p_v - log q_v); d/dz_v = q_v - p_v."""

    def sums(self, pair: Distributions) -> list[Tensor]:
        """Return the KL of these columns."""
        return [kl_divergence(pair.teacher_logp_nv, pair.student_logp_nv)]

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the KL."""
        return sums_nK[:, 1]

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradient."""
        return pair.student_logp_nv.exp() - pair.teacher_logp_nv.exp()


@dataclass(frozen=True)
class TopKReverseKL:
    """KL(q || p) where the student's top k tokens stand for themselves, and one bucket for others.

    With Q and P the bucket's probabilities, sum_top q_v (log q_v - log p_v) + Q (log Q - log P):
    what the bucketed distributions differ by, at most KL(q || p). The student chooses, since its
    probabilities are the weights; which tokens are chosen is held constant.
    """

    top_k: int
    top_of: Literal["student", "teacher"] = "student"
    num_logs = 2

    def sums(self, pair: Distributions) -> list[Tensor]:
        """Return the KL of these columns' top tokens, and both models' log-prob of the bucket."""
        gap_nv = pair.student_logp_nv - pair.teacher_logp_nv
        return _top_sums(pair, pair.student_logp_nv, gap_nv)

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the KL of the bucketed distributions."""
        student_n, teacher_n = sums_nK[:, 2], sums_nK[:, 3]
        return sums_nK[:, 1] + student_n.exp() * (student_n - teacher_n)

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:
        """Return the gradient, q_v (log of the bucket's ratio - KL)."""
        assert pair.is_top_nv is not None
        gap_n1 = sums_nK[:, 2:3] - sums_nK[:, 3:4]
        gap_nv = pair.student_logp_nv - pair.teacher_logp_nv
        gap_nv = torch.where(pair.is_top_nv, gap_nv, gap_n1)
        return gap_nv.sub_(self.loss(sums_nK)[:, None]).mul_(pair.student_logp_nv.exp())


@dataclass(frozen=True)
class TopKForwardKL:
    """KL(p || q) where the teacher's top k tokens stand for themselves, and one bucket for others.

    With P and Q the bucket's probabilities, sum_top p_v (log p_v - log q_v) + P (log P - log Q): at
    most KL(p || q). The teacher chooses, since its probabilities are the weights.
    """

    top_k: int
    top_of: Literal["student", "teacher"] = "teacher"
    num_logs = 2

    def sums(self, pair: Distributions) -> list[Tensor]:
        """Return the KL of these columns' top tokens, and both models' log-prob of the bucket."""
        gap_nv = pair.teacher_logp_nv - pair.student_logp_nv
        return _top_sums(pair, pair.teacher_logp_nv, gap_nv)

    def loss(self, sums_nK: Tensor) -> Tensor:
        """Return the KL of the bucketed distributions."""
        student_n, teacher_n = sums_nK[:, 2], sums_nK[:, 3]
        return sums_nK[:, 1] + teacher_n.exp() * (teacher_n - student_n)

    def gradient(self, pair: Distributions, sums_nK: Tensor) -> Tensor:
        """Return the gradient, q_v - p_v of a top token, q_v (1 - P / Q) of another."""
        assert pair.is_top_nv is not None
        gap_n1 = sums_nK[:, 3:4] - sums_nK[:, 2:3]
        wanted_nv = torch.where(pair.is_top_nv, pair.teacher_logp_nv, pair.student_logp_nv + gap_n1)
        return pair.student_logp_nv.exp().sub_(wanted_nv.exp_())


def _top_sums(pair: Distributions, weight_logp_nv: Tensor, gap_nv: Tensor) -> list[Tensor]:
    """Return the weighted gap over the top tokens, and the log of either model's tail, [n]."""
    assert pair.is_top_nv is not None
    tails = (
        logp_nv.masked_fill(pair.is_top_nv, -torch.inf).logsumexp(1)
        for logp_nv in (pair.student_logp_nv, pair.teacher_logp_nv)
    )
    gains_nv = gap_nv.mul_(weight_logp_nv.exp())
    return [torch.where(pair.is_top_nv, gains_nv, 0.0).sum(1), *tails]
