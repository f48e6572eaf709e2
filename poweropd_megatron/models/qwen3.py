"""The shape of a Qwen3 model, read from its config.json."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.hf_folder import read_json


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Dimensions of a dense Qwen3, under Megatron-Core's names."""

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
        )


def _refuse_what_is_not_modelled(raw: dict[str, Any], path: Path, setting: str) -> None:
    model_type = raw.get("model_type")
    if model_type != "qwen3":
        raise InputError(
            f"{setting}: {path} has model_type {model_type!r}; supported is 'qwen3' (dense Qwen3)"
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
    for name, found in refused.items():
        if found:
            raise InputError(f"{setting}: {path}: {name} = {found!r} is not supported")
