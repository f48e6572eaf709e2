"""Time and memory of the core attention beside Megatron's, and what packing saves.

    python benchmarks/attention.py [--device cpu|cuda] [--quick] [--json FILE]

Each case runs in a process of its own; all take turns in each round, and the best of the rounds
counts, so that what disturbs the machine for a while disturbs all of them. Read the ratios: the
milliseconds are this machine's. Below 1 is less than Megatron's, or than right-padding.
"""

from functools import partial

from attention_cases import HEADS, Attention, megatron, ours, ours_packed, rollout_lengths
from command_line import parse, write
from workers import Measured, measure

from poweropd_megatron.train.batching import Batching

LENGTHS = (1024, 2048, 4096)
QUICK_LENGTHS = (256, 512)
PACKED_SEQUENCES = 16
PLANNED_SEQUENCES = 512


def main() -> None:
    """Measure, print tables, and write the figures where they are asked for."""
    arguments = parse(
        __doc__, quick="short sequences and few rounds: half a minute", devices=("cpu", "cuda")
    )
    lengths, rounds = (QUICK_LENGTHS, 2) if arguments.quick else (LENGTHS, 3)
    print(f"{', '.join(f'{name} {value}' for name, value in HEADS.items())}, one sequence")
    figures: dict[str, float] = {}
    for dtype in ("bf16", "fp32"):
        for length in lengths:
            figures |= measure_dense(length, dtype, arguments.device, rounds)
    for figure in ("attention_peak_ratio", "attention_time_ratio"):
        figures[figure] = max(value for name, value in figures.items() if name.startswith(figure))
    figures |= measure_packed(lengths[-1], arguments.device, rounds)
    figures |= count_padding(lengths[-1])
    write(figures, arguments.json)


def measure_dense(length: int, dtype: str, device: str, rounds: int) -> dict[str, float]:
    """Return the figures of one sequence, forward and backward."""
    builds = {
        name: partial(Attention, make, [length], dtype, device)
        for name, make in (("SDPA", ours), ("megatron.core", megatron))
    }
    results = measure(builds, device=device, rounds=rounds, with_allocations=True)
    print(f"\nS {length}, {dtype}")
    _print(results, "megatron.core")
    mine, theirs = (results[name]["both"] for name in builds)
    return {
        f"attention_peak_ratio_{dtype}_s{length}": _peak(mine) / _peak(theirs),
        f"attention_time_ratio_{dtype}_s{length}": mine.seconds / theirs.seconds,
    }


def measure_packed(longest: int, device: str, rounds: int) -> dict[str, float]:
    """Return the figures of a micro-batch of a rollout's sequences, packed and right-padded."""
    lengths = sorted(rollout_lengths(PACKED_SEQUENCES, longest), reverse=True)
    builds = {
        "packed": partial(Attention, ours_packed, lengths, "bf16", device, is_packed=True),
        "padded": partial(Attention, ours, lengths, "bf16", device),
    }
    results = measure(builds, device=device, rounds=rounds, with_allocations=True)
    print(
        f"\n{len(lengths)} sequences of {lengths[-1]} to {lengths[0]}, {sum(lengths)} tokens, bf16"
    )
    _print(results, "padded")
    packed, padded = (results[name]["both"] for name in builds)
    return {
        "packed_attention_peak_ratio": _peak(packed) / _peak(padded),
        "packed_attention_time_ratio": packed.seconds / padded.seconds,
    }


def count_padding(longest: int) -> dict[str, float]:
    """Return which share of all layers' positions packing saves in a batch, and what is left.

    Right-padded are micro-batches of 4 sequences of like length on each of 8 ranks; packed ones
    have a budget of twice the longest sequence.
    """
    lengths = rollout_lengths(PLANNED_SEQUENCES, longest)
    fractions = {
        budget: Batching(
            micro_batch_size=4, max_tokens_per_microbatch=budget, dp_size=8, length_multiple=8
        ).padding_fraction([lengths])
        for budget in (None, 2 * longest)
    }
    padded, packed = fractions.values()
    saved = 1 - (1 - padded) / (1 - packed)
    print(
        f"\n{len(lengths)} sequences of up to {longest} on 8 ranks: {padded:.1%} padding in "
        f"micro-batches of 4, {packed:.1%} packed; {saved:.1%} of the positions saved"
    )
    return {"padding_saved": saved, "padding_fraction_packed": packed}


def _peak(measured: Measured) -> int:
    """Return the bytes of tensors at once: a buffer that Megatron keeps forever doesn't count."""
    assert measured.allocated_bytes
    return measured.allocated_bytes


def _print(results: dict[str, dict[str, Measured]], reference: str) -> None:
    print(f"  {'':16}{'':9}{'ms':>9}{'ratio':>8}{'peak MB':>9}{'ratio':>8}")
    for name, steps in results.items():
        for step, measured in steps.items():
            other = results[reference][step]
            print(
                f"  {name:16}{step:9}{1e3 * measured.seconds:9.1f}"
                f"{measured.seconds / other.seconds:8.3f}{_peak(measured) / 1e6:9.1f}"
                f"{_peak(measured) / _peak(other):8.3f}"
            )


if __name__ == "__main__":
    main()
