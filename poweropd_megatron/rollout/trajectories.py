"""Trajectories: prompts and the student's responses, as tensors that every rank holds.

Shapes: B sequences, T tokens of the longest sequence (prompt and response), right-padded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FINISH_LENGTH = 0
"""The response reached max_new_tokens."""
FINISH_STOP = 1
"""The response ended with an EOS token, which is its last token."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The responses of one rollout, on the CPU, identical on every rank.

    Shapes: token_ids_BT int64, right-padded with 0; prompt_lengths_B and total_lengths_B int64
    (tokens); finish_B int64 (FINISH_STOP or FINISH_LENGTH); behaviour_logp_BT fp32, the log-prob of
    token t under the distribution that it was drawn from, 0 on prompts and padding;
    truncated_mass_BT fp32, the probability that top-p and top-k removed at that draw.
    """

    token_ids_BT: Tensor
    prompt_lengths_B: Tensor
    total_lengths_B: Tensor
    finish_B: Tensor
    behaviour_logp_BT: Tensor
    truncated_mass_BT: Tensor
    weight_version: int

    @property
    def num_sequences(self) -> int:
        """Return B."""
        return self.token_ids_BT.shape[0]

    @property
    def response_lengths_B(self) -> Tensor:
        """Return the tokens of each response, its EOS included."""
        return self.total_lengths_B - self.prompt_lengths_B

    @property
    def response_mask_BT(self) -> Tensor:
        """Return True where a token belongs to the response."""
        position_T = torch.arange(self.token_ids_BT.shape[1])
        after_prompt_BT = position_T >= self.prompt_lengths_B[:, None]
        return after_prompt_BT & (position_T < self.total_lengths_B[:, None])

    def response_ids(self, index: int) -> list[int]:
        """Return the token ids of one response, its EOS included."""
        start, end = int(self.prompt_lengths_B[index]), int(self.total_lengths_B[index])
        ids: list[int] = self.token_ids_BT[index, start:end].tolist()
        return ids
