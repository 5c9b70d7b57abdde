"""Commands that change the versions of a corpus: pin a version, restore it, or rebuild it from its record.

Input: a root, and a version as `NAME`, `NAME@NUMBER` or `NAME@TAG` of a pin. Output: a pin, or a new version of
`refined/<name>`, whose provenance names the version that it was made from. Old versions are never changed. Rows that
were taken down since do not come back. A version is written under the corpus's lease; a retry of a restoration finds
that it is done. refine.py chooses rows and pins.py copies them. Driver only.
"""

import dataclasses
import datetime
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.rules import PREDICTION
from miniplm_udf.config.sections import ModelConfig, ProxyConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.refinement import candidates, fingerprints, refine
from miniplm_udf.refinement.columns import with_instances
from miniplm_udf.store import corpus_records, pins, tables, takedowns
from miniplm_udf.store.pins import Pin
from miniplm_udf.store.provenance import DerivedFrom, Provenance

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivedVersion:
    """A version that has the rows of an earlier version.

    Attributes:
        name: name of the corpus.
        version: number of the version that has the rows now; for a dry run, of the earlier version.
        from_version: number of the earlier version.
        n_instances: rows of the version.
        fingerprint: fingerprint of its rows.
        skipped: whether nothing was written, because the newest version has the rows already, or for a dry run.
    """

    name: str
    version: int
    from_version: int
    n_instances: int
    fingerprint: str
    skipped: bool


def find(spark: "SparkSession", root: str, address: str) -> tuple[str, int]:
    """Finds the name and the number of a version.

    Args:
        spark: any session.
        root: URI of the root.
        address: `NAME` (its newest version), `NAME@NUMBER` or `NAME@TAG`.

    Returns:
        The name of the corpus and the number of the version.

    Raises:
        CorpusError: there is no such corpus, version or tag.
    """
    name, version = corpus_records.parse_address(address, lambda: pins.find(spark, root))
    return name, int(corpus_records.show_corpus(spark, root, name, version)["version"])


def pin(spark: "SparkSession", root: str, address: str, tag: str | None = None) -> Pin:
    """Keeps a version until it is unpinned, by a copy of its rows; a pinned version is left as it is.

    Args:
        spark: any session.
        root: URI of the root.
        address: address of the version, as in `find`.
        tag: a name for `NAME@TAG`; None keeps the version's tag, if it has one.

    Returns:
        The pin.

    Raises:
        ConfigError: the tag is a number, belongs to another version, or differs from the tag that the version has.
        CorpusError: there is no such version, or its rows are gone or differ from the record.
    """
    name, version = find(spark, root, address)
    pinned = {pin.version: pin for pin in pins.find(spark, root, name)}
    if tag is not None:
        _check_tag(pinned, name, version, tag)
    if version in pinned:
        if tag not in (None, pinned[version].tag):
            raise ConfigError(
                f"--tag: expected {pinned[version].tag!r}, with which {name}@{version} is pinned, found {tag!r}; "
                "unpin it first"
            )
        return pinned[version]
    provenance = corpus_records.provenance_of(spark, root, name, version)
    rows = corpus_records.read_corpus(spark, root, name, version)
    with corpus_records.readable(name, version):
        counted = recounted(provenance, rows)
    if counted.fingerprint != provenance.fingerprint:
        raise CorpusError(
            f"{name}@{version}: expected rows of the fingerprint {provenance.fingerprint}, found "
            f"{counted.fingerprint}: the rows differ from the record; `miniplm verify` tells more"
        )
    pinned_at = datetime.datetime.now(datetime.UTC)
    new_pin = Pin(name, version, tag, provenance.n_instances, provenance.fingerprint, pinned_at)
    pins.add(spark, root, new_pin, rows, dataclasses.asdict(provenance))
    return new_pin


def _check_tag(pinned: dict[int, Pin], name: str, version: int, tag: str) -> None:
    """Refuses a tag that is empty, a number, or another version's."""
    owner = next((pin.version for pin in pinned.values() if pin.tag == tag and pin.version != version), None)
    if owner is not None or tag.isdigit() or not tag:
        wanted = "no number" if owner is None else f"one of its own (version {owner} has it)"
        raise ConfigError(f"--tag: expected a name for {name}@{version} that is {wanted}, found {tag!r}")


