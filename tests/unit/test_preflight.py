"""A root that cannot be written, and small files that are damaged, are refused by name."""

import dataclasses
import re
from pathlib import Path

import pytest

from jobs.records import write_record
from jobs.stage import Options
from jobs.stage_runner import must_run
from jobs.stages import stage_named
from jobs.summary import build_summary, summary_text
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.offsets import end_offset
from miniplm_udf.upkeep import preflight
from tests.support.stage_summaries import summary_of

REPOSITORY = Path(__file__).resolve().parents[2]


# Under /proc nobody can write, root neither.
@pytest.mark.parametrize("root", ["/etc/passwd/x", "/proc/x", "/proc/self"])
def test_a_root_that_cannot_be_written(root: str) -> None:
    with pytest.raises(ConfigError, match=rf"root {root}: .*root=FOLDER"):
        preflight.require_writable(storage.to_uri(root))


def test_a_root_that_is_made(tmp_path: Path) -> None:
    preflight.require_writable(storage.to_uri(str(tmp_path / "a b" / "c")))
    assert list((tmp_path / "a b" / "c").iterdir()) == []
    preflight.require_writable("memory://nothing")


@pytest.mark.parametrize("content", ["", "{", "no json"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(CorpusError, match=r"record .*record\.json: expected JSON"):
        storage.read_json(storage.to_uri(str(tmp_path / "record.json")))
    (tmp_path / "offsets").mkdir()
    (tmp_path / "offsets" / "3").write_text(content)
    with pytest.raises(CorpusError, match=r"offsets of micro-batch 3.*remove the checkpoint"):
        end_offset(str(tmp_path), 3)
    for folder, read in (("_checkpoints/q", lambda root: list(checkpoints.find(root))), ("_status", statuses.read_all)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metadata").write_text(content)
        (tmp_path / folder / "q.json").write_text("{}")
        with pytest.raises(CorpusError, match="remove"):
            read(str(tmp_path))


def test_a_reference_that_was_scored_with_is_not_trained_again_unasked(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "conf/demo.yaml", [f"root={tmp_path}"])
    reference = stage_named("reference")
    assert must_run(reference, None, config, Options(), is_named=False)  # type: ignore[arg-type]
    storage.write_json(config.layout.model("reference.json"), {})
    with pytest.raises(CorpusError, match=r"models/reference: .*put it back from a copy, or .*--retrain-reference"):
        must_run(reference, None, config, Options(), is_named=False)  # type: ignore[arg-type]
    assert must_run(reference, None, config, Options(retrain_reference=True), is_named=False)  # type: ignore[arg-type]


def test_the_summary_of_a_root_that_was_moved_names_the_new_place(tmp_path: Path) -> None:
    corpora = {"kept": CorpusConfig(select=SelectConfig(ratio=0.5))}
    models = {"teacher": ModelConfig(path="x")}
    config = ExperimentConfig(root=str(tmp_path / "new"), models=models, refine=RefineConfig(corpora=corpora))
    refine = stage_named("refine")
    (version,) = summary_of(refine).refined.values()
    old = dataclasses.replace(version, path=f"file://{tmp_path}/old/tables/refined/kept", version=3)
    write_record(config, "refine", "x", refine.to_json(summary_of(refine, refined={"kept": old})), 1.0)
    assert build_summary(config)["refined"] == {
        "kept": {
            "path": f"file://{tmp_path}/new/tables/refined/kept",
            "version": 3,
            "candidates": version.n_candidates,
        }
    }


def test_lost_generations_are_named_with_their_remedy(tmp_path: Path) -> None:
    """A checkpoint remembers what its query has read, and the table that it wrote is gone."""
    checkpoint = tmp_path / "_checkpoints/generate-abc"
    for folder, content in (("offsets", 'v1\n{}\n{"reservoirVersion": 0}'), ("commits", "v1\n{}")):
        (checkpoint / folder).mkdir(parents=True)
        (checkpoint / folder / "0").write_text(content)
    (checkpoint / "metadata").write_text('{"id": "0-1"}')
    log = tmp_path / "tables/rejects/_delta_log"
    log.mkdir(parents=True)
    (log / f"{0:020}.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"tables/generations\b.*remove .*generate-abc and run again"):
        preflight._require_tables_of_queries(str(tmp_path), ("generate",))
    with pytest.raises(CorpusError, match=r"tables/generations, which .*remove the checkpoints generate-\*"):
        preflight.check_files(str(tmp_path), preflight.EVERY_TABLE)


def test_the_summary_counts_generated_instances_and_the_rejects_of_every_stage(tmp_path: Path) -> None:
    config = ExperimentConfig(root=str(tmp_path), models={"teacher": ModelConfig(path="x")})
    assert build_summary(config)["generated"] is None
    for name, numbers in {
        "ingest": {"instances": 9, "rejected": 1},
        "score": {"rejected": 2},
        "generate": {"generated": 4, "rejected": 3},
    }.items():
        stage = stage_named(name)
        write_record(config, name, "x", stage.to_json(summary_of(stage, **numbers)), 1.0)
    summary = build_summary(config)
    assert (summary["generated"], summary["rejected"]) == (4, 6)
    assert re.search(r"generated +4\b", summary_text(config, summary, Options()))
