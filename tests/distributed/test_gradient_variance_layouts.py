"""The estimate of the gradient's variance is that of each sequence's gradient, in any layout."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from layout_rows import ONE_PROCESS, parallel, row
from support.rank_pool import RankPool
from torch import Tensor
from training import ALPHA, OPTIMIZER, Models, Row, build_models, masked_labels

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.gradient_variance import PromptSigns
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.sampled.power import power_reward

POWER = ObjectiveConfig(kind="power", alpha=ALPHA)
EXACT = ObjectiveConfig(kind="power_exact", alpha=ALPHA)
ROWS = [
    ONE_PROCESS,
    row("TP2xPP2+SP", 4, parallel(2, 2, sequence=True)),
    row("CP2xDP2", 4, parallel(context=2), micro_batch_size=1),
    row(
        "PP2xVPP2xDP2-overlapped",
        4,
        parallel(1, 2, virtual=2),
        parallel(1, 2),
        micro_batch_size=1,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    ),
    row("disjoint-student-DP2", 3, parallel(), parallel(), teacher_ranks=1),
    replace(row("TP2-exact", 2, parallel(2)), objective=EXACT),
]
SIGNS = PromptSigns(signs_P=torch.tensor([1.0, -1.0, 0.0, -1.0, 1.0]), num_samples=1)
REWARD: Reward = partial(power_reward, alpha=ALPHA)


def two_updates(
    layout: Row, student: str, teacher: str, signs: PromptSigns | None
) -> tuple[list[dict[str, float]], dict[str, list[Tensor]]]:
    """Return the metrics of two updates, the first with signs, and the weights after them."""
    models = _models(layout, student, teacher)
    batch = (models.trajectories, models.labels, models.ask_teacher())
    found = [models.student.update(*batch, REWARD, signs=given) for given in (signs, None)]
    models.student.finish_param_gather()
    metrics = [{"grad_norm": outcome.grad_norm, **outcome.variance} for outcome in found]
    return metrics, models.gather(lambda weight: weight)


def gradients_of_sequences(layout: Row, student: str, teacher: str) -> Tensor:
    """Return what each sequence adds to the gradient of the batch, [B, weights], in one process."""
    models = _models(layout, student, teacher)
    return torch.stack([_gradient_of(models, b) for b in range(len(models.labels.mask_BT))])


def _models(layout: Row, student: str, teacher: str) -> Models:
    models = build_models(layout, student, teacher, "fp32", OPTIMIZER)
    return replace(models, labels=masked_labels(models.trajectories))


def _gradient_of(models: Models, sequence: int) -> Tensor:
    whole_BT = models.labels.mask_BT
    mask_BT = whole_BT.clone()
    mask_BT[torch.arange(len(mask_BT)) != sequence] = False
    alone = replace(models, labels=replace(models.labels, mask_BT=mask_BT))
    models.student._accumulate_gradient(
        models.trajectories, alone.labels, alone.ask_teacher(), REWARD, None
    )
    gradients = models.gather(lambda weight: weight.main_grad)
    gradients.pop("padding")
    flat = torch.cat([copies[0].flatten() for copies in gradients.values()]).double()
    return flat * mask_BT.sum() / whole_BT.sum()


@pytest.fixture(scope="module")
def gradients(folders: dict[str, str], ranks: RankPool) -> dict[str, Tensor]:
    """Return, by the kind of objective, what each sequence adds to the gradient of the batch."""
    models = (folders["student-untied"], folders["teacher-same-tokens"])
    found = {}
    for objective in (POWER, EXACT):
        layout = replace(ONE_PROCESS, objective=objective)
        [found[objective.kind]] = ranks.run(gradients_of_sequences, layout, *models, world_size=1)
    return found


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_the_variance_is_that_of_the_signed_sum_and_the_update_is_as_without(
    layout: Row, gradients: dict[str, Tensor], folders: dict[str, str], ranks: RankPool
) -> None:
    models = (folders["student-untied"], folders["teacher-same-tokens"])
    found = ranks.run(two_updates, layout, *models, SIGNS, world_size=layout.world_size)
    without = ranks.run(two_updates, layout, *models, None, world_size=layout.world_size)
    of_sequences = gradients[layout.objective.kind]
    signed = (SIGNS.signs_P.double() @ of_sequences).square().sum().item()
    whole = of_sequences.sum(dim=0).square().sum().item()
    for (metrics, weights), (plain, plain_weights) in zip(found, without, strict=True):
        assert metrics[0]["grad_variance"] == pytest.approx(5 / 4 * signed, rel=1e-5)
        fraction = metrics[0]["grad_variance_fraction"]
        assert fraction == pytest.approx(5 / 4 * signed / whole, rel=1e-5)
        assert metrics[1] == plain[1]
        assert metrics[0]["grad_norm"] == plain[0]["grad_norm"]
        assert weights.keys() == plain_weights.keys()
        for name, copies in weights.items():
            for one, other in zip(copies, plain_weights[name], strict=True):
                assert torch.equal(one, other)
