import pytest

from poweropd_megatron.telemetry.text import (
    evaluation_measures,
    format_change,
    format_duration,
    format_measure,
    format_number,
    ordered_measures,
)


def test_measures_are_grouped_by_file():
    record = {"step": 3, "loss": 1.0, "eval/avg@8": 0.5, "eval/math500/avg@8": 0.4, "evaluate": 1}
    assert evaluation_measures(record) == {"": {"avg@8": 0.5}, "math500": {"avg@8": 0.4}}
    assert evaluation_measures({"step": 3, "loss": 1.0}) == {}


def test_measures_have_one_order_and_errors_are_not_measures():
    names = ["eos_rate", "pass@8", "avg@8_se", "avg@8", "response_length", "greedy_accuracy", "x"]
    expected = ["greedy_accuracy", "avg@8", "pass@8", "response_length", "eos_rate"]
    assert ordered_measures(names) == expected


@pytest.mark.parametrize(
    ("measures", "name", "text"),
    [
        ({"avg@8": 0.4567, "avg@8_se": 0.0123}, "avg@8", "45.7 % ± 1.2"),
        ({"avg@8": 0.4567}, "avg@8", "45.7 %"),
        ({"avg@8": None}, "avg@8", "-"),
        ({}, "avg@8", "-"),
        ({"response_length": 1234.56}, "response_length", "1,234.6"),
    ],
)
def test_a_measure_is_worded_in_its_unit(measures, name, text):
    assert format_measure(measures, name) == text


def test_a_change_is_in_points_or_tokens():
    assert format_change(0.41, 0.84, "greedy_accuracy") == "+43.0"
    assert format_change(2000.0, 900.5, "response_length") == "-1,099.5"
    assert format_change(None, 0.5, "avg@8") == "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"),
     (3600, "1 h 0 min"), (100_000, "27 h 46 min")],
)  # fmt: skip
def test_a_duration_has_two_units(seconds, text):
    assert format_duration(seconds) == text


def test_a_number_has_four_digits_or_separators():
    numbers = [None, 0.0, 0.000123456, -3.14159, 999.94, 61_000_000_000]
    assert [format_number(number) for number in numbers] == [
        "-", "0", "0.0001235", "-3.142", "999.9", "61,000,000,000",
    ]  # fmt: skip
