"""The chain-sum student with experts, for the layouts that share them out."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NUM_EXPERTS, TOP_K = 4, 2


def write_expert_student(dense: Path, folder: Path) -> None:
    """Write the dense student as a Qwen3-MoE whose experts are all its feed-forward layer.

    It answers as the dense one does, whatever its random router chooses: the chosen ones' weights
    add up to 1. So it generates responses of the same length, for what experts cost to compare.
    """
    shutil.copytree(dense, folder)
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        before, in_mlp, after = name.partition(".mlp.")
        if not in_mlp:
            tensors[name] = tensor
            continue
        for expert in range(NUM_EXPERTS):
            tensors[f"{before}.mlp.experts.{expert}.{after}"] = tensor.clone()
        tensors[f"{before}.mlp.gate.weight"] = torch.randn(
            NUM_EXPERTS, config["hidden_size"], generator=generator
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
