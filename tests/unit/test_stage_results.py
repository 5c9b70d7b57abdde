"""The numbers of stages in `summary.json`, the rates of trainings, and a result that `miniplm run` refuses."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from jobs import export, inspect_corpus
from jobs.records import write_record
from jobs.stage import Options
from jobs.stages import STAGES, stage_named
from jobs.summary import build_summary, summary_text
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.errors import CorpusError
from tests.support.model_records import write_training
from tests.support.stage_summaries import simplest, summary_of

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return load_config(CONF / "demo.yaml", [f"root={tmp_path}/root"])


def finish(config: ExperimentConfig, name: str, **values: Any) -> None:
    stage = stage_named(name)
    write_record(config, name, "f", stage.to_json(summary_of(stage, **values)), 2.0)


def test_the_summary_has_the_numbers_of_every_stage(config: ExperimentConfig) -> None:
    keys = set(build_summary(config))
    finish(config, "ingest", instances=9, rejected=1)
    finish(config, "score", scored={"teacher": 7}, tokens_per_second={"teacher": 5.0}, rejected=2)
    proxy = summary_of(stage_named("proxy"))
    rows = dataclasses.replace(proxy.rows, pool=8)
    finish(config, "proxy", rows=rows, heldout=dataclasses.replace(proxy.heldout, spearman=0.5))
    finish(config, "refine", kept={"half": 4}, refined={})
    finish(config, "generate", generated=3, rejected=4)
    summary = build_summary(config)
    assert set(summary) == keys
    assert summary["seconds"] == dict.fromkeys(("ingest", "score", "proxy", "refine", "generate"), 2.0)
    assert (summary["instances"], summary["rejected"], summary["generated"]) == (9, 7, 3)
    assert (summary["scored"], summary["tokens_per_second"]) == ({"teacher": 7}, {"teacher": 5.0})
    assert (summary["proxy"], summary["kept"]) == ({"predicted": 8, "spearman": 0.5}, {"half": 4})


def test_the_table_of_a_run_has_the_rates_of_scoring_and_training(config: ExperimentConfig) -> None:
    for stage in STAGES:
        finish(config, stage.name)
    finish(config, "score", tokens_per_second={"teacher": 10.0, "reference": None})
    write_training(config, "reference", tokens=300, seconds=3.0)
    write_training(config, "miniplm", tokens=800, seconds=2.0)
    lines = summary_text(config, build_summary(config), Options()).splitlines()
    rates = {words[0]: words[3:] for words in map(str.split, lines) if words[1:3] == ["2.0", "s"]}
    assert set(rates) == {stage.name for stage in STAGES}
    assert (rates["score"], rates["reference"], rates["train"]) == (
        ["teacher", "10"], ["reference", "100"], ["miniplm", "400"],
    )  # fmt: skip
    assert rates["ingest"] == []


def test_the_next_commands_take_the_words_of_this_one(config: ExperimentConfig) -> None:
    """Pasted into a terminal, they parse, and name the same experiment."""
    for stage in STAGES:
        finish(config, stage.name)
    (version,) = summary_of(stage_named("refine")).refined.values()
    refined = {"half": dataclasses.replace(version, n_candidates=1234)}
    finish(config, "refine", kept={"half": 4}, refined=refined)
    options = Options(config_path="my configs/e.yaml", overrides=[f"root={config.root}", "spark.conf={a: b}"])
    text = summary_text(config, build_summary(config), options)
    assert re.search(r"kept in half +4 of the 1,234 that pass `where`", text)
    commands = [shlex.split(line[line.index("miniplm ") :])[1:] for line in text.splitlines() if " miniplm " in line]
    assert [words[:2] for words in commands] == [["inspect", "half"], ["export", "half"]]
    for name, *words in commands:
        arguments = {"inspect": inspect_corpus, "export": export}[name].COMMAND.parser().parse_intermixed_args(words)
        assert (arguments.version, arguments.config) == ("half", "my configs/e.yaml")
        assert arguments.overrides == options.overrides


@pytest.mark.parametrize(
    ("n_heldout", "overrides", "is_refused"),
    [(0, [], True), (1, [], False), (0, ["ingest.split.heldout=0"], False), (0, ["students={}"], False)],
)
def test_a_corpus_without_held_out_text_is_refused_if_students_need_it(
    n_heldout: int, overrides: list[str], is_refused: bool, tmp_path: Path
) -> None:
    config = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root", *overrides])
    stage = stage_named("ingest")
    summary = dataclasses.replace(simplest(stage.summary_class), by_split={"pool": 5, "heldout": n_heldout})
    if is_refused:
        with pytest.raises(CorpusError, match="expected held-out documents to evaluate the students on, found none"):
            stage.check_result(config, summary)
    else:
        stage.check_result(config, summary)
