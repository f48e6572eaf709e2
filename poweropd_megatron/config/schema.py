"""Every setting of a run, as keyword-only dataclasses. The text under a field is its --help.

This package imports no torch, so that --help, --print_config and the checks of a recipe are
instant.
Parallel and optimizer settings carry Megatron-Core's names.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from poweropd_megatron.config.objective import ObjectiveConfig

DType = Literal["fp32", "bf16"]


@dataclass(kw_only=True)
class ParallelConfig:
    """How one model is cut over the ranks; data parallelism takes the ranks that remain."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's weight matrices and the vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers on each pipeline stage, run in turns: a shorter pipeline bubble in training
    for more communication (needs pipeline stages)."""
    context_parallel_size: int = 1
    """Ranks that share every sequence, for long ones: each trains on and scores two slices of it,
    and sees the keys and values of all. In rollouts they have prompts of their own."""
    expert_model_parallel_size: int = 1
    """Ranks of a pipeline stage that share the experts of a Qwen3-MoE, each expert being whole on
    its rank (Megatron's expert_tensor_parallel_size is 1)."""
    sequence_parallel: bool = False
    """Also cut the activations between tensor-parallel regions along the sequence (TP > 1); a
    Qwen3-MoE needs it there."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work together on one share of the batch."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


@dataclass(kw_only=True)
class StudentConfig:
    """The model that generates and learns."""

    path: str
    """Hugging Face folder (config.json, *.safetensors, tokenizer.json) of the first weights, or a
    folder that was converted from one (weights/ in the place of *.safetensors)."""
    dtype: DType = "bf16"
    """Type of weights and activations; bf16 keeps fp32 main weights and fp32 gradients."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Settings of Megatron's own, by the names of its TransformerConfig, OptimizerConfig and
    DistributedDataParallelConfig: recompute_granularity, overlap_grad_reduce, ...; see
    docs/layouts.md. On the command line also one by one: --student.megatron.NAME VALUE."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The frozen model that scores the student's tokens."""

    path: str
    """Folder with the teacher's weights, as student.path; its tokenizer must be the student's."""
    dtype: DType = "bf16"
    """Type of weights and activations of the teacher."""
    micro_batch_size: int = 4
    """Sequences per teacher forward on each of the teacher's data-parallel ranks, right-padded to
    the longest; not used with teacher.max_tokens_per_microbatch."""
    max_tokens_per_microbatch: int | None = None
    """Pack whole sequences into teacher forwards of at most this many tokens, as the student's
    setting of that name does for the student; neither model's setting affects the other."""
    num_ranks: int | None = None
    """Ranks that hold the teacher alone, the last of the job; the student has the others. By
    default both models share all ranks."""
    offload: bool = False
    """Keep the teacher's weights in pinned CPU memory except while it scores."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: dict[str, Any] = field(default_factory=dict)
    """The same for the teacher: how the layers are dealt out over pipeline stages."""


@dataclass(kw_only=True)
class DecodingConfig:
    """How responses are decoded; they don't depend on it."""

    micro_batch_size: int = 64
    """Sequences decoded together by each copy of the model (bounds the KV cache); others wait, and
    take the places of those that end. With pipeline stages, in as many groups: at least as many."""
    cuda_graph: bool = True
    """On GPUs, for dense models without pipeline parallelism: record each decoding step and replay
    it; several times faster, for some memory."""


@dataclass(kw_only=True)
class RolloutConfig(DecodingConfig):
    """How the student generates the responses that it learns from."""

    num_samples_per_prompt: int = 1
    """Responses drawn for each prompt; must divide global_batch_size."""
    max_new_tokens: int = 1024
    """A response that reaches this many tokens without EOS is truncated."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are scored at 1, so that others make rollouts off-policy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    num_parts: int = 1
    """Parts that the responses of a step are generated in, one after the other: a teacher on ranks
    of its own (teacher.num_ranks) scores each while the student generates the next. A part should
    still fill micro_batch_size rows on each rank."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """Megatron's Adam, gradient clipping and learning-rate schedule."""

    lr: float = 5e-7
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached; by default train_steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms are never decayed."""
    adam_beta1: float = 0.9
    """Adam's first-moment decay."""
    adam_beta2: float = 0.95
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's denominator term."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Cut the optimizer state over the data-parallel ranks."""


@dataclass(kw_only=True)
class PromptConfig:
    """Evaluation prompts, how prompts are rendered, and how answers are checked."""

    eval_files: list[str] = field(default_factory=list)
    """JSONL files of held-out prompts with answers, in the formats of docs/evaluation.md; each file
    is reported under its stem."""
    eval_formats: dict[str, Any] = field(default_factory=dict)
    """Formats of eval_files by stem, such as {amc23 = "amc"}, where the fields of a file fit
    several: prompt, gsm8k, math500, aime, amc, minerva or olympiadbench."""
    max_prompt_length: int = 1024
    """A prompt with more tokens is refused at the start, with its file and line."""
    apply_chat_template: bool = False
    """Render prompts with the student folder's chat template ("prompt" is one user message)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking = false}."""
    prompt_suffix: str = ""
    """Text added to each prompt (to the last user message where messages are given)."""
    answer_check: Literal["exact", "math"] = "exact"
    """exact compares the text after answer_marker; math compares with math-verify
    (pip install 'poweropd_megatron[math]')."""
    answer_marker: str = "#"
    """With answer_check = exact: the answer is what follows the last of these in the response."""


@dataclass(kw_only=True)
class DataConfig(PromptConfig):
    """Prompts and how answers are checked."""

    train_files: list[str]
    """JSONL files, a prompt a line: {"prompt": str or "messages": [...], "answer": str}."""
    shuffle: bool = True
    """Draw the prompts of each epoch in a new seeded order."""


@dataclass(kw_only=True)
class AnsweringConfig:
    """How the prompts of data.eval_files are answered, and what is reported."""

    num_samples: int = 8
    """Responses per prompt for Avg@k and Pass@k; 0 leaves only the greedy answer."""
    pass_at: list[int] = field(default_factory=list)
    """Also report Pass@k for these k, at most num_samples, estimated without bias from all samples;
    Pass@num_samples is always reported."""
    greedy: bool = True
    """Also answer each prompt greedily (eval/greedy_accuracy)."""
    temperature: float = 0.6
    """Sampling temperature of Avg@k and Pass@k."""
    top_p: float = 1.0
    """Nucleus of Avg@k and Pass@k."""
    top_k: int = 0
    """Top-k of Avg@k and Pass@k; 0 keeps all."""
    max_new_tokens: int = 4096
    """Longest response of an evaluation."""
    max_prompts: int | None = None
    """Evaluate only the first this many prompts of each file."""


@dataclass(kw_only=True)
class EvalConfig(AnsweringConfig):
    """Evaluation on data.eval_files before, during and after training."""

    interval: int = 30
    """Steps between evaluations; 0 evaluates only before and after."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run's state is published under output_dir/checkpoints."""

    interval: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older complete checkpoints beyond this many are deleted."""


@dataclass(kw_only=True)
class TelemetryConfig:
    """What is shown and written."""

    log_interval: int = 1
    """Steps between lines in the log file; metrics.jsonl always has every step."""
    diagnostics_interval: int = 10
    """Steps between records of reward by position and over (p_T, p_S) for the report."""
    gradient_variance_interval: int = 0
    """Steps between estimates of the gradient's variance (docs/diagnostics.md), each of which costs
    one more forward and backward of the student; 0 makes none."""
    num_logged_samples: int = 8
    """Responses kept from each evaluation for the report."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, under output_dir/tensorboard
    (pip install 'poweropd_megatron[tensorboard]')."""
    wandb: Literal["off", "auto", "offline"] = "off"
    """Give the metrics to Weights & Biases, too (pip install 'poweropd_megatron[wandb]'). auto
    sends them if wandb has an API key; else, and with offline, they are kept under
    output_dir/wandb for `wandb sync`."""
    wandb_project: str = "poweropd"
    """Project of W&B's that the run belongs to."""


@dataclass(kw_only=True)
class TrainConfig:
    """One on-policy distillation run."""

    output_dir: str
    """Folder of everything that the run writes; running again with the same folder resumes."""
    seed: int = 1234
    """Seed of sampling and of the prompt order; the same seed gives the same run."""
    train_steps: int
    """Steps: each generates and scores a batch of responses and learns from it."""
    global_batch_size: int
    """Responses per step, over all ranks: one optimizer step, unless mini_batch_size is less."""
    mini_batch_size: int | None = None
    """Responses per optimizer step, over all ranks; must divide global_batch_size, whose parts of
    this size are learned from one after the other. Set objective.importance_ratio, too. By default
    global_batch_size."""
    micro_batch_size: int = 1
    """Responses per student forward/backward on each data-parallel rank, right-padded to the
    longest; not used with max_tokens_per_microbatch."""
    max_tokens_per_microbatch: int | None = None
    """Pack whole sequences (prompt and response) end to end into student forward/backwards of at
    most this many tokens on each data-parallel rank (context-parallel ones share them), without
    padding; a longer sequence has one to itself. By default micro_batch_size right-padded
    sequences. The results are the same."""
    distributed_timeout_minutes: float = 30.0
    """Longest wait in a collective before the run is ended with an error."""
    student: StudentConfig
    teacher: TeacherConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
