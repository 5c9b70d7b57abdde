"""The proxy as it was fitted: its record, beside its coefficients, under `<root>/proxy/`. Driver only; no Spark.

    proxy/record.json              the one in use
    proxy/<revision>/record.json   each that was ever fitted, with model/, Spark ML's own form of the coefficients

Owns the record's form and places. What is in it is `proxy.fit`'s; refinement reads it to say what a corpus was ranked
by. A revision is a hash of all that the fit depends on, so a record that is there is never another's.
"""

import dataclasses
from typing import Any

from miniplm_udf import storage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyRecord:
    """A fitted proxy.

    Attributes:
        revision: 32 hex digits over `identity` and the fingerprint of the rows.
        identity: what was asked for: score, where, rows, heldout, features, n-grams, tokens_of, model_revisions.
        fitted_on: `matrix_version`, `last_batches` of the matrix, its candidates `n_scored`, `n_fitted` and `n_heldout`
            drawn of them, and the `fingerprint` of what was drawn.
        tokens_per_byte: of the model tokens_of, over all drawn rows.
        tokens_per_byte_of: the same by source.
        quality: on the held-out rows (`proxy.quality.judge`).
        solver: `iterations`, `n_grams` (mean number of different ones of an instance), `seconds`.
        warnings: sentences to read before anything is refined by it.
    """

    revision: str
    identity: dict[str, Any]
    fitted_on: dict[str, Any]
    tokens_per_byte: float
    tokens_per_byte_of: dict[str, float]
    quality: dict[str, Any]
    solver: dict[str, Any]
    warnings: list[str]
    code_revision: str


def model_uri(root: str, revision: str) -> str:
    """Where the coefficients are."""
    return storage.join(storage.to_uri(root), "proxy", revision, "model")


def report_uri(root: str) -> str:
    """What the newest `miniplm proxy` reported."""
    return storage.join(storage.to_uri(root), "proxy", "report.json")


def read(root: str, revision: str | None = None) -> ProxyRecord | None:
    """The record of a revision, by default of the one in use; None where there is none."""
    plain = storage.read_json(_record_uri(root, revision))
    return ProxyRecord(**plain) if plain else None


def write(root: str, record: ProxyRecord) -> None:
    """Keeps a record, whose coefficients are there, and puts it to use."""
    for revision in (record.revision, None):
        storage.write_json(_record_uri(root, revision), dataclasses.asdict(record))


def _record_uri(root: str, revision: str | None) -> str:
    parts = ["proxy", *([revision] if revision else []), "record.json"]
    return storage.join(storage.to_uri(root), *parts)
