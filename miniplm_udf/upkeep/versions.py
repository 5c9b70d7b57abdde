"""What is done with the versions of a corpus: compare two, pin one, bring one back, make one again from its record.

Input: a root, and a version as `NAME`, `NAME@NUMBER` or `NAME@TAG` of a pin; output: plain data, or a new version of
`refined/<name>`, whose provenance says what it was made of. Old versions are never changed. Rows that were taken down
since do not come back. A version is written under the corpus's lease, and a retry of a restoration finds it done.
Owns no selection (refine.py) and no copy (pins.py). Driver only.
"""

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, pins, removals, storage, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig, ModelConfig, ProxyConfig, RefineConfig, SelectConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.pins import Pin
from miniplm_udf.refinement import candidates, refine
from miniplm_udf.refinement.columns import with_instances
from miniplm_udf.rules import PREDICTION

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_TEXT_CHARACTERS = 240


def find(spark: "SparkSession", root: str, address: str) -> tuple[str, int]:
    """The name and the number of a version.

    Args:
        address: `NAME` (its newest version), `NAME@NUMBER` or `NAME@TAG`.

    Raises:
        CorpusError: there is no such corpus, version or tag.
    """
    name, _, wanted = address.partition("@")
    if wanted and not wanted.isdigit():
        tagged = {pin.tag: pin.version for pin in pins.find(spark, root, name) if pin.tag}
        if wanted not in tagged:
            raise CorpusError(
                f"version {address!r}: expected a number, or a tag of {name!r}, which has "
                f"{sorted(tagged) or 'none'}; `miniplm corpus pin {name}@NUMBER --tag {wanted}` gives it one"
            )
        return name, tagged[wanted]
    return name, int(corpora.show_corpus(spark, root, name, int(wanted) if wanted else None)["version"])


def listing(spark: "SparkSession", root: str) -> list[dict[str, Any]]:
    """All versions by name and number: what was kept, when, how it was made (`made_by`), and whether it is pinned."""
    known = {(pin.name, pin.version): pin.tag or "yes" for pin in pins.find(spark, root)}
    shown = ("name", "version", "created_at", "n_instances", "n_tokens", "threshold", "fingerprint")
    found = []
    for row in corpora.list_corpora(spark, root).collect():
        inputs = corpora.parsed(row)["inputs"]
        made_by = (inputs.get("derived") or {}).get("by") or ("follow" if inputs.get("followed") else "refine")
        pinned = known.get((row["name"], row["version"]))
        found.append({**{key: row[key] for key in shown}, "made_by": made_by, "pinned": pinned})
    return found


def show(spark: "SparkSession", root: str, address: str) -> dict[str, Any]:
    """The full provenance of a version, and what it holds by source, where its rows are there still.

    Returns:
        The row of `corpora`, its JSON parsed; `pinned` and `tag`; `by_source`: {source: {n_instances, n_tokens}}, or
        None where the rows are gone.
    """
    name, version = find(spark, root, address)
    pin = pins.of_version(spark, root, name, version)
    found = {**corpora.show_corpus(spark, root, name, version), "pinned": pin is not None, "tag": pin and pin.tag}
    try:
        with corpora.readable(name, version):
            return {**found, "by_source": _by_source(corpora.read_corpus(spark, root, name, version))}
    except CorpusError:
        return {**found, "by_source": None}


def _by_source(rows: "DataFrame") -> dict[str, dict[str, int]]:
    from pyspark.sql import functions as F

    counted = rows.groupBy("source").agg(F.count("*"), F.sum("n_tokens")).orderBy("source").collect()
    return {source: {"n_instances": n_rows, "n_tokens": n_tokens} for source, n_rows, n_tokens in counted}


def diff(spark: "SparkSession", root: str, one: str, other: str, n_examples: int) -> dict[str, Any]:
    """What was added and removed between two versions, of one corpus or of two, told by ids.

    Args:
        one, other: addresses; what only `other` has was added.
        n_examples: texts to show of each, those of the highest scores.

    Returns:
        `from`, `to`; `added`, `removed` and `both`, each {source: {n_instances, n_tokens}}; `added_examples` and
        `removed_examples`: instance_id, source, score, text (its beginning; None where there is no such instance).

    Raises:
        CorpusError: there is no such version, or its rows are gone.
    """
    places = [find(spark, root, address) for address in (one, other)]
    before, after = (corpora.read_corpus(spark, root, *place) for place in places)
    named = [f"{name}@{version}" for name, version in places]
    # Rows that go away while they are read may be of either.
    with corpora.readable(" or ".join(name for name, _ in places), places[0][1]):
        added, removed = tables.missing_from(after, before), tables.missing_from(before, after)
        both = after.join(before.select("instance_id"), "instance_id", "left_semi")
        return {
            "from": named[0],
            "to": named[1],
            "added": _by_source(added),
            "removed": _by_source(removed),
            "both": _by_source(both),
            "added_examples": _examples(spark, root, added, n_examples),
            "removed_examples": _examples(spark, root, removed, n_examples),
        }


