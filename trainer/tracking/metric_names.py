"""Makes unique names that every MLflow store accepts from free text (a source, a key of an architecture).

Input: texts. Output: one name per text. MLflow allows letters, digits and `_-./ :`, up to 250 characters, and refuses
names that change when they are normalised as a path (`.`, `..`, `a//b`). Some of its stores do not distinguish upper
and lower case. A text that is a safe name is its own name. The name of any other text has its safe characters and the
first digits of its SHA-256. The same texts give the same names. Pure; the run's own files have the true texts.
"""

import collections
import hashlib
import re
from collections.abc import Iterable

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
# MLflow allows 250 characters; this leaves room for a prefix and the hash.
_LONGEST = 120
_LIKE_HASHED = re.compile(r"-[0-9a-f]{10}$")


def safe_names(texts: Iterable[str]) -> dict[str, str]:
    """Makes a safe name for each text.

    Args:
        texts: any texts; duplicates count once.

    Returns:
        Text to name. A name has letters, digits and `_.-`, and at most 131 characters. Two names differ in lower case,
        too.
    """
    distinct = sorted(set(texts))
    counts = collections.Counter(text.lower() for text in distinct)
    return {text: text if _is_safe(text) and counts[text.lower()] == 1 else _hashed(text) for text in distinct}


def _is_safe(text: str) -> bool:
    is_plain = bool(text) and not _UNSAFE.search(text) and not text.startswith(".")
    # A text that looks like a hashed name could be equal to the hashed name of another text.
    return is_plain and len(text) <= _LONGEST and not _LIKE_HASHED.search(text)


def _hashed(text: str) -> str:
    readable = _UNSAFE.sub("_", text)[:_LONGEST].lstrip(".") or "_"
    return f"{readable}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"
