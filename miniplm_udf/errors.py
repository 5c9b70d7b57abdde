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
    """The config or the command line is wrong: fix it and run again.

    Attributes:
        problems: each thing that is wrong, as a sentence with its key and its remedy; empty for an error that was
            raised at the first of them.
        rest: the experiment without the keys that are wrong, for further checks; None if there is none.
    """

    exit_code = EXIT_BAD_CONFIG
    problems: tuple[str, ...] = ()
    rest: Any = None

    @classmethod
    def of_all(cls, problems: Sequence[str], rest: Any = None) -> "ConfigError":
        """Returns one error for everything that is wrong at once; its message is a numbered list.

        Args:
            problems: the sentences, at least one; a sentence that comes twice is shown once.
            rest: see the attribute.
        """
        once = tuple(dict.fromkeys(problems))
        numbered = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(once, start=1))
        error = cls(once[0] if len(once) == 1 else f"{len(once)} things to fix before anything runs:{numbered}")
        error.problems, error.rest = once, rest
        return error


class SchemaMismatchError(MiniplmError):
    """A table or a frame does not have the declared columns: check which program wrote it."""


class ModelLoadError(MiniplmError):
    """A model or its tokenizer cannot be loaded, or its architecture cannot be scored exactly."""


class ScoringError(MiniplmError):
    """Scoring as a whole cannot continue. A single instance that fails is a reject, not an error."""


class CorpusError(MiniplmError):
    """A corpus, a version of a corpus, or a table is missing, empty or inconsistent."""


class VersionGoneError(CorpusError):
    """The rows of a version of a corpus cannot be read any more."""


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
