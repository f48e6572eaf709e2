"""poweropd convert's command line: what is malformed, and what an error looks like."""

import re

import pytest

from poweropd_megatron.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-hf", "--max-shard-size", "5XB"], "is no size above 0 such as 5GB"),
        (["to-hf", "--max-shard-size", "0GB"], "is no size above 0 such as 5GB"),
        (["to-megatron", "--workers", "0"], "is no number of processes above 0"),
        (["to-megatron", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["to-megatron"], "the following arguments are required: --input, --output"),
        ([], "the following arguments are required: DIRECTION"),
    ],
)
def test_a_malformed_command_line_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", *arguments])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    arguments = ["--input", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    assert main(["convert", "to-megatron", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("poweropd: error: --input: ")
    assert captured.err.count("\n") == 1
