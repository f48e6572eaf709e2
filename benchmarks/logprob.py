"""Time and memory of log-probs, and of the LM head that is fused with them, beside other ways.

    python benchmarks/logprob.py [--device cpu|cuda] [--quick] [--json FILE]

Each case runs in a process of its own; all take turns in each round, and the best of the rounds
counts, so that what disturbs the machine for a while disturbs all of them. Read the ratios: the
milliseconds are this machine's.
"""

import os
import platform
import sys
from functools import partial
from pathlib import Path

import head_cases
import logprob_cases
import torch
from command_line import parse, write
from workers import Measured, measure

from poweropd_megatron.ops.backends import compiled
from poweropd_megatron.ops.compiled_rows import CompiledRows

Results = dict[str, dict[str, Measured]]

LOGPROBS = {
    "row kernels": partial(logprob_cases.Kernels, False),
    "row kernels, entropy too": partial(logprob_cases.Kernels, True),
    "vocab_parallel_logprob": partial(logprob_cases.Differentiable, logprob_cases.op),
    "torch.compile": partial(logprob_cases.Differentiable, logprob_cases.compiled),
    "torch log_softmax": partial(logprob_cases.Differentiable, logprob_cases.log_softmax),
    "megatron.core": partial(logprob_cases.Differentiable, logprob_cases.megatron),
    "megatron.core fused": partial(logprob_cases.Differentiable, logprob_cases.megatron_fused),
    "plain read": logprob_cases.PlainRead,
}
HEADS = {
    "fused": partial(head_cases.HeadStep, head_cases.fused),
    "recompute": partial(head_cases.HeadStep, head_cases.recomputed),
    "materialized": partial(head_cases.HeadStep, head_cases.materialized),
}
V = 151936
LOGPROB_TOKENS = {"cpu": 1024, "cuda": 8192}
HEAD_TOKENS = {"cpu": 4096, "cuda": 16384}
TARGETS = {
    "fwd_vs_compile": (">=", 3.0),
    "fwd_vs_compile_fp32": (">=", 3.0),
    "fwdbwd_vs_compile": (">=", 8.0),
    "fwdbwd_vs_compile_fp32": (">=", 8.0),
    "fwdbwd_vs_mcore_fused": (">=", 8.0),
    "fwdbwd_vs_mcore_fused_fp32": (">=", 8.0),
    "fp32_read_fraction": (">=", 0.8),
    "extra_bytes_per_token": ("<=", 64.0),
    "fused_head_peak_ratio": ("<=", 0.1),
    "fused_head_time_ratio": ("<=", 1.1),
}
"""What each figure of the whole shapes should come to on a CPU with AVX-512."""


def main() -> None:
    """Measure, print tables, and write the figures where they are asked for."""
    arguments = parse(
        __doc__, quick="small shapes and few rounds: half a minute", devices=("cpu", "cuda")
    )
    device = arguments.device
    kernels = compiled(device)
    if isinstance(kernels, str):
        sys.exit(f"the compiled kernels can't be loaded: {kernels}")
    print(f"{_describe(device, kernels)}, torch {torch.__version__}")
    figures = measure_logprobs(device, arguments.quick) | measure_heads(device, arguments.quick)
    if device == "cpu" and not arguments.quick:
        _print_targets(figures)
    write(figures, arguments.json)


