"""Which token is scored at each position of a trajectory, for the student and for the teacher.

The one place that decides on masks and on the terminal position; nothing shifts labels elsewhere.
Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poweropd_megatron.config.objective import window_end
from poweropd_megatron.rollout.trajectories import Trajectories


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The token that each model is scored on, and which positions count.

    Shapes: student_BT and teacher_BT int64; mask_BT bool, True at the response tokens in the loss.
    The model's input is the trajectory in any case.
    """

    student_BT: Tensor
    teacher_BT: Tensor
    mask_BT: Tensor

    def part(self, rows: slice) -> "Labels":
        """Return the labels of some of the sequences."""
        return Labels(
            student_BT=self.student_BT[rows],
            teacher_BT=self.teacher_BT[rows],
            mask_BT=self.mask_BT[rows],
        )


def label(
    trajectories: Trajectories,
    terminal: Literal["raw", "mask", "cross_eos", "im_end"],
    *,
    teacher_eos_id: int,
    first_percent: float = 100.0,
    after_tokens: int = 0,
) -> Labels:
    """Return the labels of a batch under a policy for the final EOS of a response.

    raw: the sampled EOS for both. mask: the final EOS is not in the loss; truncated responses keep
    all tokens. cross_eos: the teacher is scored on its own EOS. im_end: both are scored on the
    teacher's EOS, which is then no longer the token that was sampled. Responses that were truncated
    have no final EOS and are left alone.
    Of a response's tokens (its final EOS is one) only the first first_percent, rounded up, and only
    those after the first after_tokens are in the loss.
    Source: PowerOPD, terminal stop policies of the released trainer.
    """
    ids_BT = trajectories.token_ids_BT
    position_T = torch.arange(ids_BT.shape[1])
    is_terminal_BT = trajectories.terminal_mask_BT
    in_response_BT = position_T - trajectories.prompt_lengths_B[:, None]
    end_B = torch.tensor(
        [window_end(length, first_percent) for length in trajectories.response_lengths_B.tolist()]
    )
    is_in_window_BT = (in_response_BT >= after_tokens) & (in_response_BT < end_B[:, None])
    mask_BT = trajectories.response_mask_BT & is_in_window_BT
    with_teacher_eos_BT = torch.where(is_terminal_BT, teacher_eos_id, ids_BT)
    return Labels(
        student_BT=with_teacher_eos_BT if terminal == "im_end" else ids_BT,
        teacher_BT=with_teacher_eos_BT if terminal in ("cross_eos", "im_end") else ids_BT,
        mask_BT=mask_BT & ~is_terminal_BT if terminal == "mask" else mask_BT,
    )


def drawn(trajectories: Trajectories, labels: Labels) -> Tensor:
    """Return True, [B, T], where the token in the loss is the one that was drawn.

    It isn't where terminal = "im_end" put the teacher's EOS.
    """
    return labels.mask_BT & (labels.student_BT == trajectories.token_ids_BT)
