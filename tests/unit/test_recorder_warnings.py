"""What a run warns of at its start: responses that are not the student's as it is scored."""

from types import SimpleNamespace
from typing import Any

import pytest
from test_config_rules import config_with

from poweropd_megatron.train.recorder import Recorder


def warnings_of(tmp_path: Any, **changes: object) -> str:
    recorder = Recorder(config_with(output_dir=str(tmp_path), **changes), is_first_rank=False)
    said: list[str] = []
    recorder.warning = said.append  # type: ignore[method-assign]
    shape = SimpleNamespace(num_layers=1, hidden_size=8, experts=None)
    recorder.introduce(
        SimpleNamespace(student=shape, teacher=shape, train_prompts=[], eval_prompts={})
    )
    return "\n".join(said)


def test_a_run_on_its_own_responses_warns_of_nothing(tmp_path):
    assert warnings_of(tmp_path) == ""
    assert warnings_of(tmp_path, mini_batch_size=12) == ""


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_stale_or_foreign_responses_are_told_of_with_what_weighs_them(tmp_path, level):
    weighs = "objective.importance_ratio"
    stale = warnings_of(tmp_path, mini_batch_size=4)
    assert "all but the first of the mini-batches of 4 responses" in stale
    assert weighs in stale
    assert warnings_of(tmp_path, mini_batch_size=4, objective__importance_ratio=level) == ""
    foreign = {"rollout__temperature": 0.7, "rollout__top_p": 0.9}
    assert "drawn at temperature 0.7, top_p 0.9" in warnings_of(tmp_path, **foreign)
    assert weighs in warnings_of(tmp_path, **foreign)
    weighed = warnings_of(tmp_path, **foreign, objective__importance_ratio=level)
    assert "drawn at temperature 0.7" in weighed
    assert weighs not in weighed


def test_ratios_are_not_advised_where_the_objective_refuses_them(tmp_path):
    said = warnings_of(
        tmp_path, objective__kind="reverse_kl", mini_batch_size=4, rollout__temperature=0.7
    )
    assert "all but the first of the mini-batches of 4 responses" in said
    assert "drawn at temperature 0.7" in said
    assert "importance_ratio" not in said
