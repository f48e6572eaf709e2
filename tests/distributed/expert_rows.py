"""The layouts of models with experts, and of a dense one beside them."""

from layout_rows import ONE_PROCESS, OVERLAPPED, Case, parallel, recompute, row

ROWS = [
    ONE_PROCESS,
    row("EP2", 2, parallel(expert=2)),
    row("DP2", 2, parallel()),
    row("PP2", 2, parallel(1, 2)),
    row("TP2+SP", 2, parallel(2, sequence=True)),
    row("TP2+SPxEP2", 2, parallel(2, expert=2, sequence=True)),
    row("TP4+SP", 4, parallel(4, sequence=True)),
    row("EP4", 4, parallel(expert=4)),
    row("EP2xDP2", 4, parallel(expert=2)),
    row("EP2xPP2", 4, parallel(1, 2, expert=2)),
    row("TP2+SPxEP4", 4, parallel(2, expert=4, sequence=True)),
    row("EP2-plain-optimizer", 2, parallel(expert=2), use_distributed_optimizer=False),
    row("EP2xCP2", 2, parallel(expert=2, context=2)),
    row("EP4xCP2xTP2+SP", 4, parallel(2, expert=4, context=2, sequence=True)),
    row("EP4xCP2-packed", 4, parallel(expert=4, context=2), max_tokens_per_microbatch=20),
    row("EP4-micro-batch-1", 4, parallel(expert=4), micro_batch_size=1),
    row("EP4-packed", 4, parallel(expert=4), max_tokens_per_microbatch=20),
    row(
        "TP2+SPxEP4-packed",
        4,
        parallel(2, expert=4, sequence=True),
        max_tokens_per_microbatch=20,
    ),
    row("EP2xPP2-packed", 4, parallel(1, 2, expert=2), max_tokens_per_microbatch=10),
    row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel(1, 2)),
    row("EP2xPP2xVPP2", 4, parallel(1, 2, virtual=2, expert=2), parallel(expert=2)),
    row("EP2xDP2-overlapped", 4, parallel(expert=2), bucket_size=1000, **OVERLAPPED),
    row("EP2-recompute-full", 2, parallel(expert=2), **recompute("full", "uniform", 1)),
    row(
        "TP2+SPxEP2-recompute-moe",
        2,
        parallel(2, expert=2, sequence=True),
        recompute_granularity="selective",
        recompute_modules=["moe"],
    ),
    row("disjoint-EP2", 4, parallel(expert=2), teacher_ranks=2),
]
ROWS_OF_A_DENSE_STUDENT = [
    row("student-TP2-teacher-EP2", 2, parallel(2), parallel(expert=2)),
    row("student-DP2-teacher-TP2+SPxEP2", 2, parallel(), parallel(2, expert=2, sequence=True)),
    row("student-PP2-teacher-EP2xPP2", 4, parallel(1, 2), parallel(1, 2, expert=2)),
]
CASES = [
    *(Case(row, "experts", "experts") for row in ROWS),
    *(Case(row, "tied", "experts") for row in ROWS_OF_A_DENSE_STUDENT),
    Case(row("student-EP2-teacher-TP2", 2, parallel(expert=2), parallel(2)), "experts", "tied"),
    Case(row("EP2-weights-below-1", 2, parallel(expert=2)), "loose", "loose"),
]
