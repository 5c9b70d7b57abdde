"""The shape of the pipeline's summary: the content of `summary.json`, whose keys are public.

`jobs.summary` makes it from the records of the stages; the report shows its rates and logs it to MLflow. Owns the
shape alone. Driver only; imports nothing heavy.
"""

from typing import TypedDict

from miniplm_udf.store.provenance import PairNumbers


class ProxyNumbers(TypedDict):
    """`predicted`: instances of the pool with a prediction; `spearman`: on held-out ones, None if it has no value."""

    predicted: int
    spearman: float | None


class RefinedCorpus(TypedDict):
    """The table of a corpus, a path or URI without secrets; its newest version; the instances that passed `where`."""

    path: str
    version: int
    candidates: int


class PipelineSummary(TypedDict, total=False):
    """Counts, rates and seconds of the stages that have run. The report also takes a summary without any key.

    Attributes:
        instances: rows in `instances`.
        rejected: rows in `rejects`, of all stages.
        scored: scored instances by model alias.
        proxy: None without a proxy.
        generated: instances that a model continued (SeqKD); None without the section `generate`.
        kept: instances by corpus.
        tokens_per_second: speed of each model at its last scoring, by alias; None if it was never measured.
        refined: counts of each refined corpus, by its name.
        pairs: the score of each corpus compared with the losses of its two models; without corpora that a random order
            or a proxy ranks.
        students: held-out losses of each student, by name; None if no instance could be scored.
        seconds: duration of each stage's last run.
    """

    instances: int
    rejected: int
    scored: dict[str, int]
    proxy: ProxyNumbers | None
    generated: int | None
    kept: dict[str, int]
    tokens_per_second: dict[str, float | None]
    refined: dict[str, RefinedCorpus]
    pairs: dict[str, PairNumbers]
    students: dict[str, dict[str, float | None]]
    seconds: dict[str, float]
