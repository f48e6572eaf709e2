"""Trajectories and labels made by hand."""

from collections.abc import Sequence

import torch

from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.rollout.trajectories import FINISH_LENGTH, FINISH_STOP, Trajectories


def make(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, eos: int) -> Trajectories:
    """Return trajectories of (prompt, response) rows; a response that ends in `eos` has stopped."""
    totals = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    shape = (len(rows), int(totals.max()))
    token_ids_BT = torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, response) in enumerate(rows):
        token_ids_BT[row, : totals[row]] = torch.tensor([*prompt, *response])
    return Trajectories(
        token_ids_BT=token_ids_BT,
        prompt_lengths_B=torch.tensor([len(prompt) for prompt, _ in rows]),
        total_lengths_B=totals,
        finish_B=torch.tensor(
            [FINISH_STOP if response[-1] == eos else FINISH_LENGTH for _, response in rows]
        ),
        behaviour_logp_BT=torch.zeros(shape),
        truncated_mass_BT=torch.zeros(shape),
        weight_version=0,
    )


def random(num_sequences: int, *, vocab_size: int, eos: int, seed: int = 0) -> Trajectories:
    """Return ragged trajectories; every second one has stopped, one has a response of only EOS."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (1,), generator=generator))
        drawn = torch.randint(eos + 1, vocab_size, (count,), generator=generator)
        return drawn.tolist()

    rows = []
    for number in range(num_sequences):
        response = [] if number == 2 else tokens(1, 12)
        rows.append((tokens(1, 8), [*response, eos] if number % 2 == 0 else response))
    return make(rows, eos=eos)


def same_labels(trajectories: Trajectories) -> Labels:
    """Return labels with every response token in the loss, as it was sampled."""
    ids_BT = trajectories.token_ids_BT
    return Labels(student_BT=ids_BT, teacher_BT=ids_BT, mask_BT=trajectories.response_mask_BT)
