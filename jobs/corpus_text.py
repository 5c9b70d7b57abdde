"""What `miniplm corpus` prints: plain data of `versions` and `takedown` as text for a terminal. Driver only.

Owns widths and words; reads and writes nothing. `table` serves other commands too. The text of an instance is shown on
one line.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a head, in columns; numbers with their thousands apart."""
    cells = [tuple(head), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    head = ("version", "made (UTC)", "by", "instances", "tokens", "threshold", "pinned", "fingerprint")
    rows = [
        (
            f"{one['name']}@{one['version']}", one["created_at"].isoformat(" ", "seconds"), one["made_by"],
            one["n_instances"], one["n_tokens"], one["threshold"], one["pinned"], one["fingerprint"],
        )
        for one in found
    ]  # fmt: skip
    return table(head, rows)


def show(found: Mapping[str, Any]) -> str:
    inputs = dict(found["inputs"])
    apart = ("model_revisions", "followed", "derived", "diagnostics")
    revisions, followed, derived, diagnostics = (inputs.pop(key, None) for key in apart)
    pairs = [
        ("corpus", f"{found['name']}@{found['version']}"),
        ("made (UTC)", found["created_at"].isoformat(" ", "seconds")),
        ("pinned", (found["tag"] or "yes") if found["pinned"] else "no"),
        *(("made of", _words(one)) for one in (derived, followed) if one),
        ("instances", f"{found['n_instances']:,} of {found['n_candidates']:,} candidates"),
        ("tokens", f"{found['n_tokens']:,} of {found['candidate_tokens']:,}"),
        ("threshold", found["threshold"]),
        ("fingerprint", found["fingerprint"]),
        ("code", found["code_revision"]),
        *((f"config {key}", _words(value)) for key, value in found["config"].items()),
        *((f"input {key}", _words(value)) for key, value in inputs.items()),
        *((key.replace("_", " "), _words(value)) for key, value in (diagnostics or {}).items() if value),
        *((f"model {alias}", revision) for alias, revision in (revisions or {}).items()),
    ]
    lines = table(("", ""), pairs).splitlines()[1:]
    by_source = found["by_source"]
    if by_source is None:
        return "\n".join([*lines, "", "its rows are gone; `miniplm corpus rebuild` makes them again"])
    rows = [(source, of["n_instances"], of["n_tokens"]) for source, of in by_source.items()]
    return "\n".join([*lines, "", table(("source", "instances", "tokens"), rows)])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value if item is not None)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def diff(found: Mapping[str, Any]) -> str:
    kinds = ("added", "removed", "both")
    nothing = {"n_instances": 0, "n_tokens": 0}
    sources = sorted({source for kind in kinds for source in found[kind]})
    rows = [
        (source, *(found[kind].get(source, nothing)[unit] for kind in kinds for unit in ("n_instances", "n_tokens")))
        for source in sources
    ]
    totals = ("all", *(sum(row[i] for row in rows) for i in range(1, 7)))
    head = ("source", "added", "tokens", "removed", "tokens", "in both", "tokens")
    parts = [f"{found['from']} -> {found['to']}", table(head, [*rows, totals])]
    for kind in ("added", "removed"):
        for one in found[f"{kind}_examples"]:
            text = " ".join((one["text"] or "(no such instance)").split())
            parts.append(f"{kind} {one['instance_id']} {one['source']} {one['score']:.6g}\n  {text}")
    return "\n\n".join(parts)


def pinned(found: Mapping[str, Any]) -> str:
    tag = f" as {found['name']}@{found['tag']}" if found["tag"] else ""
    return f"{found['name']}@{found['version']} is pinned{tag}: {found['n_instances']:,} rows, {found['fingerprint']}"


def unpinned(found: Mapping[str, Any]) -> str:
    return f"{found['name']}@{found['version']} is not pinned any more"


def made(found: Mapping[str, Any]) -> str:
    rows = f"{found['n_instances']:,} rows, {found['fingerprint']}"
    if found["skipped"]:
        return f"{found['name']}@{found['version']} has these rows already: {rows}; nothing was written"
    return f"{found['name']}@{found['version']} has the rows of version {found['from_version']}: {rows}"


def taken_down(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['instances']:,} instances hold the documents; {found['other_documents']:,} other documents are cut"
    ]
    if found["not_found"]:
        lines.append(f"in no instance: {', '.join(found['not_found'])}")
    if "takedown_id" not in found:
        return "\n".join([*lines, "nothing was removed: a dry run"])
    lines.append(f"take-down {found['takedown_id']}; the record is the table `takedowns`")
    lines += [f"{name}: {n_rows:,} rows removed" for name, n_rows in found["removed"].items()]
    if found["begun_anew"]:
        lines.append(f"queries that begin anew: {', '.join(found['begun_anew'])}")
    if found["students"]:
        lines.append(f"trained on such text, and not changed: {', '.join(found['students'])}")
    if found["exports"]:
        lines.append(f"exports that may hold such text, and are not changed: {', '.join(found['exports'])}")
    return "\n".join(lines)
