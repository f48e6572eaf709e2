"""Trajectories: prompts and the student's responses, as tensors that every rank holds.

Shapes: B sequences, T tokens of the longest sequence (prompt and response), right-padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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

    @classmethod
    def joined(cls, parts: Sequence["Trajectories"]) -> "Trajectories":
        """Return the sequences of several rollouts with the same weights, one after the other."""
        width = max(part.token_ids_BT.shape[1] for part in parts)

        def stacked(field: str) -> Tensor:
            tensors = [getattr(part, field) for part in parts]
            return torch.cat(
                [
                    torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
                    if tensor.dim() == 2
                    else tensor
                    for tensor in tensors
                ]
            )

        return cls(
            token_ids_BT=stacked("token_ids_BT"),
            prompt_lengths_B=stacked("prompt_lengths_B"),
            total_lengths_B=stacked("total_lengths_B"),
            finish_B=stacked("finish_B"),
            behaviour_logp_BT=stacked("behaviour_logp_BT"),
            truncated_mass_BT=stacked("truncated_mass_BT"),
            weight_version=parts[0].weight_version,
        )

    def part(self, rows: slice) -> "Trajectories":
        """Return some of the sequences, as wide as all."""
        tensors = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if field.name != "weight_version"
        }
        return Trajectories(**tensors, weight_version=self.weight_version)

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

    @property
    def terminal_mask_BT(self) -> Tensor:
        """Return True at the EOS of each response that ended by itself."""
        position_T = torch.arange(self.token_ids_BT.shape[1])
        is_last_BT = position_T == (self.total_lengths_B - 1)[:, None]
        return is_last_BT & (self.finish_B == FINISH_STOP)[:, None]

    def response_ids(self, index: int) -> list[int]:
        """Return the token ids of one response, its EOS included."""
        start, end = int(self.prompt_lengths_B[index]), int(self.total_lengths_B[index])
        ids: list[int] = self.token_ids_BT[index, start:end].tolist()
        return ids
