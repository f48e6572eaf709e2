"""How near logits are to their reference, and when `verify --logits` finds them too far."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poweropd_megatron.cli.main import main
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection import logits


def test_the_worst_position_of_all_rows_counts() -> None:
    theirs = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    ours = [theirs[0].clone(), torch.tensor([[4.0, 3.0]])]
    found = logits.compare(ours, theirs)
    assert found.num_tokens == 3
    assert found.largest_difference == 1.0
    assert found.smallest_cosine == pytest.approx(24 / 25)
    assert found.num_same_argmax == 2
    assert found.std == pytest.approx(torch.cat(theirs).std().item())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[list[int]]]]:
    """Return what transformers was asked for; its logits and ours are 0.01 apart."""
    asked: list[tuple[Path, list[list[int]]]] = []

    def of_transformers(folder: Path, rows: Sequence[Tensor]) -> list[Tensor]:
        asked.append((folder, [ids.tolist() for ids in rows]))
        return [torch.ones(len(ids), 24) for ids in rows]

    def of_megatron(_model: Any, _tensors: Any, rows: Sequence[Tensor]) -> list[Tensor]:
        return [torch.ones(len(ids), 24) + 0.01 for ids in rows]

    monkeypatch.setattr(logits, "of_transformers", of_transformers)
    monkeypatch.setattr(logits, "of_megatron", of_megatron)
    return asked


@pytest.fixture
def verify(
    student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that verifies the bundled student's logits."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["verify", str(student_folder), *arguments])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def test_a_difference_beyond_the_tolerance_is_wrong(
    seen: list[Any], verify: Callable[..., tuple[int, str]], student_folder: Path
) -> None:
    code, output = verify("--logits", "--token-ids=1,2,3", "--token-ids=4", "--tolerance=0.02")
    assert (code, seen) == (0, [(student_folder, [[1, 2, 3], [4]])])
    assert "4 tokens, fp32" in output
    code, output = verify("--logits")
    assert code == 2
    assert "logits differ by 1.00e-02, more than 0.001" in output
    assert len(seen[1][1][0]) == 64
    assert max(seen[1][1][0]) < 24


def test_ids_beyond_the_vocabulary_are_refused(
    seen: list[Any], verify: Callable[..., tuple[int, str]]
) -> None:
    code, output = verify("--logits", "--token-ids=1,24")
    assert (code, seen) == (2, [])
    assert "--token-ids: 24 is beyond the vocabulary of 24" in output


def test_a_folder_that_transformers_cannot_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"transformers can't run .*: "):
        logits.of_transformers(tmp_path / "none", [torch.tensor([1])])
