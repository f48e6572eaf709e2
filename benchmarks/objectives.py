"""Time and memory of objectives over the whole vocabulary, beside the sampled power reward.

    python benchmarks/objectives.py [--device cpu|cuda] [--quick] [--json FILE]

A step is what the LM heads do for some tokens, from both models' hidden states to the gradients of
the student's. The sampled one has the teacher's log-probs given, whose own head costs a GEMM
elsewhere: "with scoring" is with that. Each case runs in a process of its own, all take turns, the
best round counts. Peaks are what torch has allocated at once; "grown" is what the process took of
the system, with the libraries' own memory and what the heap didn't give back.
Read the ratios: the milliseconds are this machine's.
"""

from functools import partial

import objective_cases
import torch
from command_line import parse, write
from workers import Measured, measure

V, N, H = 151936, 2048, 1024
SAMPLED, DENSE = "power", "reverse_kl, dense"
GROUPS = (
    (SAMPLED, "power, with scoring", "reverse_kl", "power_exact"),
    ("forward_kl", "topk_reverse_kl", "topk_forward_kl"),
    (DENSE,),
)
"""The cases that take turns: their memory is there at once."""
PAPER = "the paper's whole steps, sampled against all logits kept: -59.2 % time, -23.1 % memory"
TARGETS = {
    "reverse_kl_peak_ratio": 1.25,
    "power_exact_peak_ratio": 1.25,
    "dense_peak_ratio": 0.15,
    "reverse_kl_time_ratio": 2.2,
}
"""The most that each figure of the whole shape should come to on a CPU with AVX-512."""


def main() -> None:
    """Measure, print a table, and write the figures where they are asked for."""
    arguments = parse(__doc__, quick="a small shape: a few seconds", devices=("cpu", "cuda"))
    num_tokens, vocab_size, hidden_size = (512, 8192, 64) if arguments.quick else (N, V, H)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; N {num_tokens}, "
        f"V {vocab_size}, H {hidden_size} of both models, bf16 weights, fp32 logits"
    )
    shape = {
        "num_tokens": num_tokens,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "dtype": "bf16",
        "device": arguments.device,
    }
    steps: dict[str, Measured] = {}
    for names in GROUPS:
        builds = {
            name: partial(objective_cases.ObjectiveStep, objective_cases.LOSSES[name], **shape)
            for name in names
        }
        results = measure(builds, device=arguments.device, rounds=2, with_allocations=True)
        steps |= {name: of_case["step"] for name, of_case in results.items()}
    _print_steps(steps)
    figures = figures_of(steps)
    if arguments.device == "cpu" and not arguments.quick:
        _print_targets(figures)
    write(figures, arguments.json)


def figures_of(steps: dict[str, Measured]) -> dict[str, float]:
    """Return the ratios of time and peak memory to the sampled objective's and the dense one's."""
    sampled, dense = steps[SAMPLED], steps[DENSE]
    figures: dict[str, float] = {}
    for kind in objective_cases.OBJECTIVES:
        figures[f"{kind}_peak_ratio"] = _peak(steps[kind]) / _peak(sampled)
        figures[f"{kind}_time_ratio"] = steps[kind].seconds / sampled.seconds
    largest = max(_peak(steps["reverse_kl"]), _peak(steps["power_exact"]))
    figures["dense_peak_ratio"] = largest / _peak(dense)
    return figures


def _peak(step: Measured) -> int:
    assert step.allocated_bytes
    return step.allocated_bytes


def _print_steps(steps: dict[str, Measured]) -> None:
    sampled, dense = steps[SAMPLED], steps[DENSE]
    print(
        f"  {'':20}{'ms':>9}{'ratio':>8}{'peak MB':>9}{'ratio':>8}{'of dense':>10}{'grown MB':>10}"
    )
    for name, step in steps.items():
        print(
            f"  {name:20}{1e3 * step.seconds:9.1f}{step.seconds / sampled.seconds:8.3f}"
            f"{_peak(step) / 1e6:9.0f}{_peak(step) / _peak(sampled):8.3f}"
            f"{_peak(step) / _peak(dense):10.3f}{step.peak_bytes / 1e6:10.0f}"
        )
    time, memory = sampled.seconds / dense.seconds - 1, _peak(sampled) / _peak(dense) - 1
    print(
        f"  sampled against dense, of heads: {100 * time:.1f} % time, {100 * memory:.1f} % memory"
    )
    print(f"  {PAPER}")


def _print_targets(figures: dict[str, float]) -> None:
    print(f"\n  {'':26}{'figure':>9}   target")
    for name, bound in TARGETS.items():
        is_met = figures[name] <= bound
        print(f"  {name:26}{figures[name]:9.3f}   <= {bound:g}: {'met' if is_met else 'missed'}")


if __name__ == "__main__":
    main()
