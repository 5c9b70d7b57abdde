"""The results of `miniplm corpus` as text for a terminal. Driver only.

Input: plain data of `corpora.listing`, `corpora.versions` and `corpora.takedown`; output: lines. The text of an
instance is shown on one line. Reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.text import plain, table

_REMEDY = "docs/storage.md has the rule of the bucket that removes them"
_EARLIER_OBJECTS = {
    "kept": f"the bucket keeps earlier versions of objects, which still hold the removed text; {_REMEDY}",
    "unknown": "it is not known whether the storage keeps earlier versions of objects or deleted objects, which would "
    f"still hold the removed text; {_REMEDY}",
}


def listing(versions: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with one row per version.

    Args:
        versions: the result of `miniplm_udf.corpora.listing.listing`.
    """
    head = ("version", "made (UTC)", "by", "instances", "tokens", "threshold", "pinned", "fingerprint")
    rows = [
        (
            f"{row['name']}@{row['version']}", row["created_at"].isoformat(" ", "seconds"), row["made_by"],
            row["n_instances"], row["n_tokens"], row["threshold"], row["pinned"], row["fingerprint"],
        )
        for row in versions
    ]  # fmt: skip
    return table(head, rows)


def show(version: Mapping[str, Any]) -> str:
    """Returns the provenance of a version as text, one line per fact, and its counts by source.

    Args:
        version: the result of `miniplm_udf.corpora.listing.show`.
    """
    inputs = dict(version["inputs"])
    names = ("model_revisions", "followed", "derived", "diagnostics")
    revisions, followed, derived, diagnostics = (inputs.pop(key, None) for key in names)
    pairs = [
        ("corpus", f"{version['name']}@{version['version']}"),
        ("made (UTC)", version["created_at"].isoformat(" ", "seconds")),
        ("pinned", (version["tag"] or "yes") if version["pinned"] else "no"),
        *(("made of", _words(origin)) for origin in (derived, followed) if origin),
        ("instances", f"{version['n_instances']:,} of {version['n_candidates']:,} candidates"),
        ("tokens", f"{version['n_tokens']:,} of {version['candidate_tokens']:,}"),
        ("threshold", version["threshold"]),
        ("fingerprint", version["fingerprint"]),
        ("code", version["code_revision"]),
        *((f"config {key}", _words(value)) for key, value in version["config"].items()),
        *((f"input {key}", _words(value)) for key, value in inputs.items()),
        *((key.replace("_", " "), _words(value)) for key, value in (diagnostics or {}).items() if value),
        *((f"model {alias}", revision) for alias, revision in (revisions or {}).items()),
    ]
    lines = table(None, pairs).splitlines()
    by_source = version["by_source"]
    if by_source is None:
        return "\n".join([*lines, "", "its rows are gone; `miniplm corpus rebuild` makes them again"])
    rows = [(source, counts["n_instances"], counts["n_tokens"]) for source, counts in by_source.items()]
    return "\n".join([*lines, "", table(("source", "instances", "tokens"), rows)])


def _words(value: Any) -> str:
    """Nested plain data on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value if item is not None)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def diff(difference: Mapping[str, Any]) -> str:
    """Returns the counts by source of added, removed and common rows as text, and examples with their texts.

    Args:
        difference: the result of `miniplm_udf.corpora.listing.diff`.
    """
    kinds = ("added", "removed", "both")
    none = {"n_instances": 0, "n_tokens": 0}
    sources = sorted({source for kind in kinds for source in difference[kind]})
    rows = [
        (source, *(difference[kind].get(source, none)[unit] for kind in kinds for unit in ("n_instances", "n_tokens")))
        for source in sources
    ]
    totals = ("all", *(sum(row[i] for row in rows) for i in range(1, 7)))
    head = ("source", "added", "tokens", "removed", "tokens", "in both", "tokens")
    parts = [f"{difference['from']} -> {difference['to']}", table(head, [*rows, totals])]
    for kind in ("added", "removed"):
        for row in difference[f"{kind}_examples"]:
            text = " ".join((row["text"] or "(no such instance)").split())
            parts.append(f"{kind} {row['instance_id']} {row['source']} {row['score']:.6g}\n  {text}")
    return "\n\n".join(parts)


def pinned(pin: Any) -> str:
    """Returns one line about a pin.

    Args:
        pin: the pin, a dataclass or plain data.
    """
    row = plain(pin)
    tag = f" as {row['name']}@{row['tag']}" if row["tag"] else ""
    return f"{row['name']}@{row['version']} is pinned{tag}: {row['n_instances']:,} rows, {row['fingerprint']}"


def unpinned(version: Mapping[str, Any]) -> str:
    """Returns one line that says that a version is not pinned any more.

    Args:
        version: its `name` and `version`.
    """
    return f"{version['name']}@{version['version']} is not pinned any more"


def made(result: Any) -> str:
    """Returns one line about the version that `restore` or `rebuild` made, or found with the same rows.

    Args:
        result: what `restore` or `rebuild` returned, a dataclass or plain data.
    """
    version = plain(result)
    rows = f"{version['n_instances']:,} rows, {version['fingerprint']}"
    if version["skipped"]:
        return f"{version['name']}@{version['version']} has these rows already: {rows}; nothing was written"
    return f"{version['name']}@{version['version']} has the rows of version {version['from_version']}: {rows}"


def taken_down(result: Any) -> str:
    """Returns the numbers of rows that a take-down removed, or would remove, by table, as text.

    Args:
        result: what the take-down returned, a dataclass or plain data.
    """
    counts = plain(result)
    lines = [
        f"{counts['instances']:,} instances hold the documents; {counts['other_documents']:,} other documents share "
        "these instances and lose their text"
    ]
    if counts["not_found"]:
        lines.append(f"documents found in no instance: {', '.join(counts['not_found'])}")
    if counts.get("takedown_id") is None:
        return "\n".join([*lines, "nothing was removed: a dry run"])
    lines.append(f"take-down {counts['takedown_id']}; the record is the table `takedowns`")
    lines += [f"{name}: {n_rows:,} rows removed" for name, n_rows in counts["removed"].items()]
    if counts["begun_anew"]:
        lines.append(f"queries that start again from the beginning: {', '.join(counts['begun_anew'])}")
    if counts["students"]:
        lines.append(f"models trained on the removed text (not changed): {', '.join(counts['students'])}")
    if counts["exports"]:
        lines.append(f"exports that may hold the removed text (not changed): {', '.join(counts['exports'])}")
    if counts["earlier_objects"] != "none":
        lines.append(_EARLIER_OBJECTS[counts["earlier_objects"]])
    return "\n".join(lines)
