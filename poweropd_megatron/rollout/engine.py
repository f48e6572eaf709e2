"""What a rollout engine does: prompts in, trajectories out."""

from collections.abc import Sequence
from typing import Protocol

from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories


class RolloutEngine(Protocol):
    """Generates responses with the student's current weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stream: tuple[int, ...],
        weight_version: int,
        first_sequence: int = 0,
    ) -> Trajectories:
        """Return one response for each prompt, in order, the same on every rank.

        `stream` tells this call's random numbers from those of other calls, such as (purpose,
        step); `first_sequence` is the first prompt's number in its stream.
        """
        ...
