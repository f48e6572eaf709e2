"""Make the chain-sum teacher, student and prompt files from a seed.

    python examples/chain_sum/make_checkpoints.py --output DIR

Both models have the same Qwen3 shape and supervised recipe (transformers' Qwen3ForCausalLM, one CPU
thread, fp32). The teacher runs all steps; the student, of another seed, stops at the first
evaluation whose greedy accuracy lies in its band. Same seed, same machine: the same bytes.
"""

import argparse
import json
import math
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from poweropd_megatron.data.chain_sum import (
    CHARACTERS,
    Problem,
    distinct_problems,
    sample_problems,
)

SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
PAD_ID, EOS_ID, _ = range(3)
NUM_TRAIN_PROMPTS = 4096
NUM_EVAL_PROMPTS = 512
STUDENT_BAND = (0.38, 0.44)

# vocab_size is the 18 pieces rounded up to a multiple of 8. As in most Qwen3 sizes, head_dim is not
# hidden_size / heads. Heads, ffn, vocabulary and layers divide by 4, so that TP 4 and PP 4 work.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.08,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD_ID,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 24,
}


def build_tokenizer() -> Tokenizer:
    """Return the character tokenizer: 18 pieces, nothing added to what is encoded."""
    pieces = [*SPECIAL_TOKENS, *CHARACTERS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_TOKENS]
    )
    return tokenizer


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 model of MODEL_CONFIG with seeded random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**MODEL_CONFIG, attn_implementation="sdpa"))


def build_batch(problems: list[Problem], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return token ids and labels (-100 outside the solutions). Shapes: both [B, T]."""
    rows = [[*tokenizer.encode(p.prompt + p.solution).ids, EOS_ID] for p in problems]
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), PAD_ID)
    labels_BT = torch.full((len(rows), longest), -100)
    for index, (problem, row) in enumerate(zip(problems, rows, strict=True)):
        start = len(problem.prompt)
        ids_BT[index, : len(row)] = torch.tensor(row)
        labels_BT[index, start : len(row)] = torch.tensor(row[start:])
    return ids_BT, labels_BT


@torch.no_grad()
def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: list[Problem]
) -> float:
    """Return the share of problems whose greedy response ends with EOS and the right sum."""
    model.eval()
    num_correct = 0
    by_length = sorted(problems, key=lambda problem: len(problem.prompt))
    for length, group in groupby(by_length, key=lambda problem: len(problem.prompt)):
        members = list(group)
        prompts_BT = torch.tensor([tokenizer.encode(p.prompt).ids for p in members])
        output_BT = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=64,
            do_sample=False,
        )
        for problem, response in zip(members, output_BT[:, length:].tolist(), strict=True):
            text = tokenizer.decode(response, skip_special_tokens=True)
            answer = text.rpartition("#")[2]
            num_correct += EOS_ID in response and "#" in text and answer == problem.answer
    model.train()
    return num_correct / len(problems)


def learning_rate(step: int, *, num_steps: int, peak: float) -> float:
    """Return the rate of a step: 50 steps of warm-up, then a cosine down to a tenth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return peak * min(1.0, (step + 1) / 50) * (0.1 + 0.9 * cosine)


def train(
    name: str,
    *,
    seed: int,
    num_steps: int,
    eval_interval: int,
    stop_band: tuple[float, float],
    held_out: list[Problem],
    args: argparse.Namespace,
) -> tuple[Qwen3ForCausalLM, float, int]:
    """Return the model, its held-out greedy accuracy and its steps, trained on seeded problems."""
    tokenizer = build_tokenizer()
    model = build_model(seed)
    problems = sample_problems(seed=seed, split="train")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    accuracy = 0.0
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps=args.teacher_steps, peak=args.lr)
        ids_BT, labels_BT = build_batch(list(islice(problems, args.batch_size)), tokenizer)
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % eval_interval == 0 or step + 1 == num_steps:
            accuracy = greedy_accuracy(model, tokenizer, held_out)
            print(f"{name} step {step + 1} loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)
            if stop_band[0] <= accuracy <= stop_band[1]:
                break
    return model, accuracy, step + 1


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one readable JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: Qwen3ForCausalLM) -> None:
    """Write a Hugging Face folder: config, generation config, fp32 weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", MODEL_CONFIG)
    write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    # lm_head.weight is the embedding, so it isn't stored twice.
    weights = {
        key: value.contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
        },
    )


def write_prompts(path: Path, problems: list[Problem]) -> None:
    """Write one {"prompt", "answer"} a line."""
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems]
    path.write_text("".join(lines), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--teacher_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    return parser.parse_args()


def main() -> None:
    """Write prompt files, then train and write the teacher and the student."""
    args = parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    held_out = distinct_problems(NUM_EVAL_PROMPTS, seed=args.seed, split="eval")
    write_prompts(args.output / "eval.jsonl", held_out)
    write_prompts(
        args.output / "train.jsonl",
        distinct_problems(NUM_TRAIN_PROMPTS, seed=args.seed, split="train"),
    )
    runs = {
        "teacher": {"seed": args.seed, "eval_interval": 100, "stop_band": (2.0, 2.0)},
        "student": {"seed": args.seed + 1, "eval_interval": 10, "stop_band": STUDENT_BAND},
    }
    for name, settings in runs.items():
        model, accuracy, steps = train(
            name, num_steps=args.teacher_steps, held_out=held_out, args=args, **settings
        )
        write_checkpoint(args.output / name, model)
        print(f"{name}: {steps} steps, greedy accuracy {accuracy:.4f} on {len(held_out)} prompts")


if __name__ == "__main__":
    main()
