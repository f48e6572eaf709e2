"""Rollouts of the tiny student: in a layout, on the ranks, and in plain fp64 torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support.plain_qwen3 import PlainQwen3

from poweropd_megatron.config.schema import (
    DataConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.student import Student

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9], [36, 18, 19], [7, 7]]
STOP_TOKENS = [4, 13, 22, 31]
SEED = 11
STREAM = (0, 5)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The response of each prompt, its stop token included, and the log-prob of each token."""

    token_ids: list[list[int]]
    logp: list[list[float]]


def decode_on_ranks(
    parallel: ParallelConfig,
    folder: str,
    num_prompts: int,
    samplings: Sequence[Sampling],
    student_ranks: range | None = None,
    part_size: int = len(PROMPTS),
    micro_batch_size: int = 2,
) -> list[Trajectories]:
    """Return what this rank got of the rollouts of the first prompts, some at a time.

    The student is on all ranks unless its own are given.
    """
    engine = build_engine(parallel, folder, micro_batch_size, STOP_TOKENS, student_ranks)
    prompts = PROMPTS[:num_prompts]
    return [
        Trajectories.joined(
            [
                engine.generate(
                    prompts[start : start + part_size],
                    sampling,
                    stream=STREAM,
                    weight_version=0,
                    first_sequence=start,
                )
                for start in range(0, num_prompts, part_size)
            ]
        )
        for sampling in samplings
    ]


def build_engine(
    parallel: ParallelConfig,
    folder: str,
    micro_batch_size: int,
    stop_token_ids: Sequence[int],
    student_ranks: range | None = None,
) -> MegatronRolloutEngine:
    """Return this rank's engine."""
    cpu_device.install()
    layout = student_layout(parallel, torch.device("cpu"), seed=1, ranks=student_ranks)
    model = read_model_config(folder, setting="student.path")
    config = TrainConfig(
        output_dir="unused",
        train_steps=1,
        global_batch_size=1,
        student=StudentConfig(path=folder, dtype="fp32", parallel=parallel),
        teacher=TeacherConfig(path=folder),
        data=DataConfig(train_files=["unused"]),
    )
    return MegatronRolloutEngine(
        Student(config, model, layout).chunks,
        layout,
        vocab_size=model.vocab_size,
        stop_token_ids=stop_token_ids,
        micro_batch_size=micro_batch_size,
        seed=SEED,
        logits_dtype=torch.float32,
        cuda_graph=True,
    )


@torch.no_grad()
def decode_in_plain_torch(folder: str, sampling: Sampling) -> Decoded:
    """Return the responses from whole forwards in fp64: no cache, no batch, no top-k or top-p."""
    model = PlainQwen3.from_folder(Path(folder))
    decoded = Decoded(token_ids=[], logp=[])
    for number, prompt in enumerate(PROMPTS):
        uniforms = np.random.default_rng((SEED, *STREAM, number)).random(sampling.max_new_tokens)
        ids, logps = list(prompt), []
        for uniform in uniforms:
            logits_V = model.logits(torch.tensor([ids]))[0, -1]
            logp_V = (logits_V / (sampling.temperature or 1.0)).log_softmax(dim=0)
            if sampling.temperature == 0:
                token = int(logp_V.argmax())
            else:
                token = int((logp_V.exp().cumsum(dim=0) <= uniform).sum())
            ids.append(token)
            logps.append(float(logp_V[token]))
            if token in STOP_TOKENS:
                break
        decoded.token_ids.append(ids[len(prompt) :])
        decoded.logp.append(logps)
    return decoded
