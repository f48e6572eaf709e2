"""Run as a process of its own: transformers' logits for each folder given, on its ids.safetensors.

A process of its own, because the CPU device patches tensor methods in the one that runs Megatron.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(folders: list[str]) -> None:
    """Write logits.safetensors, [B, T, V] fp32, into each folder."""
    from transformers import AutoModelForCausalLM

    for folder in map(Path, folders):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        assert model.config.architectures == [type(model).__name__]
        with torch.no_grad():
            logits = model(load_file(folder / "ids.safetensors")["ids"]).logits
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
