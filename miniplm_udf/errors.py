"""Errors, classed by what the reader does next, and the exit code that each ends a command with.

A message says what was expected, what was found, where, and what to do. Bad rows are not errors: they are rejects.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_TOO_MANY_REJECTS = 3


class MiniplmError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = EXIT_FAILED


class ConfigError(MiniplmError, ValueError):
    """The config or the command line is wrong: mend it and run again."""

    exit_code = EXIT_BAD_CONFIG


class SchemaMismatchError(MiniplmError):
    """A table or a frame does not have the declared columns: look at who wrote it."""


class ModelLoadError(MiniplmError):
    """A model or its tokenizer cannot be loaded, or its architecture cannot be scored exactly."""


class ScoringError(MiniplmError):
    """Scoring as a whole cannot go on. One instance that fails is a reject, not this."""


class CorpusError(MiniplmError):
    """A corpus, or a version of one, is missing, empty or inconsistent."""
