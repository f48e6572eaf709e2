"""Putting a run together: layouts, models, rollout engine, evaluator, state."""

from pathlib import Path

import torch
import torch.distributed as dist

from poweropd_megatron.checkpoint.run_state import RunState
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.objective import KINDS
from poweropd_megatron.config.ranks import student_ranks, teacher_ranks
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.data.prompts import PromptStream
from poweropd_megatron.evaluation.evaluator import Evaluator
from poweropd_megatron.models.build import TORCH_DTYPES
from poweropd_megatron.models.teacher_head import load_teacher_head
from poweropd_megatron.objectives.exact import reward_to_show
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout, teacher_layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.train.inputs import RunInputs
from poweropd_megatron.train.loop import Run
from poweropd_megatron.train.recorder import Recorder
from poweropd_megatron.train.student import Student
from poweropd_megatron.train.teacher import Teacher


def build_run(config: TrainConfig, inputs: RunInputs, device: torch.device) -> Run:
    """Return the run with its models loaded from their Hugging Face folders. Called by all ranks.

    Raises: InputError on all ranks if a folder's tensors don't fit its config.json.
    """
    cpu_device.install()
    world_size = dist.get_world_size()
    layout = student_layout(
        config.student.parallel, device, seed=config.seed, ranks=student_ranks(config, world_size)
    )
    teacher_head = None
    is_exact = KINDS[config.objective.kind].family == "exact"
    if is_exact:
        teacher_head = load_teacher_head(
            inputs.teacher, layout, folder=config.teacher.path, dtype=config.teacher.dtype
        )
    student = Student(config, inputs.student, layout, teacher_head=teacher_head)
    frozen_layout = teacher_layout(
        config.teacher.parallel, layout, ranks=teacher_ranks(config, world_size)
    )
    logits_dtype = config.objective.logits_dtype
    teacher = Teacher(config.teacher, inputs.teacher, frozen_layout, logits_dtype=logits_dtype)
    engine = MegatronRolloutEngine(
        student.chunks,
        layout,
        vocab_size=inputs.student.vocab_size,
        stop_token_ids=inputs.tokenizer.eos_token_ids,
        micro_batch_size=config.rollout.micro_batch_size,
        logits_dtype=TORCH_DTYPES[logits_dtype],
        seed=config.seed,
        cuda_graph=config.rollout.cuda_graph,
    )
    prompts = PromptStream(inputs.train_prompts, seed=config.seed, shuffle=config.data.shuffle)
    checkpoints = CheckpointStore(Path(config.output_dir) / "checkpoints")
    return Run(
        config=config,
        prompts=prompts,
        rollout=engine,
        sampling=Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
        ),
        student=student,
        teacher=teacher,
        teacher_eos_id=inputs.teacher_eos_id,
        reward=(reward_to_show if is_exact else build_reward)(config.objective),
        evaluator=Evaluator(
            config.eval,
            inputs.eval_prompts,
            engine=engine,
            tokenizer=inputs.tokenizer,
            checker=inputs.answer_checker,
            num_logged_samples=config.telemetry.num_logged_samples,
            is_first_rank=dist.get_rank() == 0,
        ),
        state=RunState(student, inputs.student, prompts, checkpoints),
        checkpoints=checkpoints,
        recorder=Recorder(config, is_first_rank=dist.get_rank() == 0),
    )
