"""Every layout generates the same responses, token for token."""

import pytest
import torch
from decoding import PROMPTS, STOP_TOKENS, Decoded, decode_in_plain_torch, decode_on_ranks
from layout_rows import parallel
from support.rank_pool import RankPool

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import FINISH_LENGTH, FINISH_STOP, Trajectories

SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=12, temperature=0.0),
    "sampled": Sampling(max_new_tokens=12, temperature=0.9),
    "top-k-top-p": Sampling(max_new_tokens=12, temperature=1.3, top_k=9, top_p=0.8),
}
LAYOUTS = {
    "one-process": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP4": (4, ParallelConfig(tensor_model_parallel_size=4)),
    "TP2+SP": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "DP2": (2, ParallelConfig()),
    "TP2xPP2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    ),
    "PP2xDP2": (4, ParallelConfig(pipeline_model_parallel_size=2)),
    "PP4": (4, ParallelConfig(pipeline_model_parallel_size=4)),
    "PP2xVPP2": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "CP2": (2, parallel(context=2)),
    "CP2xTP2+SP": (4, parallel(2, context=2, sequence=True)),
    "CP2xPP2": (4, parallel(1, 2, context=2)),
    "CP2xDP2": (4, parallel(context=2)),
    "TP2xPP2xVPP2+SP": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            sequence_parallel=True,
        ),
    ),
}
LAYOUTS_OF_EXPERTS = {
    "one-process": (1, parallel()),
    "EP2": (2, parallel(expert=2)),
    "TP2+SP": (2, parallel(2, sequence=True)),
    "TP2+SPxEP2": (2, parallel(2, expert=2, sequence=True)),
    "EP4": (4, parallel(expert=4)),
    "EP2xCP2": (2, parallel(expert=2, context=2)),
    "EP4xCP2": (4, parallel(expert=4, context=2)),
    "EP2xPP2": (4, parallel(1, 2, expert=2)),
    "TP2+SPxEP4": (4, parallel(2, expert=4, sequence=True)),
}
CASES = [(kind, name) for kind in ("tied", "untied") for name in LAYOUTS] + [
    ("experts", name) for name in LAYOUTS_OF_EXPERTS
]


def decode(
    kind: str,
    name: str,
    folders: dict[str, str],
    ranks: RankPool,
    num_prompts: int = len(PROMPTS),
    micro_batch_size: int = 2,
) -> list[dict[str, Trajectories]]:
    """Return each rank's trajectories of each sampling; prompts wait for the rows of others."""
    world_size, layout = (LAYOUTS_OF_EXPERTS if kind == "experts" else LAYOUTS)[name]
    by_rank = ranks.run(
        decode_on_ranks,
        layout,
        folders[f"student-{kind}"],
        num_prompts,
        list(SAMPLINGS.values()),
        None,
        len(PROMPTS),
        micro_batch_size,
        world_size=world_size,
    )
    return [dict(zip(SAMPLINGS, trajectories, strict=True)) for trajectories in by_rank]


@pytest.fixture(scope="module")
def of_one_process(folders: dict[str, str], ranks: RankPool) -> dict[str, dict[str, Trajectories]]:
    """Return the rollouts of one process by the kind of model."""
    return {
        kind: decode(kind, "one-process", folders, ranks)[0]
        for kind in ("tied", "untied", "experts")
    }


