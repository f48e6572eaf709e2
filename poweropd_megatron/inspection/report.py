"""Findings for people and for programs."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from poweropd_megatron.inspection.findings import KIND_NAMES, Findings
from poweropd_megatron.models.model_config import ModelConfig

_WIDTH = 12


def line(name: str, text: str) -> str:
    """Return a row of the table: a name, and what there is to say, aligned."""
    return f"{name:<{_WIDTH}}{text}"


def describe(findings: Findings) -> list[str]:
    """Return what a folder is and holds, a line each."""
    lines = [str(findings.path), line("kind", KIND_NAMES[findings.kind])]
    if findings.model is not None:
        lines.append(line("model", shape_of(findings.model)))
    if findings.tensors:
        lines += [
            line("parameters", f"{findings.num_parameters:,} in {len(findings.tensors)} tensors"),
            line("dtype", _counted(findings)),
            line("size", f"{sized(sum(findings.files.values()))} in {_files(findings)}"),
        ]
    lines += [line(name, text) for name, text in findings.facts.items()]
    lines += [line("note", note) for note in findings.notes]
    lines.append(line("complete", "no" if findings.problems else "yes"))
    return lines + wrong(findings.problems)


def wrong(problems: Iterable[str]) -> list[str]:
    """Return a line for each problem."""
    return [line("wrong", problem) for problem in problems]


def as_json(findings: Findings) -> dict[str, Any]:
    """Return the same as an object of plain values."""
    return {
        "path": str(findings.path),
        "kind": findings.kind,
        "model": asdict(findings.model) if findings.model else None,
        "num_parameters": findings.num_parameters,
        "num_tensors": len(findings.tensors),
        "dtypes": dict(findings.dtypes),
        "files": findings.files,
        "facts": findings.facts,
        "complete": not findings.problems,
        "problems": findings.problems,
        "notes": findings.notes,
    }


def shape_of(model: ModelConfig) -> str:
    """Return a model's family and shape in one line."""
    experts = model.experts
    feed_forward = (
        f"ffn {model.ffn_hidden_size}"
        if experts is None
        else f"{experts.num_moe_experts} experts of {experts.moe_ffn_hidden_size}, "
        f"{experts.moe_router_topk} a token"
    )
    return (
        f"{model.model_type}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_query_groups} KV) of {model.kv_channels}, "
        f"{feed_forward}, vocabulary {model.vocab_size}, "
        f"{'tied' if model.tie_word_embeddings else 'untied'}"
    )


def sized(num_bytes: int) -> str:
    """Return a size in a unit that leaves one to three digits before the point."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def _counted(findings: Findings) -> str:
    dtypes = findings.dtypes.most_common()
    if len(dtypes) == 1:
        return dtypes[0][0]
    return ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes)


def _files(findings: Findings) -> str:
    count = len(findings.files)
    return f"{count} file{'s' if count != 1 else ''}"
