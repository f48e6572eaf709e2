"""Which token is scored at each position of a trajectory, for the student and for the teacher.

The one place that decides on masks and on the terminal position; nothing shifts labels elsewhere.
Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poweropd_megatron.rollout.trajectories import FINISH_STOP, Trajectories


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The token that each model is scored on, and which positions count.

    Shapes: student_BT and teacher_BT int64; mask_BT bool, True at the response tokens in the loss.
    The model's input is the trajectory in any case.
    """

    student_BT: Tensor
    teacher_BT: Tensor
    mask_BT: Tensor


def label(
    trajectories: Trajectories,
    terminal: Literal["raw", "mask", "cross_eos", "im_end"],
    *,
    teacher_eos_id: int,
) -> Labels:
    """Return the labels of a batch under a policy for the final EOS of a response.

    raw: the sampled EOS for both. mask: the final EOS is not in the loss; truncated responses keep
    all tokens. cross_eos: the teacher is scored on its own EOS. im_end: both are scored on the
    teacher's EOS, which is then no longer the token that was sampled. Responses that were truncated
    have no final EOS and are left alone.
    Source: PowerOPD, terminal stop policies of the released trainer.
    """
    ids_BT = trajectories.token_ids_BT
    position_T = torch.arange(ids_BT.shape[1])
    is_last_BT = position_T == (trajectories.total_lengths_B - 1)[:, None]
    is_terminal_BT = is_last_BT & (trajectories.finish_B == FINISH_STOP)[:, None]
    mask_BT = trajectories.response_mask_BT
    with_teacher_eos_BT = torch.where(is_terminal_BT, teacher_eos_id, ids_BT)
    return Labels(
        student_BT=with_teacher_eos_BT if terminal == "im_end" else ids_BT,
        teacher_BT=with_teacher_eos_BT if terminal in ("cross_eos", "im_end") else ids_BT,
        mask_BT=mask_BT & ~is_terminal_BT if terminal == "mask" else mask_BT,
    )
