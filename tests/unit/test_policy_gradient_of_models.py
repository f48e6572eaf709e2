"""student.update on a real model: gradients, steps and outcomes against autograd in fp64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import made_trajectories, qwen3_folder
from support.plain_qwen3 import PlainQwen3
from support.run_settings import small_run
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig, OptimizerConfig
from poweropd_megatron.errors import NonFiniteError
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.families import read_model_config, weights_of
from poweropd_megatron.objectives.labels import Labels, label
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.student import Student
from poweropd_megatron.train.teacher import Teacher

EOS, TEACHER_EOS = 1, 2
POWER = ObjectiveConfig(kind="power", alpha=0.5)
LOG_RATIO = ObjectiveConfig(kind="log_ratio")
UNCLIPPED = OptimizerConfig(lr=0.01, clip_grad=0.0, adam_eps=0.1)
"""With so large an epsilon Adam's first step is smooth in the gradient and can be compared."""


def make_student(
    folder: Path, layout: Layout, micro_batch_size: int = 2, **optimizer: float
) -> Student:
    settings = small_run(
        folder,
        micro_batch_size=micro_batch_size,
        optimizer=OptimizerConfig(**{**vars(UNCLIPPED), **optimizer}),
    )
    return Student(settings, read_model_config(folder, setting="student.path"), layout)


def by_hugging_face_name(
    student: Student, folder: Path, value: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """Return something of each parameter under the names of the Hugging Face tensors."""
    model = read_model_config(folder, setting="student.path")
    parameters = dict(student.chunks[0].named_parameters())
    return {
        name: tensor
        for weight in weights_of(model, range(model.num_layers))
        if weight.megatron in parameters
        for name, tensor in hf_weights.to_hugging_face(
            weight, [value(parameters[weight.megatron]).detach()], vocab_size=model.vocab_size
        )
    }


def gradients(student: Student, folder: Path) -> dict[str, Tensor]:
    return by_hugging_face_name(student, folder, lambda parameter: parameter.main_grad)


def exact_gradients(
    exact: PlainQwen3,
    trajectories: Trajectories,
    labels: Labels,
    teacher_logp_BT: Tensor,
    objective: ObjectiveConfig,
) -> dict[str, Tensor]:
    """Return the gradient of the mean over the tokens in the loss of - reward * log p_S, fp64."""
    logp_BTV = exact.logprobs(trajectories.token_ids_BT)
    in_loss = labels.mask_BT
    logp_N = logp_BTV[in_loss].gather(1, labels.student_BT[in_loss][:, None])[:, 0]
    q_N, p_N = logp_N.detach(), teacher_logp_BT[in_loss].double()
    reward_N = (
        p_N - q_N
        if objective.kind == "log_ratio"
        else (objective.alpha * p_N).exp() - (objective.alpha * q_N).exp()
    )
    loss = -(reward_N * logp_N).mean()
    names = list(exact.weights)
    return dict(zip(names, torch.autograd.grad(loss, list(exact.weights.values())), strict=True))


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], *, relative: float) -> None:
    """Compare each tensor by the norm of its error, in parts of the largest tensor's norm."""
    assert ours.keys() == exact.keys()
    scale = max(tensor.norm().item() for tensor in exact.values())
    errors = {name: (ours[name].double() - exact[name]).norm().item() for name in exact}
    assert max(errors.values()) <= relative * scale, errors


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


MODELS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "llama": qwen3_folder.LLAMA}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    qwen3_folder.write(path, seed=3, **MODELS[request.param])
    return path


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    """Return eight ragged rows; one response is only EOS, so that `mask` leaves it no token."""
    return made_trajectories.random(8, vocab_size=qwen3_folder.SMALL["vocab_size"], eos=EOS)


