"""The engine of an evaluation: a model with no optimizer beside it."""

import torch

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.evaluation.inputs import EvaluationInputs
from poweropd_megatron.models.build import TORCH_DTYPES, build_model
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine


def build_engine(
    config: EvaluationConfig, inputs: EvaluationInputs, device: torch.device
) -> tuple[MegatronRolloutEngine, int]:
    """Return the engine over the model's own weights, and how many responses it decodes at once."""
    cpu_device.install()
    layout = student_layout(config.student.parallel, device, seed=config.seed)
    chunks = build_model(
        inputs.model,
        layout,
        folder=config.student.path,
        dtype=config.student.dtype,
        setting="student.path",
        megatron=config.student.megatron,
    )
    engine = MegatronRolloutEngine(
        chunks,
        layout,
        vocab_size=inputs.model.vocab_size,
        stop_token_ids=inputs.tokenizer.eos_token_ids,
        micro_batch_size=config.rollout.micro_batch_size,
        logits_dtype=TORCH_DTYPES[config.logits_dtype],
        seed=config.seed,
        cuda_graph=config.rollout.cuda_graph,
    )
    return engine, config.rollout.micro_batch_size * layout.num_copies
