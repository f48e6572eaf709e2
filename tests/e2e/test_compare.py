"""`poweropd compare` on the bundled recipe: every method trains; a killed comparison goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.cli_run import REPO, fork, steps_recorded

from poweropd_megatron.cli.main import main
from poweropd_megatron.comparison import command
from poweropd_megatron.comparison.recipe import parse_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = "launch/recipes/chain_sum_compare.toml"
TINY = (
    *("--train.global_batch_size=8", "--train.micro_batch_size=4", "--train.eval.max_prompts=4"),
    *("--train.eval.num_samples=2", "--train.optimizer.lr_warmup_iters=1"),
)


class ForkedProcess:
    """A run that was forked with everything imported, as the pool wants it."""

    def __init__(self, run):
        run.log_path.parent.joinpath("logs").mkdir(exist_ok=True)
        (self._rank,) = fork(
            _train, str(run.config_path), world_size=1, logs=run.log_path.parent / "logs"
        )
        run.log_path.symlink_to("logs/0.err")
        self.pid = self._rank.pid

    def poll(self):
        return self._rank.exitcode


def _train(config_path):
    sys.exit(main(["train", "--config", config_path]))


def test_the_quick_comparison_trains_every_method_and_tells_of_it(tmp_path, capsys):
    few = ("--train.train_steps=2", "--train.eval.interval=1")
    recipe = parse_recipe(["--config", RECIPE, "--quick", f"--output_dir={tmp_path}", *TINY, *few])
    started = []

    def start(run, _):
        started.append(run.name)
        return ForkedProcess(run)

    assert command.compare(recipe, start=start) == 0, capsys.readouterr().out
    told = json.loads((tmp_path / "results.json").read_text())
    assert list(told["methods"]) == list(recipe.methods)
    assert len(recipe.methods) == 9
    for method in told["methods"].values():
        (run,) = method["runs"]
        values = run["statistics"]
        assert values["grad_norm_median"] > 0
        assert values["seconds_per_step"] > 0
        assert 0 <= values["accuracy_final"] <= values["accuracy_best"] <= 1
        assert (
            values["accuracy_start"]
            == told["methods"]["power_1"]["runs"][0]["statistics"]["accuracy_start"]
        )
    markdown = (tmp_path / "table.md").read_text()
    assert all(markdown.count(f"| {name} | ") == 5 for name in recipe.methods)
    assert (tmp_path / "comparison.html").read_text().count("<svg") == 9

    capsys.readouterr()
    assert command.compare(recipe, start=start) == 0
    assert len(started) == len(recipe.methods)
    assert f"finished before: {len(started)};" in capsys.readouterr().out


def test_an_interrupted_comparison_ends_its_run_which_resumes_from_its_checkpoint(tmp_path):
    arguments = [
        *("--config", RECIPE, f"--output_dir={tmp_path}", "--quick", "--methods=power_1", *TINY),
        *("--train.train_steps=20", "--train.eval.interval=0", "--train.checkpoint.interval=3"),
    ]
    folder = tmp_path / "runs" / "power_1" / "seed_1"
    comparison = _start(arguments)
    try:
        _wait(lambda: any(folder.glob("checkpoints/step_*")), comparison)
        comparison.send_signal(signal.SIGTERM)
        _, errors = comparison.communicate(timeout=100)
    finally:
        comparison.kill()
    assert comparison.returncode == 128 + signal.SIGTERM
    assert errors == "poweropd: interrupted by SIGTERM; run the same command again\n"
    done = steps_recorded(folder)[-1]
    assert done < 20

    again = _start(arguments)
    output, errors = again.communicate(timeout=200)
    assert (again.returncode, errors) == (0, "")
    assert "runs: 1 (1 methods x 1 seeds), finished before: 0;" in output
    assert "power_1 seed 1 finished in" in output
    assert "going on after step" in (folder / "train.log").read_text()
    assert steps_recorded(folder) == list(range(21))


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "poweropd_megatron.cli.main", "compare", *arguments],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
