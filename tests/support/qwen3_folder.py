"""Writes Hugging Face folders of random Qwen3 and Llama models, with plain safetensors."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
"""head_dim isn't hidden / heads, two query heads share a key head, and the vocabulary is odd."""

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""The changes that make it a Qwen3-MoE."""

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
"""The changes that make it a Llama."""


def random_tensors(config: dict[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Return the tensors of a model by name: logits of std near 2, norms far from 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = config["hidden_size"]
    width = config["head_dim"] or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width

    def matrix(rows: int, columns: int, gain: float = 1.5) -> Tensor:
        return gain * columns**-0.5 * torch.randn(rows, columns, generator=generator)

    def norm(size: int) -> Tensor:
        sign = torch.where(torch.rand(size, generator=generator) < 0.1, -1.0, 1.0)
        return sign * (0.3 + 1.5 * torch.rand(size, generator=generator))

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(hidden),
            prefix + "self_attn.q_proj.weight": matrix(queries, hidden),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden),
        }
        if config["model_type"] != "llama":
            tensors |= {f"{prefix}self_attn.{name}_norm.weight": norm(width) for name in "qk"}
        tensors |= {
            prefix + "self_attn.o_proj.weight": matrix(hidden, queries),
            prefix + "post_attention_layernorm.weight": norm(hidden),
        }
        mlps = {prefix + "mlp.": config["intermediate_size"]}
        if config["model_type"] == "qwen3_moe":
            tensors[prefix + "mlp.gate.weight"] = matrix(config["num_experts"], hidden)
            mlps = {
                f"{prefix}mlp.experts.{expert}.": config["moe_intermediate_size"]
                for expert in range(config["num_experts"])
            }
        for mlp, ffn in mlps.items():
            tensors |= {
                mlp + "gate_proj.weight": matrix(ffn, hidden),
                mlp + "up_proj.weight": matrix(ffn, hidden),
                mlp + "down_proj.weight": matrix(hidden, ffn),
            }
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def write(
    folder: Path,
    *,
    seed: int = 0,
    spelling: Literal["old", "transformers-5"] = "old",
    num_files: int = 1,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a random SMALL model with changes to its config.json; return its tensors."""
    config = SMALL | changes
    tensors = random_tensors(config, seed=seed)
    written = {name: value for name, value in config.items() if value is not None}
    if spelling == "transformers-5":
        written["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": written.pop("rope_theta"),
        }
        written["dtype"] = written.pop("torch_dtype")
        if "num_experts" in written:
            written["num_local_experts"] = written.pop("num_experts")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written))
    write_tensors(folder, tensors, num_files=num_files)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], *, num_files: int = 1) -> None:
    """Write tensors into one file, or dealt out over several with an index."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    file_of = {
        name: f"model-{number % num_files + 1:05}-of-{num_files:05}.safetensors"
        for number, name in enumerate(tensors)
    }
    for file_name in set(file_of.values()):
        part = {name: tensor for name, tensor in tensors.items() if file_of[name] == file_name}
        save_file(part, folder / file_name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
