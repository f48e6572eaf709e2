"""The tables of README.md list the rows that are tested: each one, and no other."""

import re
from pathlib import Path

import dense_rows
import expert_rows
import pytest
import test_layouts
from layout_rows import Case

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text()


def table_of(file: str) -> dict[str, list[str]]:
    """Return the other cells of each row in the table of a file, by the row's name."""
    _, _, after = README.partition(f": `{file}`\n")
    section = re.split("\n##+ ", after)[0]
    _, _, table = section.partition("| row | ")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 2}


@pytest.mark.parametrize(
    ("file", "cases"),
    [("dense_rows.py", dense_rows.CASES), ("expert_rows.py", expert_rows.CASES)],
)
def test_a_table_lists_the_rows_that_are_tested_and_their_ranks(
    file: str, cases: list[Case]
) -> None:
    listed = {name: cells[0] for name, cells in table_of(file).items()}
    assert listed == {case.row.name: str(case.row.world_size) for case in cases}


def test_the_table_says_which_rows_are_tested_with_tied_embeddings() -> None:
    tested: dict[str, list[str]] = {}
    for case in dense_rows.CASES:
        assert case.student == case.teacher
        tested.setdefault(case.row.name, []).append(case.student)
    listed = {name: cells[-1] for name, cells in table_of("dense_rows.py").items()}
    assert listed == {name: ", ".join(kinds) for name, kinds in tested.items()}


def test_the_table_of_experts_says_which_models_are_dense() -> None:
    listed = {
        name: tuple(cell.startswith("dense") for cell in cells[1:])
        for name, cells in table_of("expert_rows.py").items()
    }
    assert listed == {
        case.row.name: (case.student == "tied", case.teacher == "tied")
        for case in expert_rows.CASES
    }


def test_each_test_of_a_row_has_a_name_of_its_own() -> None:
    names = [case.name for case in test_layouts.CASES]
    assert test_layouts.CASES == dense_rows.CASES + expert_rows.CASES
    assert len(set(names)) == len(names)


def test_every_file_of_tests_is_named() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", README))
    assert {file.name for file in FOLDER.glob("test_*.py")} == named
