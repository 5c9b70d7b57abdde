"""The end of a command after an error: one line on stderr, an exit code, and the trace where it is wanted.

Input: the error that ended the command. Output: the line, and the exit code. A trace is printed only with `--debug`;
the trace of an error that nobody foresaw is also kept in the file `last-trace.txt` of this node's cache folder, which
the next one replaces. In the commands and in the trainer.
"""

import logging
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from miniplm_udf import progress, storage, storage_errors
from miniplm_udf.errors import EXIT_FAILED, MiniplmError, first_line

LOGGER = logging.getLogger("miniplm")

_LONGEST = 300
# The extras that bring what commands import, the one of the Spark driver first.
_EXTRAS = ("spark", "score", "train", "annotate", "server", "eval", "s3", "gcs", "azure", "tensorboard", "wandb")
# Distributions whose modules have another name.
_DISTRIBUTIONS = {"delta": "delta-spark", "lm_eval": "lm-eval", "pynvml": "nvidia-ml-py"}
# The first line of an error of a call to Java says only which call failed.
_JAVA_CALL = re.compile(r"^An error occurred while calling \S+$")
# In the text of an error that Spark quotes from an executor.
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def report(error: Exception, extra: str | None = None) -> int:
    """Prints an error as one line on stderr, and its trace with `--debug`.

    Args:
        error: the error that ended the command, while it is handled.
        extra: the extra of this program, which the line about a missing package names first.

    Returns:
        The exit code of the command.
    """
    if progress.is_debug():
        LOGGER.error("the command failed", exc_info=error)
    if isinstance(error, MiniplmError):
        print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    line = storage_errors.explain(error) or _missing_package(error, extra) or _unexpected(error)
    print(f"miniplm: {line}", file=sys.stderr)
    return EXIT_FAILED


def _missing_module(error: Exception) -> tuple[str, str] | None:
    """The module that is not installed, and where; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        return None if error.name is None else (error.name, "")
    match = _NO_MODULE.search(str(error))
    return None if match is None else (match[1], " for the Python of an executor")


def _missing_package(error: Exception, first_extra: str | None = None) -> str | None:
    """The line about a package of an extra that is not installed; None for any other error."""
    missing = _missing_module(error)
    if missing is None:
        return None
    module = missing[0].partition(".")[0].lower()
    name = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    extras = [extra for extra in _EXTRAS if name in _names_of(extra)]
    if not extras:
        return None
    extras.sort(key=lambda extra: extra != first_extra)
    others = f" (it is also in {', '.join(extras[1:])})" if extras[1:] else ""
    return (
        f"the package {name} is not installed{missing[1]}: pip install 'miniplm[{extras[0]}]'{others}; "
        "`miniplm doctor` lists everything that is missing"
    )


def _names_of(extra: str) -> set[str]:
    """Names of the packages that an extra declares; empty if miniplm itself is not installed."""
    try:
        declared = [Requirement(text) for text in metadata.requires("miniplm") or []]
    except metadata.PackageNotFoundError:
        return set()
    markers = [(each.name.lower().replace("_", "-"), each.marker) for each in declared]
    return {name for name, marker in markers if marker is not None and marker.evaluate({"extra": extra})}


def _unexpected(error: Exception) -> str:
    """The line about an error that no code foresaw, and what to do."""
    line = f"{type(error).__name__}: {summary(error)}"
    if progress.is_debug():
        return line
    place = _keep_trace(error)
    kept = "" if place is None else f", or read the trace in {place}"
    return f"{line} (unexpected: run the same command again with --debug for the trace{kept})"


def summary(error: BaseException) -> str:
    """Returns the line of an error's message that says what went wrong, cut to 300 characters.

    Args:
        error: the error.
    """
    lines = [line.rstrip(" :.") for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and _JAVA_CALL.match(lines[0]):
        del lines[0]
    line = lines[0].lstrip(": ") if lines else first_line(error)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _keep_trace(error: Exception) -> Path | None:
    """Writes the trace into a file; returns its path, or None if it cannot be written."""
    place = storage.cache_folder() / "last-trace.txt"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        words = " ".join(sys.argv)
        place.write_text(f"{words}\n\n{''.join(traceback.format_exception(error))}", encoding="utf-8")
    except (OSError, ValueError):
        return None
    return place
