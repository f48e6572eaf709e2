"""Step times of layouts on the chain-sum task, and what rollouts gain by not padding.

    python benchmarks/layouts.py [--quick] [--json FILE]

Each layout runs the recipe's steps on ranks of its own, one thread a rank, over gloo; those with
more ranks than this machine has cores are left out. The fastest of some steps and rounds counts.
Communication is a part of the phases: what the ranks wait in collectives, sends and receives, for
each other too (a pipeline's bubbles and uneven shares), on average. "MoE" is a student with experts
that answers as the dense one does. Read the ratios: the seconds are this machine's, and such a
small model pays more for communication than it gains.
"""

import os

from command_line import parse, write
from layout_cases import (
    EXPERT_STUDENT,
    PHASES,
    Rolled,
    Settings,
    Steps,
    time_rollouts,
    time_steps,
)
from layout_ranks import on_ranks

TENSOR, PIPELINE, VIRTUAL, CONTEXT, EXPERT, SEQUENCE = (
    f"student.parallel.{name}"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "sequence_parallel",
    )
)
EXPERTS = {"student.path": EXPERT_STUDENT}
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "one process": (1, {}),
    "TP2": (2, {TENSOR: 2}),
    "TP2+SP": (2, {TENSOR: 2, SEQUENCE: True}),
    "PP2": (2, {PIPELINE: 2}),
    "PP2xVPP2": (2, {PIPELINE: 2, VIRTUAL: 2}),
    "DP2": (2, {}),
    "CP2": (2, {CONTEXT: 2}),
    "TP2, teacher PP2": (
        2,
        {
            TENSOR: 2,
            "teacher.parallel.tensor_model_parallel_size": 1,
            "teacher.parallel.pipeline_model_parallel_size": 2,
        },
    ),
    "1, teacher on 1 more": (2, {"teacher.num_ranks": 1}),
    "PP4": (4, {PIPELINE: 4}),
    "TP2xPP2": (4, {TENSOR: 2, PIPELINE: 2}),
    "TP2xDP2": (4, {TENSOR: 2}),
    "PP2xDP2": (4, {PIPELINE: 2}),
    "DP4": (4, {}),
    "MoE": (1, EXPERTS),
    "MoE, EP2": (2, EXPERTS | {EXPERT: 2}),
    "MoE, EP2xTP2+SP": (4, EXPERTS | {EXPERT: 2, TENSOR: 2, SEQUENCE: True}),
}
ROLLOUTS = {
    "lock-step": (1, {}, "all rows go on to the longest"),
    "shrinking": (1, {}, "rows leave as they end"),
    "refilling": (1, {}, "waiting prompts take their rows"),
    "PP2, one group": (2, {PIPELINE: 2}, "one stage works at any time"),
    "PP2, two groups": (2, {PIPELINE: 2}, "stages work on groups in turns"),
}


def main() -> None:
    """Measure, print tables, and write the figures where they are asked for."""
    arguments = parse(__doc__, quick="few steps and prompts: a minute")
    figures = measure_steps(num_steps=1 if arguments.quick else 7)
    figures |= (
        measure_rollouts(96, rounds=1) if arguments.quick else measure_rollouts(512, rounds=4)
    )
    write(figures, arguments.json)


def measure_steps(num_steps: int) -> dict[str, float]:
    """Return each layout's seconds, and the padding of the two forms of micro-batches."""
    num_cores = len(os.sched_getaffinity(0))
    fitting = {name: case for name, case in LAYOUTS.items() if case[0] <= num_cores}
    if len(fitting) < len(LAYOUTS):
        left_out = "; ".join(name for name in LAYOUTS if name not in fitting)
        print(f"{num_cores} cores: without {left_out}")
    print(
        f"\nSeconds of a step{'':6}" + "".join(f"{name:>14}" for name in (*PHASES, "communication"))
    )
    figures: dict[str, float] = {}
    for name, (world_size, settings) in fitting.items():
        steps = Steps(**on_ranks(time_steps, settings, num_steps, world_size=world_size))
        seconds = {**steps.seconds, "communication": steps.communication_seconds}
        print(f"  {name:21}" + "".join(f"{seconds[key]:14.3f}" for key in seconds), flush=True)
        figures |= {f"{_key(name)}_{key}_seconds": value for key, value in seconds.items()}
        if name == "one process":
            padding = steps.padding_fractions
    padded, packed = padding["padded"], padding["packed"]
    saved = 1 - (1 - padded) / (1 - packed)
    print(
        f"\nPadding in the student's micro-batches: {padded:.1%} right-padded, {packed:.1%} "
        f"packed; {saved:.1%} of the positions saved"
    )
    return figures | {f"padding_fraction_{form}": value for form, value in padding.items()}


def measure_rollouts(num_prompts: int, rounds: int) -> dict[str, float]:
    """Return what each way to decode takes for a response token."""
    print(
        f"\n{f'{num_prompts} responses of very different length':54}"
        f"{'forwards':>9}{'rows/token':>11}{'us/token':>9}"
    )
    num_cores = len(os.sched_getaffinity(0))
    figures: dict[str, float] = {}
    for name, (world_size, settings, what) in ROLLOUTS.items():
        if world_size > num_cores:
            continue
        rolled = Rolled(
            **on_ranks(time_rollouts, name, settings, num_prompts, rounds, world_size=world_size)
        )
        print(
            f"  {name:16}{what:36}{rolled.num_forwards:9}{rolled.rows_per_token:11.3f}"
            f"{1e6 * rolled.seconds_per_token:9.1f}",
            flush=True,
        )
        figures[f"{_key(name)}_rows_per_token"] = rolled.rows_per_token
        figures[f"{_key(name)}_us_per_token"] = 1e6 * rolled.seconds_per_token
    for gain, (before, after) in {
        "refilling_gain": ("lock-step", "refilling"),
        "refilling_gain_over_shrinking": ("shrinking", "refilling"),
        "groups_gain": ("PP2, one group", "PP2, two groups"),
    }.items():
        if f"{_key(after)}_us_per_token" in figures:
            figures[gain] = (
                figures[f"{_key(before)}_us_per_token"] / figures[f"{_key(after)}_us_per_token"]
            )
    return figures


def _key(name: str) -> str:
    return name.replace(",", "").replace(" ", "_").replace("-", "_")


if __name__ == "__main__":
    main()
