"""The record of a fitted proxy, next to its coefficients under `<root>/proxy/`. Driver only; no Spark.

    proxy/record.json              the record of the proxy in use
    proxy/<revision>/record.json   one record per fitted proxy, with model/, the coefficients as Spark ML saves them

Owns the form and the places of the record. `proxy.fit` fills it in; refinement reads it for the provenance of a corpus
that the proxy ranks. A revision is a hash of everything that the fit depends on, so a retry writes the same record.
"""

import dataclasses

from miniplm_udf import storage
from miniplm_udf.layout import Root
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyRecord:
    """A fitted proxy.

    Attributes:
        revision: 32 hex digits over `identity` and the fingerprint of the rows.
        identity: the settings: score, where, rows, heldout, features, n-grams, tokens_of, model_revisions.
        fitted_on: `matrix_version`, `last_batches` of the matrix, its candidates `n_scored`, the numbers
            `n_fitted` and `n_heldout` of the rows drawn from them, and the `fingerprint` of the drawn rows.
        tokens_per_byte: tokens of the model `tokens_of` per UTF-8 byte, over all drawn rows.
        tokens_per_byte_of: the same by source.
        quality: on the held-out rows (`proxy.quality.judge`).
        solver: `iterations`, `n_grams` (mean number of distinct n-grams per instance), `seconds`.
        warnings: sentences to read before a corpus is refined with this proxy.
        code_revision: version of this package that fitted it.
    """

    revision: str
    identity: Json
    fitted_on: Json
    tokens_per_byte: float
    tokens_per_byte_of: dict[str, float]
    quality: Json
    solver: Json
    warnings: list[str]
    code_revision: str


def model_uri(root: str, revision: str) -> str:
    """Returns the URI of a proxy's coefficients.

    Args:
        root: URI of the root.
        revision: the proxy's revision, 32 hex digits.
    """
    return Root(root).proxy(revision, "model")


def report_uri(root: str) -> str:
    """Returns the URI of the report that the newest `miniplm proxy` wrote.

    Args:
        root: URI of the root.
    """
    return Root(root).proxy("report.json")


def read(root: str, revision: str | None = None) -> ProxyRecord | None:
    """Reads the record of a proxy.

    Args:
        root: URI of the root.
        revision: the proxy's revision, 32 hex digits; None reads the record of the proxy in use.

    Returns:
        The record; None if there is none.

    Raises:
        DamagedRecordError: the record is not JSON.
    """
    plain = storage.read_json(_record_uri(root, revision))
    return ProxyRecord(**plain) if plain else None


def write(root: str, record: ProxyRecord) -> None:
    """Writes the record of a proxy whose coefficients are saved, and makes it the proxy in use.

    Args:
        root: URI of the root.
        record: the record, whose revision names its folder.
    """
    for revision in (record.revision, None):
        storage.write_json(_record_uri(root, revision), dataclasses.asdict(record))


def _record_uri(root: str, revision: str | None) -> str:
    parts = [*([revision] if revision else []), "record.json"]
    return Root(root).proxy(*parts)
