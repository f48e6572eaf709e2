"""The prompts of data.eval_files, by file."""

from collections.abc import Sequence
from itertools import groupby

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.data.prompts import Prompt, load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import ConfigError


def read_eval_prompts(
    data: PromptConfig, tokenizer: Tokenizer, *, max_prompts: int | None
) -> dict[str, list[Prompt]]:
    """Return the first max_prompts prompts of each file by its stem, in the files' order.

    Raises: InputError naming the file and line; ConfigError if answers need another check.
    """
    prompts = load_prompts(
        data.eval_files, tokenizer, data, setting="data.eval_files", need_answers=True
    )
    if data.answer_check == "exact":
        _refuse_tolerances(prompts)
    return {
        source: list(group)[:max_prompts]
        for source, group in groupby(prompts, key=lambda prompt: prompt.source)
    }


def longest(prompts_by_source: dict[str, list[Prompt]]) -> int:
    """Return the tokens of the longest prompt of all files, 0 without any."""
    lengths = [len(p.token_ids) for prompts in prompts_by_source.values() for p in prompts]
    return max(lengths, default=0)


def _refuse_tolerances(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.tolerance is not None:
            raise ConfigError(
                f"data.answer_check = 'exact' compares texts, but {prompt.source} allows answers "
                f"to differ by up to {prompt.tolerance:g}: set data.answer_check = 'math'"
            )
