"""Views of trajectories, on rows made by hand."""

import torch
from support.made_trajectories import make

ROWS = [([5, 6, 7], [8, 1]), ([5], [9, 9, 9, 9]), ([5, 6], [1])]


def test_the_response_is_what_comes_after_the_prompt_and_before_the_padding() -> None:
    trajectories = make(ROWS, eos=1)
    assert trajectories.num_sequences == 3
    assert trajectories.response_lengths_B.tolist() == [2, 4, 1]
    assert trajectories.response_mask_BT.int().tolist() == [
        [0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1],
        [0, 0, 1, 0, 0],
    ]
    assert [trajectories.response_ids(row) for row in range(3)] == [r for _, r in ROWS]


def test_the_mask_selects_the_response_tokens_in_order() -> None:
    trajectories = make(ROWS, eos=1)
    selected = trajectories.token_ids_BT[trajectories.response_mask_BT]
    assert torch.equal(selected, torch.tensor([8, 1, 9, 9, 9, 9, 1]))
