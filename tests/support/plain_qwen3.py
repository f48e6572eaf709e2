"""Qwen3 and Llama in fp64 on Hugging Face tensors: the truth about logits, rollouts and gradients.

Uses nothing of the package or of Megatron; test_layers.py compares it with transformers.
Shapes: B sequences, T tokens, Hq query heads, Hk key heads, D channels a head, V vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu


class PlainQwen3:
    """The weights as fp64 leaves that take gradients, and the forward over whole sequences."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: x.double().requires_grad_() for name, x in tensors.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> "PlainQwen3":
        """Return the model of a folder with one safetensors file."""
        config = json.loads((folder / "config.json").read_text())
        return cls(config, load_file(folder / "model.safetensors"))

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the token after each position, [B, T, V]."""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[ids_BT]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(
                self._norm(x, prefix + "input_layernorm"), prefix + "self_attn."
            )
            x = x + self._mlp(self._norm(x, prefix + "post_attention_layernorm"), prefix + "mlp.")
        head = self.weights.get("lm_head.weight", embedding)
        return self._norm(x, "model.norm") @ head.T

    def logprobs(self, ids_BT: Tensor) -> Tensor:
        """Return the log-distribution of the token at each position, [B, T, V]; NaN at 0."""
        logp_BTV = self.logits(ids_BT).log_softmax(dim=-1)
        return torch.cat([torch.full_like(logp_BTV[:, :1], torch.nan), logp_BTV[:, :-1]], dim=1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return (
            x / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]
        )

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        if f"{prefix}gate.weight" in self.weights:
            return self._experts(x, prefix)
        gate, up, down = (self.weights[f"{prefix}{n}_proj.weight"] for n in ("gate", "up", "down"))
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        """Return every expert's output, weighted with 0 where it is not among the best."""
        weights = (x @ self.weights[f"{prefix}gate.weight"].T).softmax(dim=-1)
        worst = weights.topk(self.config["num_experts_per_tok"], dim=-1).values[..., -1:]
        weights = torch.where(weights >= worst, weights, 0.0)
        if self.config["norm_topk_prob"]:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = [
            self._mlp(x, f"{prefix}experts.{expert}.") for expert in range(weights.shape[-1])
        ]
        return (torch.stack(outputs, dim=-1) * weights.unsqueeze(-2)).sum(dim=-1)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        heads_in_all = self.config["num_attention_heads"]
        width = self.config.get("head_dim") or self.config["hidden_size"] // heads_in_all

        def heads(name: str) -> Tensor:
            return (x @ self.weights[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (-1, width))

        query, key = heads("q"), heads("k")
        if prefix + "q_norm.weight" in self.weights:
            query, key = self._norm(query, prefix + "q_norm"), self._norm(key, prefix + "k_norm")
        query, key = self._rotate(query), self._rotate(key)
        shared_by = query.shape[2] // key.shape[2]
        key = key.repeat_interleave(shared_by, dim=2)
        value = heads("v").repeat_interleave(shared_by, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / width**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        return attended.flatten(2) @ self.weights[prefix + "o_proj.weight"].T

    def _rotate(self, x: Tensor) -> Tensor:
        """Return [B, T, heads, D] turned by each position's angles; i and i + D/2 are a pair."""
        half = x.shape[-1] // 2
        base = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        angle = torch.outer(
            torch.arange(x.shape[1], dtype=torch.float64),
            base ** -(torch.arange(half, dtype=torch.float64) / half),
        )[:, None, :]
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=-1,
        )
