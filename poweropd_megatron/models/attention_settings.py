"""Whether the attention that a run asks for can be had, before a model is built."""

from collections.abc import Sequence
from importlib.util import find_spec

from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_te_version

from poweropd_megatron.config.choices import listed
from poweropd_megatron.config.schema import StudentConfig, TeacherConfig, TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.models.transformer_engine import why_not_transformer_engine

_FLASH_PACKAGES = ("flash_attn", "flash_attn_3", "flash_attn_interface")
"""The modules of flash-attn's generations, of which Transformer Engine takes the newest."""
_EXCHANGES = ("p2p", "a2a")
"""Values of cp_comm_type; torch's attention gathers, and Megatron's "a2a+p2p" needs groups of ranks
that aren't made here."""


def check_attention_settings(config: TrainConfig) -> None:
    """Return if both models can have the attention that attention_backend and cp_comm_type name.

    Raises: ConfigError that names the setting, and what to use instead.
    """
    models: list[StudentConfig | TeacherConfig] = [config.student, config.teacher]
    for name, part in zip(("student", "teacher"), models, strict=True):
        _check_backend(name, part, models)
        _check_exchange(name, part)
    student, teacher = map(_backend, models)
    if student is not teacher and config.teacher.num_ranks is None:
        raise ConfigError(
            f"student.megatron.attention_backend = {student.name!r} and "
            f"teacher.megatron.attention_backend = {teacher.name!r}: Megatron sets it for a whole "
            "process, so give both models the same"
        )


def describe_attention(config: TrainConfig) -> str:
    """Return whose attention the models have, a line for the log."""
    student, teacher = _described(config.student), _described(config.teacher)
    if student == teacher:
        return f"attention: {student}"
    return f"attention: the student has {student}; the teacher {teacher}"


def _described(part: StudentConfig | TeacherConfig) -> str:
    if reason := why_not_transformer_engine(_backend(part), part.dtype):
        return f"torch's, for {reason}"
    kernels = _backend(part)
    chosen = "" if kernels is AttnBackend.auto else f", {kernels.name} kernels"
    return f"Transformer Engine {get_te_version()}'s{chosen}; torch's in rollouts"


def _backend(part: StudentConfig | TeacherConfig) -> AttnBackend:
    given: str = part.megatron.get("attention_backend", AttnBackend.auto.name)
    return AttnBackend[given]


def _check_backend(
    name: str,
    part: StudentConfig | TeacherConfig,
    models: Sequence[StudentConfig | TeacherConfig],
) -> None:
    """Refuse a kernel that neither model can have; one that can't shares the setting only."""
    backend = _backend(part)
    if backend in (AttnBackend.auto, AttnBackend.local):
        return
    setting = f"{name}.megatron.attention_backend = {backend.name!r}"
    reason = why_not_transformer_engine(backend, part.dtype)
    if reason and all(why_not_transformer_engine(backend, model.dtype) for model in models):
        raise ConfigError(
            f"{setting} names a kernel of Transformer Engine's, but {reason}: leave it out, for "
            "torch's attention"
        )
    if backend is AttnBackend.unfused:
        raise ConfigError(
            f"{setting} keeps scores of length x length, rounded to bf16: choose 'flash', 'fused' "
            "or 'local', or leave it out"
        )
    if backend is AttnBackend.flash and not any(map(find_spec, _FLASH_PACKAGES)):
        raise ConfigError(
            f"{setting} needs flash-attn, which is not installed: pip install flash-attn, choose "
            "'fused' or 'local', or leave it out"
        )


def _check_exchange(name: str, part: StudentConfig | TeacherConfig) -> None:
    exchange = part.megatron.get("cp_comm_type")
    if exchange is None:
        return
    setting = f"{name}.megatron.cp_comm_type"
    if exchange not in _EXCHANGES:
        raise ConfigError(
            f"{setting} must be {listed(repr(known) for known in _EXCHANGES)}, not {exchange!r}"
        )
    if part.parallel.context_parallel_size == 1:
        raise ConfigError(
            f"{setting} = {exchange!r} has no effect without "
            f"{name}.parallel.context_parallel_size > 1: set that, or leave it out"
        )
    if reason := why_not_transformer_engine(_backend(part), part.dtype):
        raise ConfigError(
            f"{setting} = {exchange!r} is for Transformer Engine's attention, but {reason}: leave "
            "it out, and keys and values are gathered"
        )
