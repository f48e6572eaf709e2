"""The responses of one rank's prompts as they grow, and the trajectories that all make.

Shapes: B sequences, R tokens of the longest response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import share_rows
from poweropd_megatron.rollout.trajectories import FINISH_LENGTH, Trajectories


@dataclass(kw_only=True)
class Responses:
    """The responses of this rank's rows, as they grow: [rows, max_new_tokens]."""

    token_ids: Tensor
    logp: Tensor
    truncated_mass: Tensor
    lengths: Tensor
    finish: Tensor

    @classmethod
    def empty(cls, rows: int, max_new_tokens: int) -> "Responses":
        """Return room for the responses of this many rows."""
        return cls(
            token_ids=torch.zeros(rows, max_new_tokens, dtype=torch.int64),
            logp=torch.zeros(rows, max_new_tokens),
            truncated_mass=torch.zeros(rows, max_new_tokens),
            lengths=torch.zeros(rows, dtype=torch.int64),
            finish=torch.full((rows,), FINISH_LENGTH),
        )

    def assemble(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Tensor,
        layout: Layout,
        weight_version: int,
    ) -> Trajectories:
        """Return the trajectories of all prompts, from every model copy's rows.

        Cost: one all_reduce of each field over all ranks.
        """

        def share(part: Tensor) -> Tensor:
            return share_rows(
                part,
                rows,
                (len(prompts), *part.shape[1:]),
                speaks=layout.speaks_for_model,
                device=layout.device,
            )

        lengths_B = share(self.lengths)
        longest = int(lengths_B.max())
        prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        total_lengths_B = prompt_lengths_B + lengths_B
        shape = (len(prompts), int(total_lengths_B.max()))
        token_ids_BT = torch.zeros(shape, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        in_response_BR = torch.arange(longest) < lengths_B[:, None]
        position_BR = prompt_lengths_B[:, None] + torch.arange(longest)
        row_BR = torch.arange(len(prompts))[:, None].expand_as(position_BR)
        at = (row_BR[in_response_BR], position_BR[in_response_BR])

        def place(whole: Tensor, own_responses: Tensor) -> Tensor:
            whole[at] = share(own_responses[:, :longest])[in_response_BR]
            return whole

        return Trajectories(
            token_ids_BT=place(token_ids_BT, self.token_ids),
            prompt_lengths_B=prompt_lengths_B,
            total_lengths_B=total_lengths_B,
            finish_B=share(self.finish),
            behaviour_logp_BT=place(torch.zeros(shape), self.logp),
            truncated_mass_BT=place(torch.zeros(shape), self.truncated_mass),
            weight_version=weight_version,
        )
