import json
import math

import pytest
import torch

from poweropd_megatron.errors import InputError
from poweropd_megatron.telemetry.sinks import (
    JsonlSink,
    read_jsonl,
    replace_text,
    write_json_atomically,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_record_is_on_disk_when_write_returns(path):
    sink = JsonlSink(path)
    sink.write({"step": 1, "loss": 0.5, "text": "é\n\r\u2028"})
    sink.write({"step": 2, "nested": {"list": [1, None, (2.5,)]}})
    assert path.read_bytes().count(b"\n") == 2
    assert read_jsonl(path) == [
        {"step": 1, "loss": 0.5, "text": "é\n\r\u2028"},
        {"step": 2, "nested": {"list": [1, None, [2.5]]}},
    ]


def test_numbers_that_json_lacks_become_null(path):
    JsonlSink(path).write({"step": 1, "a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}})
    assert path.read_text() == '{"step": 1, "a": null, "b": [null, 1.0], "c": {"d": null}}\n'


def test_a_tensor_is_refused_and_leaves_no_half_line(path):
    with pytest.raises(TypeError):
        JsonlSink(path).write({"step": 1, "loss": torch.tensor(1.0)})
    assert not path.exists()


def test_truncation_drops_later_steps_only(path):
    sink = JsonlSink(path)
    for step in (0, 1, 2, 2, 3, 4):
        sink.write({"step": step})
    sink.truncate_after(2)
    sink.write({"step": 3, "again": True})
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2, 2, 3]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_torn_anywhere_is_dropped(path, cut):
    line = '{"step": 1, "text": "é"}\n'.encode()
    path.write_bytes(b'{"step": 0}\n' + line[:-cut])
    assert read_jsonl(path) == [{"step": 0}]
    sink = JsonlSink(path)
    sink.truncate_after(5)
    sink.write({"step": 1})
    assert read_jsonl(path) == [{"step": 0}, {"step": 1}]


def test_truncating_a_file_that_does_not_exist_is_fine(path):
    JsonlSink(path).truncate_after(3)
    assert not path.exists()


def test_a_broken_line_in_the_middle_is_named(path):
    path.write_text('{"step": 0}\n{"st{"step": 1}\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        JsonlSink(path).truncate_after(5)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": "1"}', '{"step": true}', "[1]", "1"])
def test_a_line_that_is_no_record_of_a_run_is_named(path, line):
    path.write_text(f'{{"step": 0}}\n{line}\n')
    for read in (read_jsonl, lambda path: JsonlSink(path).truncate_after(5)):
        with pytest.raises(InputError, match=r'metrics\.jsonl, line 2: .* integer "step"'):
            read(path)
    assert path.read_text().count("\n") == 2


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": 1, "longer": "x" * 100})
    write_json_atomically(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": None}
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_text_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "report.html", "\ud800")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