def measure_logprobs(device: str, quick: bool) -> dict[str, float]:
    """Return the figures of log-probs from logits that are there already."""
    num_tokens, vocab_size, rounds = (128, 32000, 3) if quick else (LOGPROB_TOKENS[device], V, 6)
    figures: dict[str, float] = {}
    for dtype, suffix in (("bf16", ""), ("fp32", "_fp32")):
        print(f"\nlog-probs: N {num_tokens}, V {vocab_size}, {dtype} logits")
        shape = {"num_tokens": num_tokens, "vocab_size": vocab_size, "dtype": dtype}
        builds = {name: partial(case, **shape, device=device) for name, case in LOGPROBS.items()}
        results = measure(builds, device=device, rounds=rounds, with_allocations=True)
        num_bytes = num_tokens * vocab_size * logprob_cases.DTYPES[dtype].itemsize
        read = min(step.seconds for step in results.pop("plain read").values())
        _print_logprobs(results, read, num_bytes, num_tokens)
        ours, op = results["row kernels"], results["vocab_parallel_logprob"]
        for name, step in (("fwd", "forward"), ("fwdbwd", "both")):
            for label, other in (
                ("compile", "torch.compile"),
                ("log_softmax", "torch log_softmax"),
                ("mcore", "megatron.core"),
                ("mcore_fused", "megatron.core fused"),
            ):
                seconds = results[other][step].seconds
                figures[f"{name}_vs_{label}{suffix}"] = seconds / ours[step].seconds
                figures[f"{name}_with_entropy_vs_{label}{suffix}"] = seconds / op[step].seconds
        figures[f"{dtype}_read_fraction"] = read / ours["forward"].seconds
        extra = max((op[step].allocated_bytes or 0) / num_tokens for step in op)
        figures["extra_bytes_per_token"] = max(figures.get("extra_bytes_per_token", 0.0), extra)
    return figures


def measure_heads(device: str, quick: bool) -> dict[str, float]:
    """Return the figures of one policy-gradient step from hidden states."""
    num_tokens, vocab_size = (512, 8192) if quick else (HEAD_TOKENS[device], V)
    figures: dict[str, float] = {}
    for dtype in ("fp32", "bf16"):
        for hidden_size in (64,) if quick else (1024, 2048):
            print(
                f"\nLM head: N {num_tokens}, V {vocab_size}, H {hidden_size}, {dtype} weights, "
                "fp32 logits"
            )
            shape = {
                "num_tokens": num_tokens,
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "dtype": dtype,
                "device": device,
            }
            builds = {name: partial(case, **shape) for name, case in HEADS.items()}
            results = measure(builds, device=device, rounds=2, with_allocations=False)
            steps = {name: steps["step"] for name, steps in results.items()}
            whole = steps["materialized"]
            print(f"  {'':24}{'ms':>9}{'ratio':>8}{'peak MB':>9}{'ratio':>8}")
            for name, step in steps.items():
                time_ratio = step.seconds / whole.seconds
                peak_ratio = step.peak_bytes / whole.peak_bytes
                print(
                    f"  {name:24}{1e3 * step.seconds:9.1f}{time_ratio:8.3f}"
                    f"{step.peak_bytes / 1e6:9.0f}{peak_ratio:8.3f}"
                )
                if name != "materialized":
                    for figure, ratio in (("peak", peak_ratio), ("time", time_ratio)):
                        key = f"{name}_head_{figure}_ratio"
                        figures[f"{key}_{dtype}_h{hidden_size}"] = ratio
                        figures[key] = max(figures.get(key, 0.0), ratio)
    return figures


def _print_logprobs(results: Results, read: float, num_bytes: int, num_tokens: int) -> None:
    ours = results["row kernels"]
    print(f"  {'':26}{'fwd ms':>8}{'ratio':>7}{'GB/s':>7}{'fwd+bwd ms':>12}{'ratio':>7}", end="")
    print(f"{'extra B/token':>15}")
    print(f"  {'plain read':26}{1e3 * read:8.2f}{'':7}{num_bytes / read / 1e9:7.1f}")
    for name, steps in results.items():
        forward, both = steps["forward"], steps["both"]
        extra = max(forward.allocated_bytes or 0, both.allocated_bytes or 0) / num_tokens
        print(
            f"  {name:26}{1e3 * forward.seconds:8.2f}"
            f"{forward.seconds / ours['forward'].seconds:7.1f}"
            f"{num_bytes / forward.seconds / 1e9:7.1f}{1e3 * both.seconds:12.2f}"
            f"{both.seconds / ours['both'].seconds:7.1f}{extra:15,.0f}"
        )


def _print_targets(figures: dict[str, float]) -> None:
    print(f"\n  {'':32}{'figure':>9}   target")
    for name, (relation, bound) in TARGETS.items():
        value = figures[name]
        is_met = value >= bound if relation == ">=" else value <= bound
        print(f"  {name:32}{value:9.3f}   {relation} {bound:g}: {'met' if is_met else 'missed'}")


def _describe(device: str, kernels: CompiledRows) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores, {kernels.module.capabilities()[0]} kernels"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    main()
