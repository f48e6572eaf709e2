"""Run as a process of its own: `transformers`' logits of a folder, in fp32.

    python -m poweropd_megatron.inspection.transformers_logits FOLDER IDS_FILE LOGITS_FILE

A process of its own, because the CPU device patches tensor methods in the one that runs Megatron.
The files are safetensors; rows of token ids, of any length each, have the names 0, 1, ... there.
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def main(folder: str, ids_file: str, logits_file: str) -> None:
    """Write the logits, [T, V], of each row of ids, [T]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = {row: model(ids[None]).logits[0] for row, ids in load_file(ids_file).items()}
    save_file(logits, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
