"""Everything that a run tells: console, metrics, diagnostics, samples, summary, report.

Only rank 0 writes; on the others every method returns at once.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poweropd_megatron import interruption
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.objective import KINDS
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.evaluation.evaluator import Evaluation
from poweropd_megatron.interruption import Interrupted
from poweropd_megatron.telemetry.console import Console
from poweropd_megatron.telemetry.report import write_report
from poweropd_megatron.telemetry.sinks import JsonlSink, read_jsonl, write_json_atomically
from poweropd_megatron.telemetry.text import objective_label
from poweropd_megatron.telemetry.trackers import (
    CLOSE_SECONDS,
    INTERRUPTED_CLOSE_SECONDS,
    BackgroundTracker,
    start_trackers,
)
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.clock import TRAINING_PHASES
from poweropd_megatron.train.inputs import RunInputs


class Recorder:
    """The run's voice and memory, on rank 0."""

    def __init__(self, config: TrainConfig, *, is_first_rank: bool) -> None:
        self._config = config
        self.folder = Path(config.output_dir)
        self.is_first_rank = is_first_rank
        self._metrics = JsonlSink(self.folder / "metrics.jsonl")
        self._diagnostics = JsonlSink(self.folder / "diagnostics.jsonl")
        self._samples = JsonlSink(self.folder / "samples.jsonl")
        self._trackers: Sequence[BackgroundTracker] = ()
        self._console: Console | None = None
        self._longest_told: dict[str, int] = {}

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Open the console for the length of the block."""
        if not self.is_first_rank:
            yield
            return
        with Console(
            self.folder / "train.log",
            total_steps=self._config.train_steps,
            log_interval=self._config.telemetry.log_interval,
        ) as self._console:
            close_seconds = CLOSE_SECONDS
            try:
                with interruption.raised():
                    yield
            except Interrupted as signal:
                self._console.info(self._interrupted())
                signal.is_told = True
                close_seconds = INTERRUPTED_CLOSE_SECONDS
                raise
            finally:
                for tracker in self._trackers:
                    tracker.close(seconds=close_seconds)

    def _interrupted(self) -> str:
        assert self._console
        saved = CheckpointStore(self.folder / "checkpoints").steps()
        checkpoint = f"checkpoint of step {saved[-1]} is there" if saved else "no checkpoint yet"
        return (
            f"interrupted after step {self._console.last_step}; {checkpoint}; run the same command "
            "again to go on"
        )

    def introduce(self, inputs: RunInputs) -> None:
        """Say what is trained on what, and warn of settings whose effect is easily overlooked."""
        config = self._config
        teacher_budget = config.teacher.max_tokens_per_microbatch
        for name, part, shape, budget in (
            ("student", config.student, inputs.student, config.max_tokens_per_microbatch),
            ("teacher", config.teacher, inputs.teacher, teacher_budget),
        ):
            parallel, experts = part.parallel, shape.experts
            chunks = parallel.virtual_pipeline_model_parallel_size
            context = parallel.context_parallel_size
            self.info(
                f"{name}: {part.path}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
                + (f"{experts.num_moe_experts} experts, " if experts else "")
                + f"{part.dtype}, TP {parallel.tensor_model_parallel_size} x "
                f"PP {parallel.pipeline_model_parallel_size}"
                + (f" in {chunks} chunks each" if chunks else "")
                + (f" x CP {context}" if context > 1 else "")
                + (f", EP {parallel.expert_model_parallel_size}" if experts else "")
                + (" with sequence parallelism" if parallel.sequence_parallel else "")
                + (f", packed into micro-batches of up to {budget} tokens" if budget else "")
                + (_own_ranks(config) if name == "teacher" else "")
            )
        num_eval = sum(len(prompts) for prompts in inputs.eval_prompts.values())
        self.info(
            f"prompts: {len(inputs.train_prompts)} to train on, {num_eval} held out; objective: "
            f"{objective_label(asdict(config.objective))}, {config.objective.head} LM head"
        )
        rollout, weighed = config.rollout, config.objective.importance_ratio != "none"
        can_weigh = KINDS[config.objective.kind].family == "sampled" and not weighed
        if config.mini_batch_size not in (None, config.global_batch_size) and not weighed:
            self.warning(
                f"all but the first of the mini-batches of {config.mini_batch_size} responses are "
                "of weights that have been updated since"
                + ("; objective.importance_ratio = 'token' weighs them" if can_weigh else "")
            )
        if rollout.temperature != 1 or rollout.top_p < 1 or rollout.top_k:
            self.warning(
                f"responses are drawn at temperature {rollout.temperature:g}, "
                f"top_p {rollout.top_p:g}, top_k {rollout.top_k}, but scored with the whole "
                "softmax at temperature 1; rollout/truncated_mass and rollout/logp_gap say how "
                "far apart that is"
                + (", objective.importance_ratio weighs them" if can_weigh else "")
            )

    def info(self, text: str) -> None:
        """Say a line."""
        if self._console:
            self._console.info(text)

    def warning(self, text: str) -> None:
        """Say something that the user should look into."""
        if self._console:
            self._console.warning(text)

    def tell_of_oversized(
        self, step: int, batchings: Mapping[str, Batching], lengths: Sequence[int]
    ) -> None:
        """Warn of sequences beyond a packed micro-batch's budget, when there are longer ones."""
        for model, batching in batchings.items():
            oversized = batching.oversized(lengths)
            longest = max(oversized, default=0)
            if longest > self._longest_told.get(model, 0):
                self._longest_told[model] = longest
                setting = "max_tokens_per_microbatch"
                setting = setting if model == "student" else f"{model}.{setting}"
                self.warning(
                    f"step {step}: {len(oversized)} of {len(lengths)} sequences, the longest of "
                    f"{longest} tokens with padding, exceed {setting} = "
                    f"{batching.max_tokens_per_microbatch}: the {model} takes each by itself, "
                    "with that much more memory"
                )

    def phase(self, name: str) -> None:
        """Show what is being done now."""
        if self._console:
            self._console.phase(name)

    def start(self, step: int) -> None:
        """Begin after `step`, 0 for a new run; what a crashed run recorded later is dropped."""
        if self._console:
            for sink in (self._metrics, self._diagnostics, self._samples):
                sink.truncate_after(step or -1)
            self._metrics.path.touch()  # The user may have deleted it.
            self._trackers = start_trackers(
                self._config.telemetry,
                self.folder,
                step=step,
                settings=asdict(self._config),
                warn=self._console.warning,
            )
            self._console.start(step)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        diagnostics: Mapping[str, Any] | None,
        evaluation: Evaluation | None,
    ) -> None:
        """Record a finished step, and the evaluation after it."""
        if self._console:
            if diagnostics is not None:
                self._diagnostics.write({"step": step, **diagnostics})
            if metrics:
                self._console.step(step, metrics)
            evaluated = self._tell_evaluation(step, evaluation)
            self._metrics.write({"step": step, **metrics, **evaluated})
            self._track(step, {**metrics, **evaluated})

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation of a step, in that step's line if it was recorded before."""
        if self._console:
            records = read_jsonl(self._metrics.path) if self._metrics.path.exists() else []
            recorded = records[-1] if records and records[-1]["step"] == step else {}
            for sink in (self._metrics, self._samples):
                sink.truncate_after(step - 1)
            evaluated = self._tell_evaluation(step, evaluation)
            self._metrics.write({"step": step, **recorded, **evaluated})
            self._track(step, evaluated)

    def finish(self, export: Path) -> None:
        """Write summary.json and report.html, and say what improved and where everything lies."""
        if not self._console:
            return
        summary = summarise(read_jsonl(self._metrics.path), self._config, export)
        write_json_atomically(self.folder / "summary.json", summary)
        write_report(self.folder)
        self._console.finish(summary, self.folder)

    def _tell_evaluation(self, step: int, evaluation: Evaluation | None) -> Mapping[str, float]:
        """Show an evaluation, write its samples, and return its metrics."""
        if evaluation is None:
            return {}
        assert self._console
        self._console.evaluation(step, evaluation.metrics)
        for sample in evaluation.samples:
            self._samples.write({"step": step, **sample})
        return evaluation.metrics

    def _track(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(step, metrics)


def _own_ranks(config: TrainConfig) -> str:
    """Return where the teacher is and when, unless it shares the student's ranks all the time."""
    own = config.teacher.num_ranks
    if own is not None:
        return f", on {own} {'rank' if own == 1 else 'ranks'} of its own"
    return ", in CPU memory between scores" if config.teacher.offload else ""


def summarise(records: list[dict[str, Any]], config: TrainConfig, export: Path) -> dict[str, Any]:
    """Return the contents of a finished run's summary.json, from the records of metrics.jsonl.

    Times and gradient norms are of the steps that are recorded there: all, unless the user deleted
    the file.
    """
    evaluations = [
        {name.removeprefix("eval/"): value for name, value in record.items() if name[:5] == "eval/"}
        for record in records
    ]
    evaluations = [evaluation for evaluation in evaluations if evaluation]
    steps = [record for record in records if "grad_norm" in record]
    norms = [record["grad_norm"] for record in steps]
    return {
        "before": evaluations[0] if evaluations else {},
        "after": evaluations[-1] if evaluations else {},
        "steps": config.train_steps,
        "train_seconds": sum(
            record.get(f"time/{phase}_seconds") or 0.0
            for record in steps
            for phase in TRAINING_PHASES
        ),
        "grad_norm": {"median": statistics.median(norms), "max": max(norms)} if norms else {},
        "objective": asdict(config.objective),
        "student": config.student.path,
        "teacher": config.teacher.path,
        "export": str(export),
    }
