"""The teacher's output layer on the student's ranks, cut as the student's is."""

import torch
from torch import Tensor

from poweropd_megatron.config.schema import DType
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.build import TORCH_DTYPES, padded_vocab_size
from poweropd_megatron.models.families import weights_of
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.weight_source import open_weights
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import agreed

_NAME = "output_layer.weight"


def load_teacher_head(
    teacher: ModelConfig, student: Layout, *, folder: str, dtype: DType
) -> Tensor | None:
    """Return this rank's rows of the teacher's output layer, frozen. Called by all ranks.

    [Vp, G] on ranks with the student's last stage, whose head has as many rows of the same tokens;
    None on the others. It stays on the device, also with teacher.offload.
    Raises: InputError on all ranks if the folder's tensor doesn't fit its config.json.
    """

    def load() -> Tensor | None:
        if not (student.holds_model and student.is_last_stage):
            return None
        rows = padded_vocab_size(teacher.vocab_size, student.tp_size) // student.tp_size
        head = torch.nn.Parameter(
            torch.empty(rows, teacher.hidden_size, dtype=TORCH_DTYPES[dtype]), requires_grad=False
        )
        hf_weights.load(
            [(_NAME, head)],
            weights_of(teacher, layer_numbers=()),
            open_weights(teacher, folder, setting="teacher.path"),
            tp_rank=student.tp_rank,
            tp_size=student.tp_size,
        )
        return head.detach().to(student.device)

    return agreed(load)
