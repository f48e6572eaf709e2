"""Rollouts of the bundled student, token by token against its full forward in fp64."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file
from support import qwen3_folder
from support.plain_qwen3 import PlainQwen3

from poweropd_megatron.config.schema import ParallelConfig, TeacherConfig
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.objectives.labels import label
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.row_group import RowPolicy
from poweropd_megatron.rollout.sampling import Sampling, uniforms
from poweropd_megatron.rollout.trajectories import FINISH_LENGTH, FINISH_STOP, Trajectories
from poweropd_megatron.train.teacher import Teacher

EOS, SEED, STREAM = 1, 11, (0, 3)
TEXTS = ["5+9+0=", "1+2+3+4+5+6=", "9", "7+7+7=", "0+0+0+0=", "8+1+5+3+2=", "4+4+9+1=", "3+2+1="]
GREEDY = Sampling(max_new_tokens=48, temperature=0.0)
RANDOM = Sampling(max_new_tokens=48)
FILTERED = Sampling(max_new_tokens=48, temperature=1.3, top_p=0.9, top_k=6)


@pytest.fixture(scope="module")
def chunk(student_folder: Path, layout: Layout) -> GPTModel:
    model = read_model_config(student_folder, setting="student.path")
    [chunk] = build_model(
        model, layout, folder=str(student_folder), dtype="fp32", setting="student.path"
    )
    return chunk


@pytest.fixture(scope="module")
def exact(student_folder: Path) -> PlainQwen3:
    return PlainQwen3.from_folder(student_folder)


@pytest.fixture(scope="module")
def prompts(student_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(student_folder)
    return [tokenizer.encode(text) for text in TEXTS]


def generate(
    chunk: GPTModel,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    micro_batch_size: int = 8,
    vocab_size: int = 24,
    stop: Sequence[int] = (EOS,),
    stream: tuple[int, ...] = STREAM,
    shrink_at: float = 1.0,
    refill_at: float = 0.25,
) -> Trajectories:
    engine = MegatronRolloutEngine(
        [chunk],
        layout,
        vocab_size=vocab_size,
        stop_token_ids=stop,
        micro_batch_size=micro_batch_size,
        seed=SEED,
        logits_dtype=torch.float32,
        cuda_graph=True,
    )
    engine.row_policy = RowPolicy(shrink_at=shrink_at, refill_at=refill_at)
    return engine.generate(prompts, sampling, stream=stream, weight_version=4)


def responses(trajectories: Trajectories) -> list[list[int]]:
    return [trajectories.response_ids(row) for row in range(trajectories.num_sequences)]


@torch.no_grad()
def exact_logits(exact: PlainQwen3, trajectories: Trajectories, row: int) -> torch.Tensor:
    """Return the fp64 logits that each response token was drawn from, without a cache, [R, V]."""
    start, end = (
        int(lengths[row])
        for lengths in (trajectories.prompt_lengths_B, trajectories.total_lengths_B)
    )
    return exact.logits(trajectories.token_ids_BT[row : row + 1, :end])[0, start - 1 : end - 1]


def behaviour(trajectories: Trajectories, row: int) -> torch.Tensor:
    return trajectories.behaviour_logp_BT[row][trajectories.response_mask_BT[row]].double()


def test_greedy_responses_take_the_likeliest_token_of_the_full_forward(
    chunk: GPTModel, layout: Layout, prompts: list[list[int]], exact: PlainQwen3
) -> None:
    trajectories = generate(chunk, layout, prompts, GREEDY, micro_batch_size=5)
    assert len(set(trajectories.response_lengths_B.tolist())) > 3
    for row in range(len(prompts)):
        logp = exact_logits(exact, trajectories, row).log_softmax(dim=1)
        assert trajectories.response_ids(row) == logp.argmax(dim=1).tolist()
        torch.testing.assert_close(
            behaviour(trajectories, row), logp.amax(dim=1), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("shrink_at", [0.5, 0.0])
def test_rows_that_stay_after_their_end_change_nothing(
    shrink_at: float, chunk: GPTModel, layout: Layout, prompts: list[list[int]]
) -> None:
    """As for a CUDA graph, which is recorded anew for each number of rows."""
    leave, stay = (generate(chunk, layout, prompts, RANDOM, shrink_at=x) for x in (1.0, shrink_at))
    assert len(set(leave.response_lengths_B.tolist())) > 3
    assert torch.equal(stay.token_ids_BT, leave.token_ids_BT)
    assert torch.equal(stay.total_lengths_B, leave.total_lengths_B)
    assert torch.equal(stay.finish_B, leave.finish_B)
    torch.testing.assert_close(stay.behaviour_logp_BT, leave.behaviour_logp_BT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [RANDOM, FILTERED], ids=["plain", "filtered"])
def test_sampled_tokens_are_where_their_uniform_number_falls_in_the_full_forwards_distribution(
    chunk: GPTModel,
    layout: Layout,
    prompts: list[list[int]],
    exact: PlainQwen3,
    sampling: Sampling,
) -> None:
    trajectories = generate(chunk, layout, prompts, sampling, micro_batch_size=3)
    for row in range(len(prompts)):
        probs = (exact_logits(exact, trajectories, row) / sampling.temperature).softmax(dim=1)
        numbers = uniforms(seed=SEED, stream=STREAM, sequence=row, count=sampling.max_new_tokens)
        for step, token in enumerate(trajectories.response_ids(row)):
            order = list(range(24))
            if sampling.top_k:
                order = probs[step].argsort(descending=True).tolist()[: sampling.top_k]
            kept = probs[step, order]
            before = kept.cumsum(0) - kept
            kept = kept[before < sampling.top_p * kept.sum() + 1e-12]
            upper = kept.cumsum(0) / kept.sum()
            place = order.index(token)
            assert upper[place] - kept[place] / kept.sum() - 1e-5 <= numbers[step]
            assert numbers[step] <= upper[place] + 1e-5
            position = int(trajectories.prompt_lengths_B[row]) + step
            logp = (kept[place] / kept.sum()).log().item()
            assert trajectories.behaviour_logp_BT[row, position].item() == pytest.approx(
                logp, abs=2e-5
            )
            removed = 1 - kept.sum().item()
            assert trajectories.truncated_mass_BT[row, position].item() == pytest.approx(
                removed, abs=1e-5
            )


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("refill_at", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 6])
def test_waiting_prompts_that_take_the_rows_of_others_change_no_response(
    chunk: GPTModel,
    layout: Layout,
    prompts: list[list[int]],
    sampling: Sampling,
    refill_at: float,
    micro_batch_size: int,
) -> None:
    whole = generate(chunk, layout, prompts, sampling, micro_batch_size=8)
    parts = generate(
        chunk, layout, prompts, sampling, micro_batch_size=micro_batch_size, refill_at=refill_at
    )
    assert responses(parts) == responses(whole)
    torch.testing.assert_close(parts.behaviour_logp_BT, whole.behaviour_logp_BT, rtol=0, atol=2e-5)


def test_a_response_does_not_depend_on_the_other_prompts(
    chunk: GPTModel, layout: Layout, prompts: list[list[int]]
) -> None:
    whole = generate(chunk, layout, prompts, RANDOM)
    others = [prompts[0], prompts[3], prompts[2], [4, 5, 6] * 8, prompts[4]]
    mixed = generate(chunk, layout, others, RANDOM)
    for row in (0, 2, 4):
        assert mixed.response_ids(row) == whole.response_ids(row)


def test_samples_of_one_prompt_and_steps_of_one_run_differ(
    chunk: GPTModel, layout: Layout, prompts: list[list[int]]
) -> None:
    first = responses(generate(chunk, layout, [prompts[1]] * 4, RANDOM))
    second = responses(generate(chunk, layout, [prompts[1]] * 4, RANDOM, stream=(0, 4)))
    assert len(set(map(tuple, first + second))) == 8
    assert responses(generate(chunk, layout, [prompts[1]] * 4, RANDOM)) == first


@pytest.mark.parametrize("stop", [(EOS,), (14, EOS)])
@pytest.mark.parametrize("max_new_tokens", [1, 6, 48])
def test_responses_end_with_their_first_stop_token_or_at_the_limit(
    chunk: GPTModel,
    layout: Layout,
    prompts: list[list[int]],
    stop: tuple[int, ...],
    max_new_tokens: int,
) -> None:
    unlimited = responses(generate(chunk, layout, prompts, RANDOM, stop=[]))
    trajectories = generate(
        chunk, layout, prompts, Sampling(max_new_tokens=max_new_tokens), stop=stop
    )
    for row, whole in enumerate(unlimited):
        ends = [number + 1 for number, token in enumerate(whole) if token in stop]
        stops = bool(ends) and ends[0] <= max_new_tokens
        expected = whole[: ends[0]] if stops else whole[:max_new_tokens]
        assert trajectories.response_ids(row) == expected
        assert trajectories.finish_B[row] == (FINISH_STOP if stops else FINISH_LENGTH)
        assert trajectories.token_ids_BT[row, : len(prompts[row])].tolist() == prompts[row]
    outside = ~trajectories.response_mask_BT
    position_T = torch.arange(outside.shape[1])
    assert not trajectories.token_ids_BT[position_T >= trajectories.total_lengths_B[:, None]].any()
    assert not trajectories.behaviour_logp_BT[outside].any()
    assert not trajectories.truncated_mass_BT[outside].any()
    assert outside.shape[1] == trajectories.total_lengths_B.max()
    assert trajectories.weight_version == 4


def test_behaviour_log_probs_are_those_that_scoring_gives(
    chunk: GPTModel, layout: Layout, prompts: list[list[int]], student_folder: Path
) -> None:
    trajectories = generate(chunk, layout, prompts, RANDOM)
    model = read_model_config(student_folder, setting="teacher.path")
    config = TeacherConfig(
        path=str(student_folder), dtype="fp32", micro_batch_size=3, parallel=ParallelConfig()
    )
    labels = label(trajectories, "raw", teacher_eos_id=EOS)
    scored = Teacher(config, model, layout, logits_dtype="fp32").score(trajectories, labels)
    torch.testing.assert_close(scored, trajectories.behaviour_logp_BT, rtol=0, atol=1e-5)
    assert not scored[~labels.mask_BT].any()


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, FILTERED], ids=["greedy", "plain", "top"])
def test_rows_that_pad_the_vocabulary_are_never_sampled(
    layout: Layout, tmp_path: Path, sampling: Sampling
) -> None:
    """The padding's logits are huge here, and of both signs; real padding would be zero."""
    config = qwen3_folder.SMALL
    tensors = qwen3_folder.write(tmp_path)
    real = config["vocab_size"] - 3
    direction = 1e4 * torch.randn(config["hidden_size"], generator=torch.Generator().manual_seed(2))
    tensors["lm_head.weight"][real:] = torch.stack([direction, -direction, direction / 2])
    qwen3_folder.write_tensors(tmp_path, tensors)
    model = read_model_config(tmp_path, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(tmp_path), dtype="fp32", setting="student.path")
    trajectories = generate(
        chunk, layout, [[3, 4, 5], [6]], sampling, vocab_size=real, stop=[], stream=(1, 0)
    )
    exact = PlainQwen3.from_folder(tmp_path)
    for row in range(2):
        tokens = torch.tensor(trajectories.response_ids(row))
        assert tokens.max() < real
        logits = exact_logits(exact, trajectories, row)
        assert (logits.argmax(dim=1) >= real).all()
        if sampling is RANDOM:
            logp = logits[:, :real].log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(behaviour(trajectories, row), logp, rtol=0, atol=5e-5)
            assert not trajectories.truncated_mass_BT.any()


