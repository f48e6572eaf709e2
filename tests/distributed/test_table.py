"""The tables of README.md list the rows that are tested: each one, and no other."""

import re
from pathlib import Path

import pytest
import test_expert_layouts
import test_layouts
from training import Row

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text()


def table_of(file: str) -> dict[str, list[str]]:
    """Return the other cells of each row in the table of a file, by the row's name."""
    _, _, after = README.partition(f": `{file}`\n")
    section = after.partition("\n## ")[0]
    _, _, table = section.partition("| row | ")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 2}


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("test_layouts.py", [row for row, _ in test_layouts.CASES]),
        ("test_expert_layouts.py", [row for row, _ in test_expert_layouts.CASES]),
    ],
)
def test_a_table_lists_the_rows_that_are_tested_and_their_ranks(file: str, rows: list[Row]) -> None:
    listed = {name: cells[0] for name, cells in table_of(file).items()}
    assert listed == {row.name: str(row.world_size) for row in rows}


def test_the_table_says_which_rows_are_tested_with_tied_embeddings() -> None:
    tied = {row.name for row, embeddings in test_layouts.CASES if embeddings == "tied"}
    listed = {name: cells[-1] for name, cells in table_of("test_layouts.py").items()}
    assert listed == {name: "tied, untied" if name in tied else "untied" for name in listed}


def test_every_file_of_tests_is_named() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", README))
    assert {file.name for file in FOLDER.glob("test_*.py")} == named