def _examples(spark: "SparkSession", root: str, rows: "DataFrame", n_examples: int) -> list[dict[str, Any]]:
    from pyspark.sql import functions as F

    order = (F.col("score").desc(), F.col("instance_id"))
    chosen = rows.select("instance_id", "source", "score").orderBy(*order).limit(n_examples).collect()
    instances = storage.join(storage.to_uri(root), "tables", "instances")
    texts: dict[str, str] = {}
    if chosen and tables.exists(spark, instances):
        wanted = tables.read(spark, instances).where(F.col("instance_id").isin([row["instance_id"] for row in chosen]))
        texts = dict(wanted.select("instance_id", F.substring("text", 1, _TEXT_CHARACTERS)).collect())
    return [{**row.asDict(), "text": texts.get(row["instance_id"])} for row in chosen]


def pin(spark: "SparkSession", root: str, address: str, tag: str | None = None) -> Pin:
    """Keeps a version for ever, by a copy of its rows; a version that is pinned stays so.

    Raises:
        ConfigError: the tag is a number, is another version's, or is not the one that the version has.
        CorpusError: there is no such version, or its rows are gone, or are not those that were recorded.
    """
    name, version = find(spark, root, address)
    known = {pin.version: pin for pin in pins.find(spark, root, name)}
    if tag is not None:
        taken = next((pin.version for pin in known.values() if pin.tag == tag and pin.version != version), None)
        if taken is not None or tag.isdigit() or not tag:
            what = "no number" if taken is None else f"one of its own (version {taken} has it)"
            raise ConfigError(f"--tag: expected a name for {name}@{version} that is {what}, found {tag!r}")
    if version in known:
        if tag not in (None, known[version].tag):
            raise ConfigError(
                f"--tag: expected {known[version].tag!r}, with which {name}@{version} is pinned, found {tag!r}; "
                "unpin it first"
            )
        return known[version]
    found = corpora.provenance_of(spark, root, name, version)
    rows = corpora.read_corpus(spark, root, name, version)
    with corpora.readable(name, version):
        counted = recounted(found, rows)
    if counted.fingerprint != found.fingerprint:
        raise CorpusError(
            f"{name}@{version}: expected rows of the fingerprint {found.fingerprint}, found {counted.fingerprint}: "
            "they are not what was recorded; `miniplm verify` tells more"
        )
    made = Pin(name, version, tag, found.n_instances, found.fingerprint, datetime.datetime.now(datetime.UTC))
    pins.add(spark, root, made, rows, dataclasses.asdict(found))
    return made


def unpin(spark: "SparkSession", root: str, address: str) -> tuple[str, int]:
    """Gives a version up to maintenance, its copy at once. Returns what it was.

    Raises:
        CorpusError: it is not pinned.
    """
    name, version = find(spark, root, address)
    is_pinned = pins.of_version(spark, root, name, version) is not None
    # A copy without its row: an earlier command was killed.
    if not is_pinned and not tables.exists(spark, pins.copy_uri(root, name, version)):
        pinned = [found.version for found in pins.find(spark, root, name)]
        raise CorpusError(f"{name}@{version}: expected a pinned version, found {pinned or 'none'} of {name!r} pinned")
    pins.remove(spark, root, name, version)
    return name, version


def restore(spark: "SparkSession", config: ExperimentConfig, address: str) -> dict[str, Any]:
    """Makes a new version with an old one's rows, less what was taken down since; none where they are the newest's.

    Returns:
        `name`, `version`, `from_version`, `n_instances`, `fingerprint`, `skipped`.

    Raises:
        CorpusError: there is no such version, its rows are gone, or another driver has written meanwhile.
    """
    name, version = find(spark, config.root, address)
    known = corpora.provenance_of(spark, config.root, name, version)
    rows = corpora.read_corpus(spark, config.root, name, version)
    if (taken_down := removals.instance_ids(spark, config.root)) is not None:
        rows = tables.missing_from(rows, taken_down)
    with corpora.readable(name, version):
        found = recounted(known, rows)
        return _commit(spark, config, rows, found, {"by": "restore", "from_version": version})


def rebuild(spark: "SparkSession", config: ExperimentConfig, address: str, dry_run: bool = False) -> dict[str, Any]:
    """Makes a version's rows again from its record and the matrix, and commits them unless they are the newest's.

    Args:
        dry_run: only compares the fingerprint.

    Returns:
        As `restore`.

    Raises:
        CorpusError: the record is of a corpus that was followed; the matrix was built anew, or rows were taken down,
            since; or the rows are others.
    """
    name, version = find(spark, config.root, address)
    known = corpora.provenance_of(spark, config.root, name, version)
    made, rows = _again(spark, config.root, name, version, known)
    with refine.chosen(spark, made, rows) as (kept, found):
        if found.fingerprint != known.fingerprint:
            raise CorpusError(
                f"{name}@{version}: expected the fingerprint {known.fingerprint} again, found {found.fingerprint}, "
                f"{found.n_instances} instances instead of {known.n_instances}: the matrix (by a take-down, perhaps), "
                f"the annotations or the code ({known.code_revision} then) have changed since; nothing was written"
            )
        if dry_run:
            return _summary(name, version, version, known, skipped=True)
        return _commit(spark, config, kept, found, {"by": "rebuild", "from_version": version})


