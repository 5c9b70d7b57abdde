"""The end of a command after an error: one line on stderr, an exit code, and the trace where it is wanted.

Input: the error that ended the command. Output: the line, and the exit code. A trace is printed only with `--debug`;
the trace of an error that nobody foresaw is also kept in the file `last-trace.txt` of this node's cache folder, which
the next one replaces. In the commands and in the trainer.
"""

import logging
import re
import sys
import traceback
from pathlib import Path

from miniplm_udf import progress, storage, storage_errors
from miniplm_udf.errors import EXIT_FAILED, MiniplmError, first_line

LOGGER = logging.getLogger("miniplm")

_LONGEST = 300
# The first line of an error of a call to Java says only which call failed.
_JAVA_CALL = re.compile(r"^An error occurred while calling \S+$")


def report(error: Exception) -> int:
    """Prints an error as one line on stderr, and its trace with `--debug`.

    Args:
        error: the error that ended the command, while it is handled.

    Returns:
        The exit code of the command.
    """
    if progress.is_debug():
        LOGGER.error("the command failed", exc_info=error)
    if isinstance(error, MiniplmError):
        print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"miniplm: {storage_errors.explain(error) or _unexpected(error)}", file=sys.stderr)
    return EXIT_FAILED


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
    line = lines[0].strip() if lines else first_line(error)
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
