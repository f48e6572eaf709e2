"""The shape of a Qwen3 model, read from its config.json."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.hf_folder import read_json


@dataclass(frozen=True, kw_only=True)
class Qwen3Experts:
    """The mixture of experts that a Qwen3-MoE has in each layer, under Megatron-Core's names."""

    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool
    """Whether the weights of a token's experts are scaled to a sum of 1 (Hugging Face's name)."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Dimensions of a Qwen3, dense or with experts, under Megatron-Core's names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    experts: Qwen3Experts | None = None
    """None: dense. With experts no layer has an MLP of ffn_hidden_size."""

    @classmethod
    def from_folder(cls, path: str | Path, *, setting: str) -> "Qwen3Config":
        """Return the shape that config.json states, in its old or its transformers-5 spelling.

        Raises: InputError if the folder holds no Qwen3, or one with features that aren't modelled.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"{setting}: {folder.absolute()} is not a folder")
        config_path = folder / "config.json"
        raw = read_json(config_path, setting)
        _refuse_what_is_not_modelled(raw, config_path, setting)

        rotary_base = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
        if rotary_base is None:
            raise InputError(
                f"{setting}: {config_path} has neither rope_theta nor rope_parameters.rope_theta"
            )
        raw["rope_theta"] = rotary_base

        if "num_local_experts" in raw:  # as transformers 5 spells it
            raw.setdefault("num_experts", raw["num_local_experts"])

        def value(name: str, kind: type[int] | type[float]) -> Any:
            found: Any = raw.get(name)
            is_number = isinstance(found, int | kind) and not isinstance(found, bool)
            if not is_number or not 0 < found <= sys.float_info.max:
                expected = "an integer" if kind is int else "a finite number"
                raise InputError(
                    f"{setting}: {config_path}: {name} is {found!r}, expected {expected} above 0"
                )
            return kind(found)

        return cls(
            num_layers=value("num_hidden_layers", int),
            hidden_size=value("hidden_size", int),
            ffn_hidden_size=value("intermediate_size", int),
            num_attention_heads=value("num_attention_heads", int),
            num_query_groups=value("num_key_value_heads", int),
            kv_channels=value("head_dim", int),
            vocab_size=value("vocab_size", int),
            max_position_embeddings=value("max_position_embeddings", int),
            layernorm_epsilon=value("rms_norm_eps", float),
            rotary_base=value("rope_theta", float),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            experts=_experts(raw, value, config_path, setting),
        )


def _experts(
    raw: dict[str, Any], value: Callable[..., Any], path: Path, setting: str
) -> Qwen3Experts | None:
    if raw["model_type"] == "qwen3":
        return None
    experts = Qwen3Experts(
        num_moe_experts=value("num_experts", int),
        moe_router_topk=value("num_experts_per_tok", int),
        moe_ffn_hidden_size=value("moe_intermediate_size", int),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
    )
    if experts.moe_router_topk > experts.num_moe_experts:
        raise InputError(
            f"{setting}: {path}: num_experts_per_tok is {experts.moe_router_topk}, more than the "
            f"{experts.num_moe_experts} experts"
        )
    return experts


def _refuse_what_is_not_modelled(raw: dict[str, Any], path: Path, setting: str) -> None:
    model_type = raw.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe"):
        raise InputError(
            f"{setting}: {path} has model_type {model_type!r}; supported are 'qwen3' (dense) and "
            "'qwen3_moe'"
        )
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise InputError(f"{setting}: {path}: {name} is {raw[name]!r}, expected an object")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_type": rope_type if rope_type != "default" else None,
        "use_sliding_window": raw.get("use_sliding_window"),
        "attention_bias": raw.get("attention_bias"),
        "quantization_config": raw.get("quantization_config"),
        "hidden_act": raw.get("hidden_act") if raw.get("hidden_act", "silu") != "silu" else None,
    }
    if model_type == "qwen3_moe":
        # Both leave some layers without experts, which no published model does.
        refused["mlp_only_layers"] = raw.get("mlp_only_layers")
        sparse_step = raw.get("decoder_sparse_step", 1)
        refused["decoder_sparse_step"] = sparse_step if sparse_step != 1 else None
    for name, found in refused.items():
        if found or (found == 0 and found is not False):
            raise InputError(f"{setting}: {path}: {name} = {found!r} is not supported")