def unpin(spark: "SparkSession", root: str, address: str) -> tuple[str, int]:
    """Removes the pin of a version and its copy, so that maintenance may remove the version.

    Args:
        spark: any session.
        root: URI of the root.
        address: address of the version, as in `find`.

    Returns:
        The name of the corpus and the number of the version.

    Raises:
        CorpusError: the version is not pinned.
    """
    name, version = find(spark, root, address)
    is_pinned = pins.of_version(spark, root, name, version) is not None
    # A copy without a row in `pins` is left by an earlier command that was killed.
    if not is_pinned and not tables.exists(spark, Root(root).pinned(name, version)):
        pinned = [pin.version for pin in pins.find(spark, root, name)]
        raise CorpusError(f"{name}@{version}: expected a pinned version, found {pinned or 'none'} of {name!r} pinned")
    pins.remove(spark, root, name, version)
    return name, version


def restore(spark: "SparkSession", config: ExperimentConfig, address: str) -> DerivedVersion:
    """Makes a new version with the rows of an old version, without rows that were taken down since.

    Args:
        spark: any session.
        config: the experiment.
        address: address of the old version, as in `find`.

    Returns:
        The new version, or the newest version if it has the rows already.

    Raises:
        CorpusError: there is no such version, its rows are gone, or another driver has written meanwhile.
    """
    name, version = find(spark, config.root, address)
    provenance = corpus_records.provenance_of(spark, config.root, name, version)
    rows = corpus_records.read_corpus(spark, config.root, name, version)
    if (taken_down := takedowns.instance_ids(spark, config.root)) is not None:
        rows = tables.missing_from(rows, taken_down)
    with corpus_records.readable(name, version):
        counted = recounted(provenance, rows)
        return _commit(spark, config, rows, counted, {"by": "restore", "from_version": version})


def rebuild(spark: "SparkSession", config: ExperimentConfig, address: str, dry_run: bool = False) -> DerivedVersion:
    """Chooses the rows of a version again from its record and the matrix, and commits them as a new version.

    Args:
        spark: any session.
        config: the experiment.
        address: address of the version, as in `find`.
        dry_run: only compares the fingerprint.

    Returns:
        The new version, or the newest version if it has the rows already.

    Raises:
        CorpusError: the version was followed; since then the matrix was built again, or rows were taken down; or the
            chosen rows differ from the record.
    """
    name, version = find(spark, config.root, address)
    recorded = corpus_records.provenance_of(spark, config.root, name, version)
    version_inputs, rows = _version_inputs(spark, config.root, name, version, recorded)
    with refine.chosen_rows(spark, version_inputs, rows) as (kept, provenance):
        if provenance.fingerprint != recorded.fingerprint:
            raise CorpusError(
                f"{name}@{version}: expected the fingerprint {recorded.fingerprint} again, found "
                f"{provenance.fingerprint}, {provenance.n_instances} instances instead of {recorded.n_instances}: the "
                "matrix (by a take-down, perhaps), the annotations or the code "
                f"({recorded.code_revision} then) have changed since; nothing was written"
            )
        if dry_run:
            return _derived(version, version, recorded, skipped=True)
        return _commit(spark, config, kept, provenance, {"by": "rebuild", "from_version": version})


def _version_inputs(
    spark: "SparkSession", root: str, name: str, version: int, recorded: Provenance
) -> tuple[refine.VersionInputs, "DataFrame"]:
    """The inputs that decided the rows of a version, and its candidates."""
    if recorded.followed is not None:
        raise CorpusError(
            f"{name}@{version}: expected a version that was refined at once, found one that was followed, for which "
            f"several cuts were taken; rebuild {name}@{recorded.followed['since_version']}, the last that was not"
        )
    config, corpus, rows = recorded_candidates(spark, root, name, version, recorded)
    return refine.VersionInputs(config, name, corpus, recorded.inputs, recorded.model_revisions), rows


def recorded_candidates(
    spark: "SparkSession", root: str, name: str, version: int, recorded: Provenance
) -> tuple[ExperimentConfig, CorpusConfig, "DataFrame"]:
    """The candidates that a version was chosen from, as the tables were then.

    Args:
        spark: any session.
        root: URI of the root.
        name: name of the corpus.
        version: its number, for messages.
        recorded: its provenance.

    Returns:
        The experiment and the corpus as they are recorded (`recorded_config`), and `refine.candidate_rows`.

    Raises:
        CorpusError: the matrix was built again since; or another release of this code wrote the record.
    """
    config, corpus = recorded_config(root, name, recorded)
    wanted = recorded.inputs["last_batches"]
    scored = candidates.read_candidates(spark, config, corpus, wanted)
    present = scored.inputs["last_batches"]
    if not set(wanted) <= present.keys():
        raise CorpusError(
            f"{name}@{version}: expected {corpus.candidates} to hold rows of its queries {sorted(wanted)}, found "
            f"rows of {sorted(present) or 'others'}: the table was built again since, with other micro-batches; refine "
            "again"
        )
    joined, _ = with_instances(spark, config, scored.rows, str(corpus.where), str(corpus.score))
    return config, corpus, refine.candidate_rows(joined, config, name, corpus)


