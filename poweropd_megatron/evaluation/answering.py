"""Prompts answered and the answers checked: what training and `poweropd eval` have in common.

The responses of a file come in series, of greedy answers and of samples; each is numbered prompt by
prompt, and its random numbers depend on the seed, the file's place, and that number alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poweropd_megatron.config.schema import AnsweringConfig
from poweropd_megatron.data.answers import AnswerChecker, Verdict
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.rollout.engine import RolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import FINISH_STOP, Trajectories

EVAL_STREAM = 1
"""First number of the random streams of evaluations; the same numbers at every evaluation of a run.
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The responses to the prompts of one file in one way, num_samples to each prompt."""

    source: str
    file_number: int
    prompts: Sequence[Prompt]
    num_samples: int
    sampling: Sampling

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely tokens are taken."""
        return self.sampling.temperature == 0

    @property
    def num_responses(self) -> int:
        """Return how many responses there are."""
        return len(self.prompts) * self.num_samples

    @property
    def stream(self) -> tuple[int, int]:
        """Return what the random numbers depend on, beside the seed and a response's number."""
        return EVAL_STREAM, self.file_number

    def prompt_of(self, number: int) -> Prompt:
        """Return the prompt that a response answers."""
        return self.prompts[number // self.num_samples]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response, and what came of checking it."""

    response: str
    num_tokens: int
    """Of the response, its EOS included."""
    stopped: bool
    """Whether it ended with EOS, not at eval.max_new_tokens."""
    verdict: Verdict


def series_of(
    config: AnsweringConfig, prompts_by_source: Mapping[str, Sequence[Prompt]]
) -> list[Series]:
    """Return the series of each file, greedy answers first."""
    ways = [(1, Sampling(max_new_tokens=config.max_new_tokens, temperature=0.0))]
    ways = ways if config.greedy else []
    if config.num_samples:
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        ways.append((config.num_samples, sampling))
    return [
        Series(
            source=source,
            file_number=number,
            prompts=prompts,
            num_samples=num_samples,
            sampling=sampling,
        )
        for number, (source, prompts) in enumerate(prompts_by_source.items())
        for num_samples, sampling in ways
    ]


def generate(
    engine: RolloutEngine, series: Series, start: int, stop: int, *, weight_version: int
) -> Trajectories:
    """Return the responses of a series from number `start` to before `stop`. Called by all ranks.

    They don't depend on how a series is cut into such parts.
    """
    return engine.generate(
        [series.prompt_of(number).token_ids for number in range(start, stop)],
        series.sampling,
        stream=series.stream,
        weight_version=weight_version,
        first_sequence=start,
    )


def checked(
    trajectories: Trajectories,
    series: Series,
    start: int,
    *,
    tokenizer: Tokenizer,
    checker: AnswerChecker,
) -> list[Answer]:
    """Return the answers in trajectories, of which the first is number `start` of the series."""
    answers = []
    for row, num_tokens in enumerate(trajectories.response_lengths_B.tolist()):
        prompt = series.prompt_of(start + row)
        response = tokenizer.decode(trajectories.response_ids(row))
        answers.append(
            Answer(
                response=response,
                num_tokens=num_tokens,
                stopped=bool(trajectories.finish_B[row] == FINISH_STOP),
                verdict=checker.check(response, prompt.answer or "", prompt.tolerance),
            )
        )
    return answers
