"""The bundled recipe does what it is for: its student learns from the teacher."""

import pytest
from support.cli_run import metrics, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_quarter_of_the_recipe_lifts_the_students_accuracy_by_12_points(tmp_path):
    """On one machine it went from 41.6 to 69.1 %, on all 512 prompts."""
    arguments = [
        *("--config", "launch/recipes/chain_sum.toml", f"--output_dir={tmp_path / 'run'}"),
        *("--train_steps=25", "--optimizer.lr_decay_iters=100"),
        *("--eval.max_prompts=256", "--eval.num_samples=0"),
    ]
    train(arguments, world_size=2).expect(0)
    records = metrics(tmp_path / "run")
    before, after = (records[step]["eval/greedy_accuracy"] for step in (0, 25))
    assert after - before >= 0.12, f"{before:.3f} -> {after:.3f}"
