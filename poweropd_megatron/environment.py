"""The variables by which torchrun tells a process its place in the job."""

import os

from poweropd_megatron.errors import ConfigError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """Return the number of ranks that torchrun started, None without it. Raises: ConfigError."""
    return _number("WORLD_SIZE", smallest=1)


def check_rank_variables() -> None:
    """Return if every variable that is set holds a number. Raises: ConfigError naming it."""
    world_size()
    for name in ("RANK", "LOCAL_RANK"):
        _number(name, smallest=0)


def speaks_for_node() -> bool:
    """Return whether this process is the one of its node that shows errors."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not local_rank.isdecimal() or int(local_rank) == 0


def _number(name: str, *, smallest: int) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < smallest:
        raise ConfigError(
            f"the environment has {name}={text}: expected a whole number from {smallest}, as "
            "torchrun sets it; unset it to run one process"
        )
    return int(text)
