"""The record of a fitted proxy, next to its coefficients under `<root>/proxy/`. Driver only; no Spark.

    proxy/record.json              the record of the proxy in use
    proxy/<revision>/record.json   one record per fitted proxy, with model/, the coefficients as Spark ML saves them

Owns the form and the places of the record. `proxy.fit` fills it in; refinement reads it for the provenance of a corpus
that the proxy ranks. A revision is a hash of everything that the fit depends on, so a retry writes the same record.
"""

import dataclasses
from typing import TypedDict

from miniplm_udf import storage
from miniplm_udf.layout import Root
from miniplm_udf.store.provenance import VersionTables


class ProxySettings(TypedDict):
    """Everything but the rows that a fit depends on.

    Attributes:
        score: SQL over the matrix, which the proxy predicts.
        where: SQL over the matrix; rows that do not pass are not drawn.
        tokens_of: alias of the model whose tokens are counted.
        rows: about how many scored instances are drawn.
        heldout: share of the drawn rows that is held out, 0 to 1.
        features: size of a text's feature vector.
        n_grams: version of the rule that makes this vector.
        ridge: weight of the penalty, in rows.
        model_revisions: by alias.
    """

    score: str
    where: str
    tokens_of: str
    rows: int
    heldout: float
    features: int
    n_grams: int
    ridge: float
    model_revisions: dict[str, str]


class FittedRows(VersionTables):
    """The rows that a proxy was fitted on, and the state of the matrix that they were drawn from.

    Attributes:
        n_scored: rows of the matrix that pass `where` and have a finite score.
        n_fitted: drawn rows that the proxy was fitted to.
        n_heldout: drawn rows that it was judged on.
        fingerprint: hash of the ids and scores of the drawn rows.
    """

    n_scored: int
    n_fitted: int
    n_heldout: int
    fingerprint: str


class Solver(TypedDict):
    """The work of a fit.

    Attributes:
        iterations: steps of the solver.
        n_grams: mean number of distinct n-grams per instance.
        seconds: how long the fit took.
    """

    iterations: int
    n_grams: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopShare:
    """`kept`: the share of the true top alpha that is in the predicted top alpha; by chance it is `chance`, alpha."""

    kept: float
    chance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of predictions on held-out rows.

    Attributes:
        n_rows: held-out rows.
        spearman: rank correlation of prediction and score; None if either is the same for all rows.
        spearman_error: its standard error if nothing is related.
        top: by alpha, as text.
    """

    n_rows: int
    spearman: float | None
    spearman_error: float
    top: dict[str, TopShare]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyRecord:
    """A fitted proxy.

    Attributes:
        revision: 32 hex digits over `identity` and the fingerprint of the rows.
        identity: the settings.
        fitted_on: the rows.
        tokens_per_byte: tokens of the model `tokens_of` per UTF-8 byte, over all drawn rows.
        tokens_per_byte_of: the same by source.
        quality: of the predictions on the held-out rows.
        solver: the work of the fit.
        warnings: sentences to read before a corpus is refined with this proxy.
        code_revision: version of this package that fitted it.
    """

    revision: str
    identity: ProxySettings
    fitted_on: FittedRows
    tokens_per_byte: float
    tokens_per_byte_of: dict[str, float]
    quality: Quality
    solver: Solver
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
    if not plain:
        return None
    top = {ratio: TopShare(**share) for ratio, share in plain["quality"]["top"].items()}
    return ProxyRecord(**{**plain, "quality": Quality(**{**plain["quality"], "top": top})})


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
