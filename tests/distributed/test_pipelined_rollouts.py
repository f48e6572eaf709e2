"""The stages of a pipeline decode groups of rows in turns, and wait only for what they need."""

import pytest
from decoding import PROMPTS, SEED, build_engine
from layout_rows import parallel
from support.rank_pool import RankPool

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.rollout.draws import PendingDraw
from poweropd_megatron.rollout.sampling import Draw, Sampling


def trace(layout: ParallelConfig, folder: str, micro_batch_size: int) -> str:
    """Return what this rank does in order: F for a forward, W where it waits for tokens."""
    engine = build_engine(layout, folder, micro_batch_size, stop_token_ids=[])
    events: list[str] = []
    wait = PendingDraw.wait

    def noted(pending: PendingDraw) -> Draw:
        events.append("W")
        return wait(pending)

    PendingDraw.wait = noted  # type: ignore[method-assign]
    engine._chunks[0].register_forward_hook(lambda *_: events.append("F"))
    sampling = Sampling(max_new_tokens=5, temperature=0.0)
    engine.generate(PROMPTS[:4], sampling, stream=(SEED,), weight_version=0)
    return "".join(events)


@pytest.mark.parametrize(("stages", "rows", "groups"), [(2, 4, 2), (4, 4, 4), (4, 2, 2), (2, 1, 1)])
def test_each_stage_begins_the_other_groups_before_it_waits_for_the_tokens_of_one(
    stages: int, rows: int, groups: int, folders: dict[str, str], ranks: RankPool
) -> None:
    by_rank = ranks.run(
        trace, parallel(1, stages), folders["student-untied"], rows, world_size=stages
    )
    turns_of_a_row = 5
    turns_of_a_group = turns_of_a_row * (4 // rows)
    middle = groups * (turns_of_a_group - 1)
    for events in by_rank:
        assert events == "F" * groups + "WF" * middle + "W" * groups
