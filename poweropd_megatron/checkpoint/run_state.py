"""The whole state of a run at a step: what makes a resumed run the same run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from poweropd_megatron.checkpoint import sharded
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.data.prompts import PromptStream
from poweropd_megatron.errors import CheckpointError
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.train.student import Student

_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class RunState:
    """Student, optimizer, schedule, random states and prompt cursor, saved and loaded together.

    Ranks without the student have only random states and the cursor to save.
    """

    def __init__(
        self, student: Student, model: ModelConfig, prompts: PromptStream, store: CheckpointStore
    ) -> None:
        self._student = student
        self._model = asdict(model)
        self._prompts = prompts
        self._store = store

    def save(self, step: int) -> Path:
        """Return the published checkpoint of the state after `step`. Called by all ranks."""
        state = self._sharded_state(is_loading=False)
        state["rng"] = _own_rng(_rng_state())
        if self._student.layout.holds_model:
            state["schedule"] = self._student.schedule.state_dict()
        state["run"] = {
            "step": step,
            "prompts": self._prompts.state_dict(),
            "model": self._model,
            "world_size": dist.get_world_size(),
            "parallel": asdict(self._student.layout.parallel),
        }
        return sharded.save(state, self._store, step)

    def load_latest(self) -> int:
        """Return the newest checkpoint's step, after loading it; 0 if there is none.

        Called by all ranks.

        The parallel layout may differ from the one that saved; random states are restored where the
        number of ranks is the same (training draws from (seed, step), so nothing depends on them).
        Raises: CheckpointError if the checkpoint is corrupt or belongs to another model.
        """
        steps = self._store.steps()
        if not steps:
            return 0
        checkpoint = self._store.path(steps[-1])
        sharded.verify_together(checkpoint)
        run = sharded.load_common(checkpoint)["run"]
        if run["model"] != self._model:
            differing = [
                name for name in self._model if run["model"].get(name) != self._model[name]
            ]
            raise CheckpointError(
                f"{checkpoint} belongs to another student: {differing[0]} was "
                f"{run['model'].get(differing[0])}, student.path has {self._model[differing[0]]}; "
                "set student.path back, or choose another output_dir"
            )
        if self._student.layout.holds_model:
            _start_adam(self._student.optimizer)
        state = self._sharded_state(is_loading=True)
        same_world = run["world_size"] == dist.get_world_size()
        if same_world:
            state["rng"] = _own_rng(None)
        loaded = sharded.load(state, checkpoint)
        for number, chunk in enumerate(self._student.chunks):
            chunk.load_state_dict(loaded["model"][number], strict=False)
        if self._student.layout.holds_model:
            _load_optimizer(self._student.optimizer, loaded["optimizer"])
            self._student.schedule.load_state_dict(loaded["schedule"])
        self._prompts.load_state_dict(run["prompts"])
        if same_world:
            _set_rng_state(loaded["rng"])
        return int(run["step"])

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Return model and optimizer as sharded tensors, without the specs' _extra_state.

        The optimizer is a state by number: that of all weights, or of those outside the experts and
        of the experts, where other ranks hold copies of these than of the rest.
        """
        if not self._student.layout.holds_model:
            return {}
        self._student.finish_param_gather()
        model = {
            number: {
                name: value
                for name, value in chunk.sharded_state_dict().items()
                if not name.endswith("_extra_state")
            }
            for number, chunk in enumerate(self._student.chunks)
        }
        optimizer = self._student.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=_RESHARDABLE
        )
        parts = self._student.optimizer.chained_optimizers
        return {"model": model, "optimizer": optimizer if len(parts) > 1 else {0: optimizer}}


def _start_adam(optimizer: Any) -> None:
    """Give torch's Adam the state of step 0, which Megatron expects before it loads another.

    torch makes it at the first step; Apex's and Transformer Engine's Adam are started by Megatron.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_optimizer(optimizer: Any, states: dict[int, dict[str, Any]]) -> None:
    """Load the optimizer's states, also those of a run that had one for all weights."""
    parts = optimizer.chained_optimizers
    for number in range(1, len(parts)):
        _complete(states[number], states[0])
    for number, part in enumerate(parts):
        _load_part(part, states[number])


def _complete(of_experts: dict[str, Any], first: dict[str, Any]) -> None:
    """Give the experts' state what the other has beside tensors, if it was saved without.

    That is the same for all weights: learning rates, the step count, which weights don't decay.
    """
    theirs = first.get("optimizer", first)
    own = of_experts.setdefault("optimizer", {}) if "optimizer" in first else of_experts
    groups = own.get("param_groups", [])
    if any("lr" in group for group in groups):
        return
    parameters = {number: group["params"] for number, group in enumerate(groups)}
    own["param_groups"] = [
        group | {"is_expert_parallel": True, "params": parameters.get(number, [])}
        for number, group in enumerate(theirs["param_groups"])
    ]
    if "common_step" in theirs.get("state", {}):
        own["state"]["common_step"] = theirs["state"]["common_step"]


def _load_part(part: Any, state: dict[str, Any]) -> None:
    """Load one optimizer's state, also where torch's Adam keeps its step count beside the moments.

    megatron-core 0.19.2 looks for that count among the sharded tensors, where it isn't, so it is
    set aside while they are loaded; and it gives all parameters one count, which every one of them
    would then advance, so each gets its own.
    """
    sharded_state = state.pop("param_state", None)
    part.load_state_dict(state)
    moments = [entry for entry in part.optimizer.state.values() if "step" in entry]
    counts = [entry.pop("step").clone() for entry in moments]
    if sharded_state is not None:
        part.load_parameter_state_from_fully_reshardable(sharded_state)
    for entry, count in zip(moments, counts, strict=True):
        entry["step"] = count


def _own_rng(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
