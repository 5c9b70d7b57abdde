"""`miniplm compare`: students × metrics from records and from MLflow, the spread over seeds, MLflow's page of them."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import compare as compare_job
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.report import comparison
from tests.support import corpus_rows, model_records
from tests.support.browser import chromium as chromium
from tests.support.browser import opened
from tests.support.mlflow_server import MlflowServer
from tests.support.tracking_store import DATABASE, write_empty_store

LOSSES = {"miniplm_s0": 1.10, "miniplm_s1": 1.20, "miniplm_s2": 1.15, "conventional": 1.3}
METRICS = ("heldout_bits_per_byte", "tasks/piqa", "tasks/average")


def experiment(folder: Path, **mlflow: str) -> Path:
    """An experiment file with three seeds of one student and one seed of another."""
    model = {"architecture": {"model_type": "llama"}, "tokenizer": "qwen"}
    students: dict[str, Any] = {
        name: {**model, "corpus": "random" if name == "conventional" else "difference", "train": {"seed": seed}}
        for seed, name in enumerate(LOSSES)
    }
    file = folder / "experiment.yaml"
    corpora = {"difference": {}, "random": {"select": {"rule": "random", "ratio": 0.5}}}
    config = {
        "root": str(folder / "root"), "mlflow": {"experiment": "seeds", **mlflow}, "students": students,
        "models": {"teacher": {"path": "t"}, "reference": {"path": "r"}}, "refine": {"corpora": corpora},
        "tokenizers": {"qwen": {"path": "t"}},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config))
    return file


def write_records(config: ExperimentConfig, run_ids: dict[str, str]) -> None:
    for name, bits in LOSSES.items():
        lineage = {"corpus": "difference", "refined_version": 3}
        model_records.write_training(config, name, run_id=run_ids.get(name), lineage=lineage, n_parameters=10**6)
        sets = {"heldout": model_records.set_evaluation(model_records.text_loss(bits))}
        evaluation = model_records.evaluation(sets, {"piqa": bits / 4})
        storage.write_json(config.layout.model(name, "evaluation.json"), dataclasses.asdict(evaluation))


def write_runs(config: ExperimentConfig) -> dict[str, str]:
    """The runs as the trainer logs them; returns their ids by student. One more run is not finished."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.mlflow_uri())
    experiment_id = client.create_experiment(config.mlflow.experiment, artifact_location=config.artifact_uri())
    run_ids = {}
    for seed, name in enumerate([*LOSSES, "unfinished"]):
        run = client.create_run(experiment_id, run_name=name, tags={"refined_version": "3", "corpus": "difference"})
        params = {
            "n_parameters": 10**6, "sequence_length": 256, "train.steps": 100, "train.batch_sequences": 8,
            "train.seed": seed, "tokenizer": "qwen", "corpus": "random" if name == "conventional" else "d",
        }  # fmt: skip
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
        if name in LOSSES:
            for metric, value in zip(METRICS, (LOSSES[name], LOSSES[name] / 4, LOSSES[name] / 4), strict=True):
                client.log_metric(run.info.run_id, metric, value)
            client.set_terminated(run.info.run_id)
            run_ids[name] = run.info.run_id
    return run_ids


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    file = experiment(tmp_path)
    config = load_config(file, [])
    config.local_folder().mkdir(parents=True)
    write_empty_store(config.local_folder())
    assert config.mlflow_uri().endswith(DATABASE)
    run_ids = write_runs(config)
    write_records(config, run_ids)
    return file, run_ids


def result(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert compare_job.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("source", [[], ["--mlflow"]], ids=["records", "MLflow"])
def test_seeds_are_one_row_with_mean_and_spread(
    made: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str], source: list[str]
) -> None:
    file, run_ids = made
    shown = result(capsys, "-c", str(file), *source)
    first, second = shown["students"]
    assert (first["name"], second["name"]) == ("miniplm", "conventional")
    assert sorted(first["trainings"]) == sorted(name for name in LOSSES if name != "conventional")
    assert first["seeds"] == [0, 1, 2]
    assert (first["steps"], first["tokens"], first["corpus_versions"]) == (100, 204_800, [3])
    assert first["flop"] == 6 * 10**6 * 204_800
    seeds = [LOSSES[name] for name in first["trainings"]]
    for metric, factor in zip(METRICS, (1, 4, 4), strict=True):
        spread = first["metrics"][metric]
        assert spread["n"] == 3
        assert spread["mean"] * factor == pytest.approx(statistics.fmean(seeds))
        assert spread["deviation"] * factor == pytest.approx(statistics.stdev(seeds))
    assert second["metrics"][METRICS[0]] == {"mean": 1.3, "deviation": None, "n": 1}
    assert set(first["run_ids"] + second["run_ids"]) == set(run_ids.values())
    assert all(run_id in shown["mlflow_url"] for run_id in run_ids.values())


