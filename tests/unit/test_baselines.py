"""The baseline of a student, in the report and in `miniplm compare`: the student that differs in the corpus only."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import compare as compare_job
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.rules import is_baseline_corpus
from miniplm_udf.report import students
from miniplm_udf.report.baselines import setting_without_corpus
from tests.support import model_records

REPOSITORY = Path(__file__).resolve().parents[2]
CORPORA: dict[str, Any] = {
    "difference": {},
    "random": {"select": {"rule": "random", "ratio": 0.5}},
    "whole": {"select": {"rule": "top_ratio", "ratio": 1.0}},
}


def student(corpus: str, model_type: str = "llama", tokenizer: str = "qwen", **train: Any) -> dict[str, Any]:
    return {
        "corpus": corpus, "tokenizer": tokenizer, "architecture": {"model_type": model_type}, "train": train,
    }  # fmt: skip


FAMILIES = {
    f"{family}_{corpus}": student(corpus, family)
    for family in ("llama", "qwen2")
    for corpus in ("difference", "random")
}


def write_config(folder: Path, declared: dict[str, dict[str, Any]]) -> Path:
    """An experiment file with the students."""
    file = folder / "experiment.yaml"
    config = {
        "root": str(folder / "root"), "students": declared, "refine": {"corpora": CORPORA},
        "models": {"teacher": {"path": "t"}, "reference": {"path": "r"}},
        "tokenizers": {"qwen": {"path": "t"}, "bpe": {"vocab_size": 300}},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def write_records(config: ExperimentConfig, bits: dict[str, float], n_tokens: int = 10**6, **training: Any) -> None:
    """Records of trained students, and evaluations with bits per byte."""
    for name, value in bits.items():
        model_records.write_training(config, name, **{"tokens": 10**9, **training})
        loss = dataclasses.replace(model_records.set_evaluation(model_records.text_loss(value, n_tokens)),
                                   location=config.root)  # fmt: skip
        record = dataclasses.asdict(model_records.evaluation({"heldout": loss}))
        storage.write_json(config.layout.model(name, "evaluation.json"), record)


def pairs_of_report(folder: Path, declared: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Student and baseline of each row of the report's table; every student is evaluated."""
    config = load_config(write_config(folder, declared), [])
    write_records(config, {name: 1.0 + number / 10 for number, name in enumerate(declared)})
    return [(row.name, row.baseline) for row in students.differences(students.students(config))]


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Difference of each row of `miniplm compare --json`, by its name."""
    assert compare_job.main([*words, "--json"]) == 0
    return {row["name"]: row["difference"] for row in json.loads(capsys.readouterr().out)["students"]}


def test_each_family_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    expected = [("llama_difference", "llama_random"), ("qwen2_difference", "qwen2_random")]
    assert pairs_of_report(tmp_path, FAMILIES) == expected


@pytest.mark.parametrize(
    "other",
    [
        student("random", "mamba"), student("random", tokenizer="bpe"), student("random", steps=9),
        student("random", seed=1), student("random", kd_ratio=0.5), student("difference", steps=9),
    ],
    ids=["architecture", "tokenizer", "steps", "seed", "teacher", "corpus"],
)  # fmt: skip
def test_student_without_a_partner_has_no_row(tmp_path: Path, other: dict[str, Any]) -> None:
    assert pairs_of_report(tmp_path, {"chosen": student("difference"), "other": other}) == []


def test_keys_that_do_not_change_a_training_may_differ(tmp_path: Path) -> None:
    other = student("random", micro_batch_sequences=2, save_every_steps=7, compile=False)
    assert pairs_of_report(tmp_path, {"chosen": student("difference"), "other": other}) == [("chosen", "other")]


def test_whole_corpus_is_a_baseline_and_baselines_are_not_compared(tmp_path: Path) -> None:
    declared = {"whole": student("whole"), "chosen": student("difference"), "random": student("random")}
    assert pairs_of_report(tmp_path, declared) == [("chosen", "whole")]


def test_baseline_without_an_evaluation_is_passed_over(tmp_path: Path) -> None:
    declared = {"whole": student("whole"), "chosen": student("difference"), "random": student("random")}
    config = load_config(write_config(tmp_path, declared), [])
    write_records(config, {"chosen": 1.0, "random": 1.1})
    model_records.write_training(config, "whole", tokens=10**9)
    assert [row.baseline for row in students.differences(students.students(config))] == ["random"]


@pytest.mark.parametrize("name", ["demo", "data_limited", "pile_families", "pile_qwen"])
def test_every_student_of_the_experiments_has_a_baseline_or_is_one(name: str) -> None:
    config = load_config(REPOSITORY / f"conf/{name}.yaml", [])
    settings: dict[bool, list[str]] = {True: [], False: []}
    for each in config.students.values():
        is_baseline = is_baseline_corpus(config.refine.corpora, each.corpus)
        settings[is_baseline].append(setting_without_corpus(each, with_seed=True))
    assert settings[False]
    assert set(settings[False]) == set(settings[True])
    assert len(set(settings[True])) == len(settings[True])


def test_compare_has_the_pairs_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path, FAMILIES)
    write_records(load_config(file, []), dict(zip(FAMILIES, (1.1, 1.2, 1.5, 1.4), strict=True)))
    shown = compared(capsys, "-c", str(file))
    assert {name for name, difference in shown.items() if difference} == {"llama_difference", "qwen2_difference"}
    assert shown["llama_difference"] == {
        "name": "llama_difference", "baseline": "llama_random", "bits_per_byte": pytest.approx(-0.1),
        "relative": pytest.approx(-0.1 / 1.2), "is_noise": False,
    }  # fmt: skip
    assert compare_job.main(["-c", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["llama_difference", "llama_random", "-0.1000", "-8.33%", "lower", "(better)"] in lines
    assert ["qwen2_difference", "qwen2_random", "+0.1000", "+7.14%", "higher", "(worse)"] in lines


@pytest.mark.parametrize(("tokens", "n_tokens"), [(10**9 - 1, 10**6), (10**9, 10**6 - 1)], ids=["training", "held-out"])
def test_compare_says_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int, n_tokens: int) -> None:
    file = write_config(tmp_path, {"chosen": student("difference"), "random": student("random")})
    write_records(load_config(file, []), {"chosen": 1.1, "random": 1.2}, n_tokens, tokens=tokens)
    assert compare_job.main(["-c", str(file)]) == 0
    assert "lower (better): noise at this size" in capsys.readouterr().out


def test_compare_takes_the_means_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = {f"chosen_s{seed}": student("difference", seed=seed) for seed in range(3)}
    declared["random_s5"] = student("random", seed=5)
    file = write_config(tmp_path, declared)
    write_records(load_config(file, []), dict(zip(declared, (1.0, 1.1, 1.2, 1.3), strict=True)))
    shown = compared(capsys, "-c", str(file))
    assert shown["chosen"]["baseline"] == "random_s5"
    assert shown["chosen"]["bits_per_byte"] == pytest.approx(-0.2)


def test_compare_has_no_difference_between_other_texts_or_without_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, corpus in (("chosen", "difference"), ("random", "random")):
        (tmp_path / name).mkdir()
        files.append(write_config(tmp_path / name, {name: student(corpus)}))
        write_records(load_config(files[-1], []), {name: 1.1})
    assert compared(capsys, "-c", str(files[0]), "--also", str(files[1])) == {"chosen": None, "random": None}
    file = write_config(tmp_path, FAMILIES)
    write_records(load_config(file, []), dict.fromkeys(FAMILIES, 1.1))
    assert set(compared(capsys, "--root", str(tmp_path / "root")).values()) == {None}