@pytest.fixture(scope="module")
def teacher_logp_BT(trajectories: Trajectories) -> Tensor:
    shape = trajectories.token_ids_BT.shape
    logp_BT = -5 * torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return torch.where(trajectories.response_mask_BT, logp_BT, 0.0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("terminal", ["mask", "cross_eos", "im_end"])
@pytest.mark.parametrize("objective", [POWER, LOG_RATIO], ids=["power", "log_ratio"])
def test_the_gradient_is_that_of_the_token_mean_for_any_micro_batches(
    folder: Path,
    layout: Layout,
    trajectories: Trajectories,
    teacher_logp_BT: Tensor,
    objective: ObjectiveConfig,
    terminal: str,
    micro_batch_size: int,
) -> None:
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    student = make_student(folder, layout, micro_batch_size)
    outcome = student.update(trajectories, labels, teacher_logp_BT, build_reward(objective))
    exact = PlainQwen3.from_folder(folder)
    expected = exact_gradients(exact, trajectories, labels, teacher_logp_BT, objective)
    assert_close(gradients(student, folder), expected, relative=1e-5)
    assert outcome.grad_norm == pytest.approx(norm(expected), rel=1e-5)


def test_the_outcome_has_the_log_probs_and_entropies_of_the_tokens_in_the_loss(
    folder: Path, layout: Layout, trajectories: Trajectories, teacher_logp_BT: Tensor
) -> None:
    labels = label(trajectories, "im_end", teacher_eos_id=TEACHER_EOS)
    student = make_student(folder, layout)
    outcome = student.update(trajectories, labels, teacher_logp_BT, build_reward(POWER))
    with torch.no_grad():
        logp_BTV = PlainQwen3.from_folder(folder).logprobs(trajectories.token_ids_BT)
    logp_BT = logp_BTV.gather(2, labels.student_BT[..., None])[..., 0]
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(dim=2)
    for ours, exact in ((outcome.logp_BT, logp_BT), (outcome.entropy_BT, entropy_BT)):
        expected = torch.where(labels.mask_BT, exact, 0.0)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("clip_grad", [0.0, 0.25])
@pytest.mark.parametrize("use_distributed_optimizer", [True, False])
def test_the_first_step_is_adams_on_the_clipped_gradient(
    folder: Path,
    layout: Layout,
    trajectories: Trajectories,
    teacher_logp_BT: Tensor,
    clip_grad: float,
    use_distributed_optimizer: bool,
) -> None:
    labels = label(trajectories, "raw", teacher_eos_id=TEACHER_EOS)
    student = make_student(
        folder, layout, clip_grad=clip_grad, use_distributed_optimizer=use_distributed_optimizer
    )
    outcome = student.update(trajectories, labels, teacher_logp_BT, build_reward(LOG_RATIO))
    exact = PlainQwen3.from_folder(folder)
    expected = exact_gradients(exact, trajectories, labels, teacher_logp_BT, LOG_RATIO)
    assert norm(expected) > 1
    assert outcome.grad_norm == pytest.approx(norm(expected), rel=1e-5)
    assert outcome.learning_rate == 0.01
    factor = clip_grad / norm(expected) if clip_grad else 1.0
    steps = {
        name: -0.01 * factor * gradient / (factor * gradient.abs() + 0.1)
        for name, gradient in expected.items()
    }
    stepped = by_hugging_face_name(student, folder, lambda parameter: parameter.data)
    assert_close(
        {name: stepped[name].double() - exact.weights[name] for name in stepped},
        steps,
        relative=1e-4,
    )


def test_a_second_update_starts_from_a_gradient_of_zero(
    folder: Path, layout: Layout, trajectories: Trajectories, teacher_logp_BT: Tensor
) -> None:
    labels = label(trajectories, "raw", teacher_eos_id=TEACHER_EOS)
    student = make_student(folder, layout, lr=1e-20, adam_eps=1.0)
    for _ in range(2):
        student.update(trajectories, labels, teacher_logp_BT, build_reward(POWER))
    expected = exact_gradients(
        PlainQwen3.from_folder(folder), trajectories, labels, teacher_logp_BT, POWER
    )
    assert_close(gradients(student, folder), expected, relative=1e-5)


def test_what_the_teacher_says_outside_the_loss_does_not_matter(
    folder: Path, layout: Layout, trajectories: Trajectories, teacher_logp_BT: Tensor
) -> None:
    labels = label(trajectories, "mask", teacher_eos_id=TEACHER_EOS)
    norms = []
    for outside in (0.0, torch.nan):
        scored_BT = torch.where(labels.mask_BT, teacher_logp_BT, outside)
        student = make_student(folder, layout)
        outcome = student.update(trajectories, labels, scored_BT, build_reward(POWER))
        norms.append(outcome.grad_norm)
    assert norms[0] == norms[1] > 0


def test_a_batch_without_tokens_in_the_loss_changes_nothing(folder: Path, layout: Layout) -> None:
    only_eos = made_trajectories.make([([5, 6], [EOS]), ([7], [EOS])], eos=EOS)
    labels = label(only_eos, "mask", teacher_eos_id=TEACHER_EOS)
    student = make_student(folder, layout)
    teacher_logp_BT = torch.zeros(only_eos.token_ids_BT.shape)
    outcome = student.update(only_eos, labels, teacher_logp_BT, build_reward(POWER))
    assert outcome.grad_norm == 0
    stepped = by_hugging_face_name(student, folder, lambda parameter: parameter.data)
    for name, weight in PlainQwen3.from_folder(folder).weights.items():
        assert torch.equal(stepped[name].double(), weight.detach())


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_teacher_log_prob_that_is_not_finite_stops_before_the_weights_change(
    folder: Path, layout: Layout, trajectories: Trajectories, teacher_logp_BT: Tensor, bad: float
) -> None:
    labels = label(trajectories, "raw", teacher_eos_id=TEACHER_EOS)
    broken_BT = teacher_logp_BT.clone()
    broken_BT[0, int(trajectories.prompt_lengths_B[0])] = bad
    student = make_student(folder, layout)
    with pytest.raises(NonFiniteError, match=r"gradient norm .* the weights were not changed"):
        student.update(trajectories, labels, broken_BT, build_reward(LOG_RATIO))
    kept = by_hugging_face_name(student, folder, lambda parameter: parameter.data)
    for name, weight in PlainQwen3.from_folder(folder).weights.items():
        assert torch.equal(kept[name].double(), weight.detach())


@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_the_teacher_scores_its_labels_given_the_sampled_tokens(
    folder: Path, layout: Layout, trajectories: Trajectories, terminal: str
) -> None:
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    teacher = Teacher(
        small_run(folder).teacher,
        read_model_config(folder, setting="teacher.path"),
        layout,
        logits_dtype="fp32",
    )
    with torch.no_grad():
        logp_BTV = PlainQwen3.from_folder(folder).logprobs(trajectories.token_ids_BT)
    logp_BT = logp_BTV.gather(2, labels.teacher_BT[..., None])[..., 0]
    expected = torch.where(labels.mask_BT, logp_BT, 0.0)
    scored = teacher.score(trajectories, labels)
    torch.testing.assert_close(scored.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("objective", [ObjectiveConfig(), LOG_RATIO], ids=["power", "log_ratio"])
def test_a_teacher_with_the_students_weights_gives_neither_reward_nor_gradient(
    student_folder: Path, teacher_folder: Path, layout: Layout, objective: ObjectiveConfig
) -> None:
    """Beyond rounding: they are scored in micro-batches of different sizes."""
    student = make_student(student_folder, layout, micro_batch_size=4, clip_grad=1.0)
    model = read_model_config(student_folder, setting="student.path")
    engine = MegatronRolloutEngine(
        student.chunks,
        layout,
        vocab_size=24,
        stop_token_ids=[EOS],
        micro_batch_size=8,
        seed=1,
        logits_dtype=torch.float32,
        cuda_graph=True,
    )
    prompts = [[4 + i, 13, 5, 13, 6 + i % 3, 14] for i in range(8)]
    rolled = engine.generate(prompts, Sampling(max_new_tokens=32), stream=(0, 0), weight_version=0)
    labels = label(rolled, "raw", teacher_eos_id=EOS)
    reward = build_reward(objective)
    norms = {}
    for name, folder in (("same", student_folder), ("other", teacher_folder)):
        teacher_logp_BT = Teacher(
            small_run(folder).teacher, model, layout, logits_dtype="fp32"
        ).score(rolled, labels)
        outcome = student.update(rolled, labels, teacher_logp_BT, reward)
        norms[name] = outcome.grad_norm
        if name == "same":
            rewards = reward(teacher_logp_BT, outcome.logp_BT)[labels.mask_BT]
            assert rewards.abs().max() < 2e-5
    assert norms["same"] < 1e-5 < 1e-2 < norms["other"]
