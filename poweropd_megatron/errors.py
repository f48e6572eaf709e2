"""The errors that a user can mend: shown as one message, without a traceback, exit code 2."""

EXIT_CODE_BAD_INPUT = 2


class UserError(Exception):
    """Something given is wrong; the message says what, what was expected, and what to change."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that can't work; the message names the setting."""


class InputError(UserError):
    """A file or folder that can't be used: missing, malformed, truncated, or of the wrong kind."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, corrupt, or belongs to another run."""


class NonFiniteError(UserError):
    """A NaN or infinity in a model or in training; raised before it reaches the weights."""
