"""A comparison's recipe, and runs of it that were never trained."""

import json
from pathlib import Path

import tomli_w

from poweropd_megatron.comparison.plan import PlannedRun, planned_runs
from poweropd_megatron.comparison.recipe import Recipe, parse_recipe
from poweropd_megatron.config.load import to_toml

METHODS = {
    "log_ratio": {"objective": {"kind": "log_ratio"}},
    "power_1": {"objective": {"kind": "power", "alpha": 1.0}},
}


def write_recipe(path: Path, **changes: object) -> Path:
    """Write a recipe of two methods and two seeds, with these values at its top."""
    recipe = {
        "output_dir": str(path.parent / "compared"),
        "seeds": [1, 2],
        "jobs": 2,
        "thresholds": [0.5, 0.9],
        "train": {
            "train_steps": 4,
            "global_batch_size": 8,
            "student": {"path": "examples/chain_sum/student", "dtype": "fp32"},
            "teacher": {"path": "examples/chain_sum/teacher", "dtype": "fp32"},
            "rollout": {"max_new_tokens": 64},
            "objective": {"terminal": "raw"},
            "data": {
                "train_files": ["examples/chain_sum/train.jsonl"],
                "eval_files": ["examples/chain_sum/eval.jsonl"],
                "max_prompt_length": 16,
            },
            "eval": {"num_samples": 2, "max_new_tokens": 64},
        },
        "methods": METHODS,
    }
    path.write_text(tomli_w.dumps(recipe | changes))
    return path


def read_recipe(folder: Path, *arguments: str, **changes: object) -> Recipe:
    """Return the recipe that write_recipe writes into a folder, with a command line's changes."""
    path = write_recipe(folder / "recipe.toml", **changes)
    return parse_recipe(["--config", str(path), *arguments])


def records(*accuracies: float, norm: float = 1.0) -> list[dict[str, float]]:
    """Return a line of metrics.jsonl for each step, evaluated at every one; the first is step 0."""
    lines = []
    for step, accuracy in enumerate(accuracies):
        line = {"step": step, "eval/greedy_accuracy": accuracy, "eval/avg@2": accuracy / 2}
        line |= {"eval/response_length": 30.0, "eval/eos_rate": 1.0}
        if step:
            line |= {
                "grad_norm": norm * step,
                "grad_norm_per_reward": 3.0,
                "reward/min": -norm,
                "reward/max": 0.5,
                "kl/student_teacher": 0.1 / step,
                "entropy": 0.2,
                "response_length/mean": 31.0,
                "rollout/eos_rate": 1 - 0.1 / step,
                "memory/peak_bytes": 2**30,
                "tokens_per_second": 500.0,
                "time/rollout_seconds": 0.5,
                "time/teacher_seconds": 0.2,
                "time/student_seconds": 0.3,
                "time/eval_seconds": 9.0,
            }
        lines.append(line)
    return lines


def finish(run: PlannedRun, lines: list[dict[str, float]]) -> None:
    """Write what a finished run leaves, but for its checkpoints and the models in its export."""
    (run.folder / "export").mkdir(parents=True)
    (run.folder / "config.toml").write_text(to_toml(run.config))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "summary.json").write_text(json.dumps({"steps": run.config.train_steps}))


def finish_all(recipe: Recipe) -> list[PlannedRun]:
    """Return a comparison's runs, finished: those of log_ratio get worse, the others better."""
    runs = planned_runs(recipe)
    for run in runs:
        gain = 0.01 * run.seed
        worse, better = (0.4, 0.3 + gain, 0.2, 0.2, 0.3), (0.4, 0.6, 0.7 + gain, 0.9, 0.8)
        is_worse = run.method == "log_ratio"
        finish(run, records(*(worse if is_worse else better), norm=20.0 if is_worse else 0.5))
    return runs
