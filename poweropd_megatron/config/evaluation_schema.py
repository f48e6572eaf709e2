"""Every setting of `poweropd eval`; the parts that training has too are its own."""

from dataclasses import dataclass, field

from poweropd_megatron.config.schema import (
    AnsweringConfig,
    DecodingConfig,
    DType,
    PromptConfig,
    StudentConfig,
)


@dataclass(kw_only=True)
class EvaluationConfig:
    """One evaluation of one model."""

    output_dir: str
    """Folder of everything that the evaluation writes; running again with the same folder goes on
    where it stopped."""
    seed: int = 1234
    """Seed of sampling; each sample of each prompt has its own random numbers, whatever the layout
    and the batch sizes. With a run's seed and eval settings, they are that run's."""
    save_interval: int | None = None
    """Responses between writes to samples.jsonl, which is what a killed evaluation loses at most;
    by default 4 times as many as are decoded at once."""
    logits_dtype: DType = "fp32"
    """Type of the logits, as objective.logits_dtype in training."""
    distributed_timeout_minutes: float = 30.0
    """Longest wait in a collective before the evaluation is ended with an error."""
    student: StudentConfig
    rollout: DecodingConfig = field(default_factory=DecodingConfig)
    data: PromptConfig
    eval: AnsweringConfig = field(default_factory=AnsweringConfig)