def test_table_for_a_terminal(made: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_job.main(["-c", str(made[0])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["miniplm", "difference", "3", "bpe", "3", "100", "204,800", "1.23e+12", "1.1500", "±", "0.0500"] in lines
    assert ["conventional", "random", "3", "bpe", "1", "100", "204,800", "1.23e+12", "1.3000"] in lines
    assert ["miniplm", "28.8", "±", "1.2", "28.8", "±", "1.2"] in lines
    assert ["mlflow", "ui", "--backend-store-uri"] in [line[:3] for line in lines]


def test_a_newer_version_of_a_corpus_is_said(
    made: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The students were trained on version 3."""
    file, _ = made
    root = file.parent / "root"
    corpus_rows.record(root, "difference", 3)
    corpus_rows.record(root, "random", 3)
    assert result(capsys, "-c", str(file))["newer_versions"] == []
    corpus_rows.record(root, "difference", 5)
    (newer,) = result(capsys, "-c", str(file))["newer_versions"]
    students = {name: 3 for name in LOSSES if name != "conventional"}
    assert newer == {"corpus": "difference", "newest": 5, "trained": students}
    assert compare_job.main(["-c", str(file)]) == 0
    assert (
        "The corpus difference has a newer version, 5, than the students miniplm_s0 (version 3), "
        in capsys.readouterr().out
    )


def test_a_root_without_its_config_and_a_second_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for number, root in enumerate(roots):
        config = ExperimentConfig(root=str(root))
        model_records.write_training(config, "small")
        model_records.write_training(config, "reference", lineage={"corpus": "reference"})
        evaluation = model_records.evaluation(
            {"heldout": model_records.set_evaluation(model_records.text_loss(1.0 + number))}
        )
        storage.write_json(config.layout.model("small", "evaluation.json"), dataclasses.asdict(evaluation))
    shown = result(capsys, "--root", str(roots[0]), "--also", str(roots[1]))
    assert [(student["name"], student["metrics"][METRICS[0]]["mean"]) for student in shown["students"]] == [
        ("small", 1.5)
    ]
    assert shown["mlflow_url"] is None
    # A root that is named twice counts once.
    again = result(capsys, "--root", str(roots[0]), "--also", str(roots[0]))
    assert again["students"][0]["metrics"][METRICS[0]]["n"] == 1
    assert not (roots[0] / DATABASE).exists(), "a comparison must not create a store"


def test_nothing_trained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "root/models").mkdir(parents=True)
    assert compare_job.main(["--root", str(tmp_path / "root")]) == 1
    assert "no trained student" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["a", "a"], "a"), (["m_s0", "m_s1"], "m"), (["m-seed-1", "m-seed-2"], "m"), (["q_10", "q_11"], "q"),
        (["students1", "students2"], "students"), (["x", "y", "z"], "x and 2 more"),
    ],
)  # fmt: skip
def test_names_of_seeds(names: list[str], shared: str) -> None:
    assert comparison.shared_name(names) == shared


@pytest.mark.long
def test_page_of_a_real_server_has_the_runs(tmp_path: Path, chromium: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = MlflowServer(tmp_path)
    server.start()
    try:
        file = experiment(tmp_path, tracking_uri=server.uri)
        write_records(load_config(file, []), write_runs(load_config(file, [])))
        capsys.readouterr()  # MLflow prints the addresses of the runs
        shown = result(capsys, "-c", str(file))
        assert shown["mlflow_command"] is None
        with opened(chromium, shown["mlflow_url"]) as view:
            for name in LOSSES:
                view.page.get_by_text(name, exact=True).first.wait_for(timeout=60_000)
            view.page.get_by_text("heldout_bits_per_byte").first.wait_for(timeout=60_000)
            content = view.page.inner_text("body")
            assert "unfinished" not in content
            assert {url.split("/")[2] for url in view.requests if url.startswith("http")} == {
                f"127.0.0.1:{server.port}"
            }
            view.page.screenshot(path=tmp_path / "compare.png", full_page=True)
    finally:
        server.stop()
