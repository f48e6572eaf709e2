"""What the settings of prompts and of an evaluation must be together."""

from collections import Counter

from poweropd_megatron.config.schema import AnsweringConfig, PromptConfig
from poweropd_megatron.errors import ConfigError


def check_prompts(data: PromptConfig) -> None:
    """Return if prompts can be rendered and answers checked. Raises: ConfigError."""
    if data.answer_check == "exact" and not data.answer_marker:
        raise ConfigError(
            "data.answer_marker must not be empty with data.answer_check = 'exact': "
            "the answer is what follows it; '#' is the default"
        )
    if data.chat_template_kwargs and not data.apply_chat_template:
        raise ConfigError(
            f"data.chat_template_kwargs = {data.chat_template_kwargs} needs "
            "data.apply_chat_template = true; set that, or give no chat_template_kwargs"
        )


def check_answering(evaluation: AnsweringConfig) -> None:
    """Return if there is something to answer, and Pass@k can be estimated. Raises: ConfigError."""
    samples = evaluation.num_samples
    if samples == 0 and not evaluation.greedy:
        raise ConfigError(
            "eval.num_samples = 0 with eval.greedy = false leaves no answer to evaluate: "
            "change either, or set data.eval_files = []"
        )
    for k, times in Counter(evaluation.pass_at).items():
        if not 1 <= k <= samples:
            raise ConfigError(
                f"eval.pass_at has {k}, but Pass@k can be estimated for k from 1 to "
                f"eval.num_samples = {samples}: remove it, or raise eval.num_samples"
            )
        if times > 1:
            raise ConfigError(f"eval.pass_at has {k} {times} times: give it once")
