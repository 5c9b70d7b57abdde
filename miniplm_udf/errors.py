"""Errors, grouped by what the user does next, and the exit code of a command for each group.

A message says what was expected, what was found, where, and what to do. Bad rows are not errors: they are rejects.
An executor raises the same classes; `workers.remote` brings them back to the driver.
"""

from collections.abc import Sequence
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_TOO_MANY_REJECTS = 3


class MiniplmError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = EXIT_FAILED


class ConfigError(MiniplmError, ValueError):
    """The config or the command line is wrong: fix it and run again."""

    exit_code = EXIT_BAD_CONFIG


class ConfigProblems(ConfigError):
    """Several things are wrong at once: each is one sentence with its key and its remedy.

    Args:
        problems: the sentences, at least one; a sentence that comes twice is shown once.
        rest: the experiment without the keys that are wrong, for further checks; None if nothing can be made of it.
    """

    def __init__(self, problems: Sequence[str], rest: Any = None) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        self.rest = rest
        numbered = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, start=1))
        n = len(self.problems)
        super().__init__(self.problems[0] if n == 1 else f"{n} problems, all to fix before anything runs:{numbered}")


class SchemaMismatchError(MiniplmError):
    """A table or a frame does not have the declared columns: check which program wrote it."""


class ModelLoadError(MiniplmError):
    """A model or its tokenizer cannot be loaded, or its architecture cannot be scored exactly."""


class ScoringError(MiniplmError):
    """Scoring as a whole cannot continue. A single instance that fails is a reject, not an error."""


class CorpusError(MiniplmError):
    """A corpus, a version of a corpus, or a table is missing, empty or inconsistent."""


class DamagedRecordError(CorpusError, ValueError):
    """A small file of a root cannot be parsed: restore it from a copy, or remove it."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if the message is empty.

    Args:
        error: the error.
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """Returns the system's reason of an OSError ("No space left on device"), and the first line of any other error.

    Args:
        error: the error.
    """
    return getattr(error, "strerror", None) or first_line(error)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The errors that MLflow raises: its own, and errors of its HTTP client, its database and its artifact folder."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, requests.exceptions.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)
