"""The plan of a dry run: what each stage reads and writes, and whether it would run. Driver only, no Spark.

Input: the stages, the config and the root's records and logs. Output: text. Only Spark lists files of the user, so the
plan of a stage that reads them says that it runs if they have changed. Writes nothing.
"""

import enum
from collections.abc import Sequence

from jobs.records import StageRecord, utc
from jobs.stage import Options, Stage
from jobs.text import table
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError


class _Outcome(enum.Enum):
    RUNS = "would run"
    MAY_RUN = "would run if"
    SKIPPED = "would be skipped"
    REFUSED = "would be refused"
    ABSENT = "not part of this experiment"


def plan_text(stages: Sequence[Stage], config: ExperimentConfig, options: Options, is_named: bool) -> str:
    """Describes what a command would do.

    Args:
        stages: the stages of the command, in order.
        config: the experiment.
        options: the options of the command line.
        is_named: the stage is a command of its own, which runs although it is unchanged.

    Returns:
        For each stage one line that says whether it would run, and below it what it reads and writes.
    """
    rows: list[tuple[str, str]] = []
    changing: dict[str, list[str]] = {}
    for stage in stages:
        outcome, reason = _outcome(stage, config, options, is_named, changing)
        rows.append((stage.name, f"{outcome.value}{reason}"))
        if outcome in (_Outcome.ABSENT, _Outcome.REFUSED):
            continue
        outputs = stage.outputs(config)
        written = [*outputs.tables, *stage.may_write, *outputs.files]
        if outcome is not _Outcome.SKIPPED:
            for place in written:
                changing.setdefault(place.rstrip("/"), []).append(stage.name)
        places = table(None, [("reads", _names(stage.reads(config))), ("writes", _names(written))])
        rows += [("", line) for line in places.splitlines()]
    return table(None, rows, "  ")


def _outcome(
    stage: Stage, config: ExperimentConfig, options: Options, is_named: bool, changing: dict[str, list[str]]
) -> tuple[_Outcome, str]:
    """Whether a stage would run, and the reason; `changing` has the stages before it that may change each place."""
    if not stage.applies(config):
        return _Outcome.ABSENT, f": it needs {stage.needs}"
    if stage.is_service(options):
        return _Outcome.RUNS, " as a service, until it is stopped or has read all its input (stream.trigger)"
    missing, record = stage.missing(config), stage.record(config)
    if stage.frozen is not None:
        if stage.frozen.is_asked_for(options):
            return _Outcome.RUNS, f": {stage.frozen.option}"
        if not missing:
            return _Outcome.SKIPPED, f": it exists; {stage.frozen.option} replaces it"
        try:
            stage.frozen.require(config)
        except CorpusError as error:
            return _Outcome.REFUSED, f": {error}"
    if record is None:
        return _Outcome.RUNS, ": it has not finished on this root yet"
    if missing:
        return _Outcome.RUNS, f": {_names(missing)} is missing"
    finished = _finished(record)
    fingerprint = stage.fingerprint(None, config)
    if fingerprint is not None and fingerprint != record.fingerprint:
        return _Outcome.RUNS, f": its config or its inputs have changed since it finished ({finished})"
    if is_named:
        return _Outcome.RUNS, f" again, because you named it; it finished before ({finished})"
    if fingerprint is None:
        return _Outcome.MAY_RUN, f" its config or its input files have changed since it finished ({finished})"
    changed = [
        (place, name)
        for place in stage.reads(config)
        for written, names in changing.items()
        for name in names
        if f"{written}/".startswith(f"{place}/")
    ]
    if changed:
        names = dict.fromkeys(name for _, name in changed)
        return _Outcome.MAY_RUN, f" {' or '.join(names)} changes {_names([place for place, _ in changed])}"
    return _Outcome.SKIPPED, f": unchanged since it finished ({finished})"


def _finished(record: StageRecord) -> str:
    seconds = f"{record.seconds:.0f} s"
    if (at := record.finished_at) is None:
        return seconds
    return f"{utc(at)} UTC, {seconds}"


def _names(places: Sequence[str]) -> str:
    return ", ".join(map(storage.shown, dict.fromkeys(places))) or "nothing"