def recorded_config(root: str, name: str, recorded: Provenance) -> tuple[ExperimentConfig, CorpusConfig]:
    """The part of the experiment that a version depends on, and its resolved corpus config, from the provenance.

    Args:
        root: URI of the root, for the config.
        name: name of the corpus.
        recorded: the provenance of the version.

    Raises:
        CorpusError: another release of this code wrote the record.
    """
    plain = dict(recorded.config)
    tokens_of, models = plain.pop("tokens_of"), plain.pop("models")
    try:
        corpus = CorpusConfig(**{**plain, "select": SelectConfig(**plain["select"])})
    except TypeError as error:
        raise CorpusError(
            f"corpus {name!r}: another release of this code ({recorded.code_revision}) recorded its config: {error}"
        ) from error
    refined = RefineConfig(tokens_of=tokens_of, corpora={name: corpus})
    # The paths of the models do not matter, because nothing is scored or predicted.
    proxy = ProxyConfig(score=PREDICTION) if corpus.is_of_proxy else None
    scored = {alias: ModelConfig(path=alias) for alias in models}
    return ExperimentConfig(root=root, models=scored, refine=refined, proxy=proxy), corpus


def recounted(provenance: Provenance, rows: "DataFrame") -> Provenance:
    """Returns a provenance with the counts, the threshold and the fingerprint of other rows; reads the rows once.

    Args:
        provenance: provenance of the version that the rows come from.
        rows: a frame with instance_id, score and n_tokens.

    Returns:
        The new provenance; without a row, it keeps the threshold.
    """
    from pyspark.sql import functions as F

    sums = rows.agg(*fingerprints.sums_of(F.lit(True))).collect()[0]
    n_rows = int(sums["n_kept"])
    return dataclasses.replace(
        provenance,
        threshold=provenance.threshold if sums["threshold"] is None else sums["threshold"],
        n_instances=n_rows,
        n_tokens=sums["n_tokens"] or 0,
        fingerprint=fingerprints.fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], n_rows),
    )


def _commit(
    spark: "SparkSession", config: ExperimentConfig, rows: "DataFrame", provenance: Provenance,
    derived: DerivedFrom,
) -> DerivedVersion:  # fmt: skip
    """Commits rows in place of the newest version's rows, unless they are the same."""
    name, from_version = provenance.corpus, derived["from_version"]
    with refine.corpus_lease(config, name):
        newest = corpus_records.newest(config.layout.refined(name))
        present = newest.provenance if newest else None
        if newest and present and present.fingerprint == provenance.fingerprint and present.config == provenance.config:
            corpus_records.record(spark, config.root, newest.version, present)
            return _derived(newest.version, from_version, present, skipped=True)
        version = commit_derived(spark, config, rows, provenance, newest, derived)
        return _derived(version, from_version, provenance, skipped=False)


def commit_derived(
    spark: "SparkSession", config: ExperimentConfig, rows: "DataFrame", provenance: Provenance,
    newest: corpus_records.Newest | None, derived: DerivedFrom,
) -> int:  # fmt: skip
    """Commits rows that come from an earlier version, and records the new version. The caller holds the corpus's lease.

    Args:
        spark: any session.
        config: the experiment.
        rows: all rows of the new version.
        provenance: provenance of these rows.
        newest: the state of the table that the rows replace.
        derived: where they come from (`Provenance.derived`).

    Returns:
        The number of the new version.

    Raises:
        CorpusError: another driver has committed meanwhile.
    """
    derived_provenance = dataclasses.replace(provenance, derived=derived, kept_share_by_source={})
    version = refine.commit(config, rows, derived_provenance.n_instances, derived_provenance, newest, replaces=True)
    corpus_records.record(spark, config.root, version, derived_provenance)
    return version


def _derived(version: int, from_version: int, provenance: Provenance, skipped: bool) -> DerivedVersion:
    return DerivedVersion(
        name=provenance.corpus,
        version=version,
        from_version=from_version,
        n_instances=provenance.n_instances,
        fingerprint=provenance.fingerprint,
        skipped=skipped,
    )