@pytest.fixture(scope="module", params=["tied", "untied", "experts"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def one_process(
    kind: str, of_one_process: dict[str, dict[str, Trajectories]]
) -> dict[str, Trajectories]:
    return of_one_process[kind]


@pytest.fixture(scope="module")
def plain(kind: str, folders: dict[str, str]) -> dict[str, Decoded]:
    names = [name for name in SAMPLINGS if name != "top-k-top-p"]
    folder = folders[f"student-{kind}"]
    return {name: decode_in_plain_torch(folder, SAMPLINGS[name]) for name in names}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return a kind of model and the name of a layout."""
    kind, name = request.param
    return kind, name


@pytest.fixture(scope="module")
def by_rank(
    case: tuple[str, str], folders: dict[str, str], ranks: RankPool
) -> list[dict[str, Trajectories]]:
    return decode(*case, folders, ranks)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rollouts_in_every_layout_are_those_of_one_process(
    name: str,
    case: tuple[str, str],
    by_rank: list[dict[str, Trajectories]],
    of_one_process: dict[str, dict[str, Trajectories]],
) -> None:
    expected = of_one_process[case[0]][name]
    for trajectories in (samplings[name] for samplings in by_rank):
        assert torch.equal(trajectories.token_ids_BT, expected.token_ids_BT)
        assert torch.equal(trajectories.prompt_lengths_B, expected.prompt_lengths_B)
        assert torch.equal(trajectories.total_lengths_B, expected.total_lengths_B)
        assert torch.equal(trajectories.finish_B, expected.finish_B)
        for field in ("behaviour_logp_BT", "truncated_mass_BT"):
            torch.testing.assert_close(
                getattr(trajectories, field), getattr(expected, field), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_rollouts_of_one_process_are_those_of_whole_forwards_in_fp64(
    name: str, one_process: dict[str, Trajectories], plain: dict[str, Decoded]
) -> None:
    trajectories = one_process[name]
    finishes = trajectories.finish_B.tolist()
    for row, token_ids in enumerate(plain[name].token_ids):
        assert trajectories.response_ids(row) == token_ids
        assert finishes[row] == (FINISH_STOP if token_ids[-1] in STOP_TOKENS else FINISH_LENGTH)
        logp_T = trajectories.behaviour_logp_BT[row][trajectories.response_mask_BT[row]]
        torch.testing.assert_close(
            logp_T.double(),
            torch.tensor(plain[name].logp[row], dtype=torch.float64),
            rtol=1e-5,
            atol=1e-6,
        )


def test_the_fixed_prompts_reach_both_ends_of_a_response(
    one_process: dict[str, Trajectories],
) -> None:
    finishes = torch.cat([trajectories.finish_B for trajectories in one_process.values()])
    assert {FINISH_STOP, FINISH_LENGTH} == set(finishes.tolist())
    lengths = one_process["sampled"].response_lengths_B
    assert len(lengths.unique()) > 2, "rows leave the batch at different steps"
    assert one_process["top-k-top-p"].truncated_mass_BT.max() > 0.1


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tied", "DP2"), ("untied", "CP2"), ("experts", "EP4"), ("experts", "EP2xCP2")],
)
def test_a_data_parallel_rank_without_prompts_gets_the_others_responses(
    kind: str,
    name: str,
    folders: dict[str, str],
    ranks: RankPool,
    of_one_process: dict[str, dict[str, Trajectories]],
) -> None:
    for samplings in decode(kind, name, folders, ranks, num_prompts=1):
        for sampling, trajectories in samplings.items():
            expected = of_one_process[kind][sampling]
            assert trajectories.response_ids(0) == expected.response_ids(0)


@pytest.mark.parametrize(
    ("kind", "name", "micro_batch_size"),
    [
        ("untied", "PP2", 1),
        ("untied", "PP2", 3),
        ("untied", "PP2", 5),
        ("untied", "PP4", 3),
        ("untied", "PP4", 8),
        ("tied", "PP2xVPP2", 4),
        ("tied", "TP2xPP2", 4),
        ("experts", "EP2", 1),
        ("experts", "EP2xPP2", 4),
        ("experts", "TP2+SPxEP4", 1),
    ],
)
def test_groups_of_any_size_that_take_turns_on_the_stages_draw_the_same_tokens(
    kind: str,
    name: str,
    micro_batch_size: int,
    folders: dict[str, str],
    ranks: RankPool,
    of_one_process: dict[str, dict[str, Trajectories]],
) -> None:
    for samplings in decode(kind, name, folders, ranks, micro_batch_size=micro_batch_size):
        for sampling, trajectories in samplings.items():
            expected = of_one_process[kind][sampling]
            assert torch.equal(trajectories.token_ids_BT, expected.token_ids_BT)
            assert torch.equal(trajectories.total_lengths_B, expected.total_lengths_B)
