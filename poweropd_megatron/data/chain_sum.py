"""The bundled task: add one-digit numbers from left to right, writing every step.

    5+9+0=   ->   5+9=14;14+0=14#14

Small enough for models of 200 thousand parameters on a CPU, with some steps of reasoning and an
answer that is checked exactly: the text after the last "#".
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Split = Literal["train", "eval"]

CHARACTERS = "0123456789+=;#-"
"""Every character of the task; "-" is in no problem, so that a model has a token it never saw."""
MIN_OPERANDS = 3
MAX_OPERANDS = 6
NUM_BUCKETS = 8
"""Bucket 0 of crc32(prompt) is held out, an eighth of all problems."""


@dataclass(frozen=True)
class Problem:
    """One chain of additions."""

    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """Return what the model reads: "5+9+0="."""
        return "+".join(map(str, self.operands)) + "="

    @property
    def answer(self) -> str:
        """Return the sum in decimal digits: "14"."""
        return str(sum(self.operands))

    @property
    def solution(self) -> str:
        """Return what the model should write: "5+9=14;14+0=14#14"."""
        totals = list(accumulate(self.operands))
        steps = [
            f"{before}+{operand}={after}"
            for before, operand, after in zip(totals, self.operands[1:], totals[1:], strict=False)
        ]
        return ";".join(steps) + f"#{self.answer}"

    @property
    def split(self) -> Split:
        """Return the side of the split that the prompt belongs to, whatever the seed."""
        return "eval" if zlib.crc32(self.prompt.encode()) % NUM_BUCKETS == 0 else "train"


def sample_problems(*, seed: int, split: Split) -> Iterator[Problem]:
    """Return an endless stream of problems of one split, repeats included, fixed by the seed."""
    rng = random.Random(seed)
    while True:
        num_operands = rng.randint(MIN_OPERANDS, MAX_OPERANDS)
        problem = Problem(tuple(rng.randint(0, 9) for _ in range(num_operands)))
        if problem.split == split:
            yield problem


def distinct_problems(count: int, *, seed: int, split: Split) -> list[Problem]:
    """Return the first `count` different problems of the stream of that seed and split."""
    problems: dict[Problem, None] = {}
    for problem in sample_problems(seed=seed, split=split):
        if len(problems) == count:
            break
        problems[problem] = None
    return list(problems)