def test_the_model_is_left_as_it_was_found_even_by_a_rollout_that_fails(
    chunk: GPTModel, layout: Layout, prompts: list[list[int]], student_folder: Path
) -> None:
    ids = torch.tensor([prompts[1]])
    weights = load_file(student_folder / "model.safetensors")["model.norm.weight"]
    chunk.train()
    before = chunk(input_ids=ids, position_ids=None, attention_mask=None)
    generate(chunk, layout, prompts, RANDOM)
    assert chunk.training
    with pytest.raises(IndexError):
        generate(chunk, layout, [prompts[0], [10**6]], RANDOM)
    assert chunk.training
    after = chunk(input_ids=ids, position_ids=None, attention_mask=None)
    assert after.requires_grad
    assert torch.equal(before, after)
    assert torch.equal(chunk.decoder.final_layernorm.weight, weights)


def test_bf16_rollouts_agree_with_bf16_scoring(
    layout: Layout, prompts: list[list[int]], student_folder: Path
) -> None:
    """Decoding with a cache rounds as scoring does, up to the noise of bf16."""
    model = read_model_config(student_folder, setting="student.path")
    [half] = build_model(
        model, layout, folder=str(student_folder), dtype="bf16", setting="student.path"
    )
    trajectories = generate(half, layout, prompts, RANDOM)
    labels = label(trajectories, "raw", teacher_eos_id=EOS)
    config = TeacherConfig(path=str(student_folder), dtype="bf16", parallel=ParallelConfig())
    scored = Teacher(config, model, layout, logits_dtype="fp32").score(trajectories, labels)
    difference = (scored - trajectories.behaviour_logp_BT)[labels.mask_BT].abs()
    assert difference.mean() < 0.02
    assert difference.max() < 0.3
