"""What each terminal policy scores, position by position, on rows made by hand."""

import pytest
import torch
from support.made_trajectories import make

from poweropd_megatron.objectives.labels import label
from poweropd_megatron.rollout.trajectories import Trajectories

EOS, TEACHER_EOS = 1, 2


@pytest.fixture
def trajectories() -> Trajectories:
    """Return a stopped row, a truncated one, and one that stopped at once; its prompt has EOS."""
    return make([([5, 6], [7, 8, EOS]), ([9], [3, 4]), ([EOS, 5, TEACHER_EOS], [EOS])], eos=EOS)


SAMPLED = [[5, 6, 7, 8, 1], [9, 3, 4, 0, 0], [1, 5, 2, 1, 0]]
TAUGHT = [[5, 6, 7, 8, 2], [9, 3, 4, 0, 0], [1, 5, 2, 2, 0]]
RESPONSES = [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
BEFORE_EOS = [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("terminal", "student", "teacher", "mask"),
    [
        ("raw", SAMPLED, SAMPLED, RESPONSES),
        ("mask", SAMPLED, SAMPLED, BEFORE_EOS),
        ("cross_eos", SAMPLED, TAUGHT, RESPONSES),
        ("im_end", TAUGHT, TAUGHT, RESPONSES),
    ],
)
def test_each_policy_changes_only_the_final_eos_of_stopped_rows(
    trajectories: Trajectories,
    terminal: str,
    student: list[list[int]],
    teacher: list[list[int]],
    mask: list[list[int]],
) -> None:
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    in_loss = labels.mask_BT
    assert in_loss.int().tolist() == mask
    assert torch.equal(labels.student_BT[in_loss], torch.tensor(student)[in_loss])
    assert torch.equal(labels.teacher_BT[in_loss], torch.tensor(teacher)[in_loss])


@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_prompts_and_padding_are_never_in_the_loss_and_the_input_is_never_changed(
    trajectories: Trajectories, terminal: str
) -> None:
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    assert not labels.mask_BT[~torch.tensor(RESPONSES, dtype=torch.bool)].any()
    assert trajectories.token_ids_BT.tolist() == SAMPLED


def test_another_stop_token_in_the_middle_of_a_truncated_response_is_an_ordinary_token() -> None:
    """A row is stopped by its finish reason, not by what its last token looks like."""
    rows = make([([5], [EOS, 7]), ([5], [7, EOS])], eos=99)
    for terminal in ("raw", "mask", "cross_eos", "im_end"):
        labels = label(rows, terminal, teacher_eos_id=TEACHER_EOS)
        assert labels.mask_BT.int().tolist() == [[0, 1, 1], [0, 1, 1]]
        assert torch.equal(labels.student_BT, rows.token_ids_BT)
        assert torch.equal(labels.teacher_BT, rows.token_ids_BT)


@pytest.mark.parametrize(
    ("first_percent", "after_tokens", "mask"),
    [
        (100.0, 0, [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]),
        (40.0, 0, [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]),
        (41.0, 0, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]),
        (0.001, 0, [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]),
        (100.0, 2, [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]),
        (80.0, 1, [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]),
        (100.0, 9, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_windows_count_from_the_start_of_each_response_and_in_parts_of_its_length(
    terminal: str, first_percent: float, after_tokens: int, mask: list[list[int]]
) -> None:
    """Five tokens of which the last is EOS, EOS alone, three that were cut off."""
    rows = make([([5], [7, 8, 9, 3, EOS]), ([5, 6, 7], [EOS]), ([5, 6], [3, 4, 5])], eos=EOS)
    labels = label(
        rows,
        terminal,
        teacher_eos_id=TEACHER_EOS,
        first_percent=first_percent,
        after_tokens=after_tokens,
    )
    expected = torch.tensor(mask, dtype=torch.bool)
    if terminal == "mask":
        expected[0, 4] = expected[1, 0] = False
    for row, start in enumerate((1, 3, 2)):
        assert not labels.mask_BT[row, :start].any()
        in_response = labels.mask_BT[row, start : start + 5]
        assert torch.equal(in_response, expected[row, : len(in_response)])


@pytest.mark.parametrize(("first_percent", "kept"), [(4.4, 33), (10.8, 81), (4.41, 34)])
def test_percentages_are_those_that_were_written(first_percent: float, kept: int) -> None:
    """In binary fractions 4.4 % of 750 are a little more than 33."""
    rows = make([([5], [7] * 750)], eos=EOS)
    labels = label(rows, "raw", teacher_eos_id=TEACHER_EOS, first_percent=first_percent)
    assert int(labels.mask_BT.sum()) == kept
