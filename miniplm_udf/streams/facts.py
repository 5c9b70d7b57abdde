"""Facts about a streaming query that its checkpoint folder does not tell: a small JSON file next to that folder.

Input: the URI of a checkpoint; output: `QueryFacts`. The runner records the facts, with the query's leases in hand,
before the query first starts; `checkpoints.py` reads them for maintenance, take-downs, verification and preflight. The
file lies outside the folder, which belongs to Spark. A restart with the same facts writes nothing. Driver only.
"""

import dataclasses
import logging

from miniplm_udf import layout, storage
from miniplm_udf.errors import CorpusError, DamagedRecordError

LOGGER = logging.getLogger("miniplm.streams")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryFacts:
    """Facts about a query that are known before it runs.

    Attributes:
        stage: ingest, score, score_matrix, follow, proxy or generate.
        lease: name of the lease that the query's driver holds: of the only table that the query writes, or of this one
            query where several may write the table.
        source: the table of the root that the query reads; None for ingest, which reads the user's files or table.
        sample: share of the source's pool that the query takes, above 0 and at most 1.
        input_format: format of the files or the table that ingest reads; None for other queries.
        revisions: model revisions by alias (score, score_matrix, generate); the revision of the proxy under `proxy`;
            the revision of the generation under `generation`.
    """

    stage: str
    lease: str
    source: str | None = None
    sample: float = 1.0
    input_format: str | None = None
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)


def record(checkpoint_uri: str, facts: QueryFacts) -> None:
    """Writes the facts of a query, unless the same facts are recorded already.

    Args:
        checkpoint_uri: the checkpoint folder; the record is a file next to it.
        facts: the facts.

    """
    uri = layout.query_facts(checkpoint_uri)
    if _recorded(uri) != facts:
        storage.write_json(uri, dataclasses.asdict(facts))


def read(checkpoint_uri: str) -> QueryFacts:
    """Returns the recorded facts of a query; facts that are not recorded are taken from the name of its checkpoint.

    Args:
        checkpoint_uri: the checkpoint folder; the record is a file next to it.

    Raises:
        CorpusError: there is no whole record, and the name of the checkpoint lacks the expected share.
    """
    recorded, name = _recorded(layout.query_facts(checkpoint_uri)), checkpoint_uri.rstrip("/").rsplit("/", 1)[-1]
    if recorded is not None and (recorded.stage != "ingest" or recorded.input_format is not None):
        return recorded
    try:
        # Earlier releases recorded no format.
        return _facts_in_name(name) if recorded is None else dataclasses.replace(recorded, input_format=_format(name))
    except ValueError as error:
        raise CorpusError(
            f"checkpoint {storage.redact(checkpoint_uri)}: expected a folder named score-<id>-<share>, found "
            f"another name ({error}); if it is a copy, move it out of the folder of checkpoints"
        ) from error


def _recorded(uri: str) -> QueryFacts | None:
    """The facts in a file; None where there is no file or, with a warning, where it is damaged.

    Keys of later releases are ignored. A checkpoint's name has the same facts; the next start writes the file again.
    """
    names = {field.name for field in dataclasses.fields(QueryFacts)}
    try:
        plain = storage.read_json(uri)
        return None if plain is None else QueryFacts(**{name: dict(plain)[name] for name in names & dict(plain).keys()})
    except (DamagedRecordError, TypeError, ValueError) as error:
        LOGGER.warning("record %s is damaged (%s): the facts are taken from the name", storage.redact(uri), error)
        return None


def _facts_in_name(name: str) -> QueryFacts:
    """The facts in a checkpoint's name, for roots made before facts were recorded: <stage>-<id>, score-<id>-<sample>.

    Names of other queries, which this project did not start, have no stage that anything here looks for.
    """
    stage, *rest = name.split("-", 2)
    if stage in ("score", "generate"):
        sample = float(rest[1]) if len(rest) == 2 else 1.0
        # One driver at a time generates with a model, seed and settings, whatever the share.
        lease = name if stage == "score" else "-".join((stage, *rest[:1]))
        return QueryFacts(stage=stage, lease=lease, source="instances", sample=sample)
    leases = {"ingest": "ingest", "score_matrix": "score_matrix", "proxy": "proxy_scores"}
    sources = {"score_matrix": "scores", "follow": "score_matrix", "proxy": "instances"}
    return QueryFacts(stage=stage, lease=leases.get(stage, name), source=sources.get(stage), input_format=_format(name))


def _format(name: str) -> str | None:
    """The format in the name of an ingest checkpoint: ingest-<format>."""
    stage, _, rest = name.partition("-")
    return rest if stage == "ingest" and rest else None
