"""The runs of a comparison: which they are, and that they differ in what they may."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.comparison.recipe import GIVEN_BY_PLAN, Recipe
from poweropd_megatron.config.load import read_toml, to_toml, train_config
from poweropd_megatron.config.objective_rules import of_objective, refuse_unused
from poweropd_megatron.config.rules import frozen_differences
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError, UserError
from poweropd_megatron.telemetry.sinks import replace_text
from poweropd_megatron.train.inputs import read_inputs
from poweropd_megatron.train.output_folder import (
    CONFIG_NAME,
    check_same_run,
    finished_summary,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """One method with one seed."""

    method: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"{self.method} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Return its output_dir."""
        return Path(self.config.output_dir)

    @property
    def config_path(self) -> Path:
        """Return the file that its settings are given in, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.toml")

    @property
    def log_path(self) -> Path:
        """Return the file of what its processes say, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        """Return whether it has reached its last step and its export."""
        return finished_summary(self.config) is not None


def planned_runs(recipe: Recipe) -> list[PlannedRun]:
    """Return a comparison's runs: all methods with the first seed, then with the next one."""
    return [
        PlannedRun(
            method=method,
            seed=seed,
            config=train_config(
                recipe.train
                | settings
                | {
                    "output_dir": str(recipe.output_dir / "runs" / method / f"seed_{seed}"),
                    "seed": seed,
                }
            ),
        )
        for seed in recipe.seeds
        for method, settings in recipe.methods.items()
    ]


def check_runs(
    runs: Sequence[PlannedRun], methods: Mapping[str, Mapping[str, Any]], *, ranks: int
) -> None:
    """Return if every run could start, or go on, and they differ in the methods' settings alone.

    Raises: UserError that names the run, and what its settings, files or folder lack.
    """
    settings = {run: asdict(run.config) for run in runs}
    check_equal_but_for(methods, [(run.name, run.method, settings[run]) for run in runs])
    for run in runs:
        try:
            refuse_unused(of_objective(methods[run.method]), asdict(run.config.objective))
            if run.seed == runs[0].seed:  # The seed makes no difference to what is read.
                read_inputs(run.config, world_size=ranks).answer_checker.close()
            check_same_run(run.config)
            _check_recorded(run)
        except UserError as error:
            raise type(error)(f"{run.name}: {error}") from error


def check_equal_but_for(
    methods: Mapping[str, Mapping[str, Any]], runs: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> None:
    """Return if runs, as (name, method, settings), differ from the first in nothing but its
    method's and their own method's settings, seed and folder.

    Raises: ConfigError that names the run and the settings.
    """
    first_name, first_method, first_settings = runs[0]
    for name, method, settings in runs[1:]:
        may_differ = [*GIVEN_BY_PLAN, *methods[first_method], *methods[method]]
        differences = frozen_differences(first_settings, settings, changeable=may_differ)
        if differences:
            raise ConfigError(
                f"{name} differs from {first_name} in more than its method's settings: "
                f"{'; '.join(differences)}"
            )


def write_configs(runs: Sequence[PlannedRun]) -> None:
    """Write every run's settings to its config_path."""
    for run in runs:
        run.config_path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(run.config_path, to_toml(run.config))


def _check_recorded(run: PlannedRun) -> None:
    """Refuse a folder whose run had any other setting: half its records would be of those."""
    path = run.folder / CONFIG_NAME
    if not path.exists():
        return
    differences = frozen_differences(
        read_toml(path), asdict(run.config), changeable=("output_dir",)
    )
    if differences:
        raise ConfigError(
            f"{run.folder} holds a run with other settings: {'; '.join(differences)}. Choose "
            "another --output_dir, or remove that folder"
        )
