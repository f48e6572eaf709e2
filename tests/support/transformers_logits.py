"""Run as a process of its own: transformers' logits for each folder given, on its ids.pt.

A process of its own, because the CPU device patches tensor methods in the one that runs Megatron.
"""

import sys
from pathlib import Path

import torch


def main(folders: list[str]) -> None:
    """Write logits.pt, [B, T, V] fp32, into each folder."""
    from transformers import AutoModelForCausalLM

    for folder in map(Path, folders):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        assert model.config.architectures == [type(model).__name__]
        with torch.no_grad():
            logits = model(torch.load(folder / "ids.pt")).logits
        torch.save(logits, folder / "logits.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