def _again(
    spark: "SparkSession", root: str, name: str, version: int, known: corpora.Provenance
) -> tuple[refine.Made, "DataFrame"]:
    """What a version was made of, and its candidates: the rows of the matrix that it was chosen from."""
    if known.followed is not None:
        raise CorpusError(
            f"{name}@{version}: expected a version that was refined at once, found one that was followed, whose cuts "
            f"came one by one; rebuild {name}@{known.followed['since_version']}, the last that was not"
        )
    config, corpus, rows = chosen_from(spark, root, name, version, known)
    return refine.Made(config, name, corpus, known.inputs, known.model_revisions), rows


def chosen_from(
    spark: "SparkSession", root: str, name: str, version: int, known: corpora.Provenance
) -> tuple[ExperimentConfig, CorpusConfig, "DataFrame"]:
    """What a version was chosen from: `refine.candidate_rows` of the matrix's rows that it was made of.

    Returns:
        And its experiment and corpus as they are recorded (`recorded_config`).

    Raises:
        CorpusError: the matrix was built anew since; the record is of another version of this code.
    """
    config, corpus = recorded_config(root, name, known)
    batches: dict[str, int] = known.inputs["last_batches"]
    read = candidates.read(spark, config, corpus, batches)
    found = read.inputs["last_batches"]
    if not set(batches) <= found.keys():
        raise CorpusError(
            f"{name}@{version}: expected {corpus.candidates} to hold rows of its queries {sorted(batches)}, found "
            f"those of {sorted(found) or 'others'}: it was built anew since, and its micro-batches are others; refine "
            "anew"
        )
    seen, _ = with_instances(spark, config, read.rows, str(corpus.where), str(corpus.score))
    return config, corpus, refine.candidate_rows(seen, config, name, corpus)


def recorded_config(root: str, name: str, known: corpora.Provenance) -> tuple[ExperimentConfig, CorpusConfig]:
    """As much of the experiment as a version was made of, and its resolved corpus, from what was recorded."""
    plain = dict(known.config)
    tokens_of, models = plain.pop("tokens_of"), plain.pop("models")
    try:
        corpus = CorpusConfig(**{**plain, "select": SelectConfig(**plain["select"])})
    except TypeError as error:
        raise CorpusError(
            f"corpus {name!r}: its recorded config is of another version of this code ({known.code_revision}): {error}"
        ) from error
    refined = RefineConfig(tokens_of=tokens_of, corpora={name: corpus})
    # Where the models are does not matter: nothing is scored, nor predicted.
    proxy = ProxyConfig(score=PREDICTION) if corpus.is_of_proxy else None
    scored = {alias: ModelConfig(path=alias) for alias in models}
    return ExperimentConfig(root=root, models=scored, refine=refined, proxy=proxy), corpus


def recounted(known: corpora.Provenance, rows: "DataFrame") -> corpora.Provenance:
    """A version's provenance with the counts, the threshold and the fingerprint of other rows."""
    from pyspark.sql import functions as F

    sums = rows.agg(*refine.sums_of(F.lit(True))).collect()[0]
    n_rows = int(sums["n_kept"])
    return dataclasses.replace(
        known,
        threshold=known.threshold if sums["threshold"] is None else sums["threshold"],
        n_instances=n_rows,
        n_tokens=sums["n_tokens"] or 0,
        fingerprint=refine.fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], n_rows),
    )


def _commit(
    spark: "SparkSession", config: ExperimentConfig, rows: "DataFrame", found: corpora.Provenance,
    derived: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Commits rows in place of the newest version's, unless that one has them already."""
    name = found.corpus
    with refine.corpus_lease(config, name):
        newest = corpora.newest(spark, corpora.corpus_uri(config.root, name))
        before = newest.provenance if newest else None
        if newest and before and before.fingerprint == found.fingerprint and before.config == found.config:
            corpora.record(spark, config.root, newest.version, before)
            return _summary(name, newest.version, derived["from_version"], before, skipped=True)
        version = commit_derived(spark, config, rows, found, newest, derived)
        return _summary(name, version, derived["from_version"], found, skipped=False)


def commit_derived(
    spark: "SparkSession", config: ExperimentConfig, rows: "DataFrame", found: corpora.Provenance,
    newest: corpora.Newest | None, derived: dict[str, Any],
) -> int:  # fmt: skip
    """Commits rows that are derived of a version, and records them. The corpus's lease is held."""
    made = dataclasses.replace(found, derived=derived, kept_share_by_source={})
    version = refine.commit(config, rows, made.n_instances, made, newest, replaces=True)
    corpora.record(spark, config.root, version, made)
    return version


def _summary(name: str, version: int, from_version: int, found: corpora.Provenance, skipped: bool) -> dict[str, Any]:
    return {
        "name": name, "version": version, "from_version": from_version, "n_instances": found.n_instances,
        "fingerprint": found.fingerprint, "skipped": skipped,
    }  # fmt: skip
