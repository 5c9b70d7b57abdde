"""Scaling laws: the paper's numbers, intervals that cover, what is not determined, runs from a real MLflow store."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from jobs import cli
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.tracking import MlflowConfig
from miniplm_udf.errors import ConfigError, CorpusError
from tests.support.scaling_losses import COMPUTE, MINIPLM, PAPER, WITHOUT_KD, law, losses, runs_of_one_point
from tests.support.tracking_store import own_tracking_store
from tests.support.trainer_roots import LENGTH, TRAIN, make_root, write_config
from trainer.__main__ import main
from trainer.scaling.command import ScalingOptions, scaling
from trainer.scaling.laws import LossCurve, ScalingFit, compute_saved, fit_law
from trainer.scaling.plot import draw_laws
from trainer.scaling.runs import StudentRuns, read_runs
from trainer.tracking.run import tracked_run

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_extrapolated_losses_follow_from_its_constants(size: str) -> None:
    compute, methods = PAPER[size]
    for of, expected in methods.values():
        assert [of.loss(compute), of.loss(10 * compute)] == pytest.approx(expected, abs=0.02)


def test_the_constants_of_1_2b_stand_in_the_order_of_its_losses() -> None:
    compute, methods = PAPER["1.2B"]
    for method, (_, expected) in methods.items():
        matches = [
            name for name, (of, _) in methods.items() if abs(of.loss(compute) - expected[0]) < 0.02
        ]  # 0.02 is also the smallest distance between the losses of two methods
        assert matches == [method]


@pytest.mark.slow
@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("method", ["without_kd", "vanilla_kd", "miniplm"])
def test_losses_without_scatter_give_the_law_back(size: str, method: str) -> None:
    of = PAPER[size][1][method][0]
    fit = fit_law(runs_of_one_point(losses(of)), replicates=20)
    assert dataclasses.astuple(fit.law) == pytest.approx(dataclasses.astuple(of), rel=1e-3)
    assert (fit.exponent.low, fit.exponent.high) == pytest.approx((of.exponent, of.exponent), rel=1e-3)
    assert fit.undetermined == ()


def test_compute_is_the_inverse_of_loss() -> None:
    assert WITHOUT_KD.compute(WITHOUT_KD.loss(3e20)) == pytest.approx(3e20)
    assert WITHOUT_KD.compute(3.30) == WITHOUT_KD.compute(1.0) == math.inf
    assert 0 < law(1.0, 1e-6, 1.0).compute(1e6) < 1e-300


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.8, 1.2])
@pytest.mark.parametrize("position", [0, 3, 11])
def test_one_bad_run_hardly_moves_the_law(factor: float, position: int) -> None:
    spoiled = losses(WITHOUT_KD, 0.001)
    spoiled[position] *= factor
    fit = fit_law(runs_of_one_point(spoiled), replicates=20)
    assert fit.law.loss(1.26e21) == pytest.approx(WITHOUT_KD.loss(1.26e21), rel=0.01)


def test_the_same_seed_gives_the_same_intervals() -> None:
    curves = runs_of_one_point(losses(WITHOUT_KD, 0.003))
    first = fit_law(curves, replicates=30)
    assert fit_law(curves, replicates=30) == first
    assert fit_law(curves, replicates=30, seed=1).exponent != first.exponent


NARROW = np.logspace(18, 18.3, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curves", "problem"),
    [
        (runs_of_one_point(losses(law(1e-9, 0.4, 3.3), 0.003)), "the loss falls by"),
        (runs_of_one_point([3.3] * 12), "the loss falls by"),
        (runs_of_one_point(np.linspace(3, 4, 12)), "the loss falls by"),
        (runs_of_one_point(losses(WITHOUT_KD, 0.003, compute=NARROW), NARROW), "the floor may be anything"),
        (runs_of_one_point(losses(WITHOUT_KD, 0.03)), "the exponent may be anything"),
        (runs_of_one_point(losses(law(40.0, 0.06, 1e-9), 0.003)), "the fit finds no floor"),
    ],
    ids=["flat", "constant", "rising", "narrow", "scattered", "without a floor"],
)
def test_runs_that_do_not_determine_a_law_are_named(curves: list[LossCurve], problem: str) -> None:
    fit = fit_law(curves, replicates=20)
    assert any(problem in sentence for sentence in fit.undetermined), fit


def test_fewer_than_five_values_of_compute_are_refused() -> None:
    twice = [*runs_of_one_point(losses(WITHOUT_KD)[:4], COMPUTE[:4])] * 2
    with pytest.raises(CorpusError, match="expected losses at 5 or more different values of compute, found 4"):
        fit_law(twice)


def test_residuals_of_a_curve_are_drawn_in_blocks_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.scaling import laws as module

    blocks: list[int] = []
    original = module._resampled
    monkeypatch.setattr(module, "_resampled", lambda *arguments: blocks.append(arguments[-1]) or original(*arguments))
    compute = np.logspace(18, 19.8, 40)
    fit_law([LossCurve(compute_flop=tuple(compute), loss=tuple(losses(WITHOUT_KD, 0.003, 0, compute)))], replicates=20)
    fit_law(runs_of_one_point(losses(WITHOUT_KD, 0.003)), replicates=20)
    assert blocks == [3] * 20 + [1] * 20
    residuals = np.arange(10.0)
    rows = original(residuals, np.array([8, 2, 5, 0, 0, 0, 0, 0, 0, 0]), 3)
    steps = {round(step, 6) for step in np.diff(rows) / (rows[1] - rows[0])}
    assert steps == {1.0, -9.0, 2.0, -7.0}  # 8 9 0 | 2 3 4 | 5 6 7 | 0


@pytest.fixture(scope="module")
def fits() -> dict[str, ScalingFit]:
    return {
        name: fit_law(runs_of_one_point(losses(of, 0.002, 5)), replicates=50)
        for name, of in (("without_kd", WITHOUT_KD), ("miniplm", MINIPLM))
    }


def test_compute_saved_is_the_ratio_of_two_laws(fits: dict[str, ScalingFit]) -> None:
    miniplm, baseline = fits["miniplm"], fits["without_kd"]
    saved, lost = compute_saved(miniplm, baseline, 6e19), compute_saved(baseline, miniplm, 6e19)
    assert saved.low < saved.value < saved.high
    assert saved.value == pytest.approx(6e19 / miniplm.law.compute(baseline.law.loss(6e19)))
    assert lost.value < 1 < saved.value
    # The same runs and seed: no student saves compute against itself, and the interval has a width.
    none = compute_saved(baseline, baseline, 6e19)
    assert none.value == pytest.approx(1)
    assert none.low < 0.999 < 1.001 < none.high
    # The loss of this law at 1e30 FLOP lies below the other law's floor.
    assert compute_saved(baseline, miniplm, 1e30).value == 0


@pytest.mark.slow
def test_a_picture_is_a_png_and_repeats(fits: dict[str, ScalingFit], tmp_path: Path) -> None:
    flat = fit_law(runs_of_one_point([3.3] * 12), replicates=20)
    for name in ("a/one.png", "a/two.png"):
        draw_laws({**fits, "flat": flat}, "nats per token", 1e21, tmp_path / name)
    first, second = ((tmp_path / "a" / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert first == second
    assert first.startswith(b"\x89PNG")


# --- runs in MLflow ---


def parameters(**changes: Any) -> dict[str, Any]:
    """The parameters that the trainer logs, as far as they matter here."""
    train = {"steps": 100, "batch_sequences": 8, "warmup_steps": 10}
    values = {"train": train, "n_parameters": 1000, "sequence_length": 16, "corpus": "kept", "tokenizer": "bpe"}
    return {key: {**value, **changes.get(key, {})} if key == "train" else changes.get(key, value)
            for key, value in values.items()}  # fmt: skip


FLOP_A_STEP = 6 * 1000 * 8 * 16


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tokenizers, tables and a prepared MLflow store (5 s to make), to be copied."""
    folder = tmp_path_factory.mktemp("fresh")
    config = make_root(folder)
    prepared = dataclasses.replace(config, mlflow=MlflowConfig(experiment="prepared"))
    with own_tracking_store(), tracked_run(prepared, "other"):
        pass
    return folder


@pytest.fixture
def config(fresh: Path, tmp_path: Path) -> Iterator[ExperimentConfig]:
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    with own_tracking_store():
        yield load_config(write_config(tmp_path, tmp_path / "root"))


def log_run(config: ExperimentConfig, name: str, loss: float | None, text: str = "t", **changes: Any) -> None:
    """A finished run with one held-out loss."""
    with tracked_run(config, name) as run:
        run.log_params(parameters(**changes))
        run.set_tags({"heldout_fingerprint": text})
        if loss is not None:
            run.log_metrics({"heldout_nats_per_token": loss, "heldout_bits_per_byte": loss / 3})


def log_killed_run(config: ExperimentConfig, name: str) -> None:
    """A run that was stopped after it had logged a loss."""
    with contextlib.suppress(KeyboardInterrupt), tracked_run(config, name) as run:
        run.log_params(parameters())
        run.log_metrics({"heldout_nats_per_token": 2.0})
        raise KeyboardInterrupt


def small(config: ExperimentConfig, metric: str = "heldout_nats_per_token") -> StudentRuns:
    return read_runs(config, ["small"], metric)["small"]


@pytest.mark.slow
def test_finished_runs_are_points(config: ExperimentConfig, caplog: pytest.LogCaptureFixture) -> None:
    log_run(config, "small", 4.0, train={"steps": 50})
    log_run(config, "small", 3.5)
    log_run(config, "small", None)
    log_run(config, "other", 1.0)
    log_killed_run(config, "small")
    with tracked_run(config, "small") as run:
        run.log_metrics({"heldout_nats_per_token": 1.0})
    runs = small(config)
    assert [curve.loss for curve in runs.curves] == [(4.0,), (3.5,)]
    assert [curve.compute_flop for curve in runs.curves] == [(50.0 * FLOP_A_STEP,), (100.0 * FLOP_A_STEP,)]
    assert (runs.n_parameters, runs.tokenizer) == (1000, "bpe")
    assert runs.flop(12_800) == 100 * FLOP_A_STEP
    assert runs.tokens(100 * FLOP_A_STEP) == 12_800
    assert "has no metric heldout_nats_per_token: not used" in caplog.text
    assert "has no parameter n_parameters, sequence_length" in caplog.text
    with pytest.raises(CorpusError, match="expected losses at 5 or more"):
        scaling(config, ScalingOptions())


@pytest.mark.slow
def test_a_metric_of_steps_is_a_curve_after_the_warm_up(config: ExperimentConfig) -> None:
    of = law(5e4, 0.6, 2.0)
    curve_of_run = [(step, of.loss(step * FLOP_A_STEP) + (step <= 10)) for step in range(1, 501)]
    # A resumed training repeats a step; the later value counts.
    points = [Metric("train_loss", loss, 0, step) for step, loss in curve_of_run] + [Metric("train_loss", 3.0, 1, 500)]
    with tracked_run(config, "small") as run:
        run.log_params(parameters(train={"steps": 500}))
        MlflowClient(config.mlflow_uri()).log_batch(run.run_id, metrics=points)
    (curve,) = small(config, "train_loss").curves
    assert 30 <= len(curve.loss) <= 40
    assert 11 * FLOP_A_STEP <= curve.compute_flop[0] < 13 * FLOP_A_STEP
    assert list(curve.compute_flop) == sorted(curve.compute_flop)
    assert curve.loss[:-1] == pytest.approx([of.loss(flop) for flop in curve.compute_flop[:-1]], rel=1e-3)
    assert curve.loss[-1] > of.loss(curve.compute_flop[-1])
    fit = fit_law([curve], replicates=20)
    assert fit.law.floor == pytest.approx(2.0, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_parameters": 2000}, "expected runs with one n_parameters, found 1000 and 2000"),
        ({"tokenizer": "other"}, "expected runs with one tokenizer, found bpe and other"),
        ({"text": "u"}, "expected runs with one text of the loss, found held-out text t and held-out text u"),
    ],
)
def test_runs_of_another_model_or_text_are_refused(
    config: ExperimentConfig, changes: dict[str, Any], message: str
) -> None:
    log_run(config, "small", 4.0)
    log_run(config, "small", 3.0, **changes)
    with pytest.raises(CorpusError, match=message):
        small(config)


@pytest.mark.slow
def test_losses_on_an_external_set_name_its_text(config: ExperimentConfig) -> None:
    for text in ("t", "u"):
        with tracked_run(config, "small") as run:
            run.log_params(parameters())
            run.set_tags({"heldout_fingerprint": "one", "dclm_fingerprint": text})
            run.log_metrics({"evaluate/dclm/official_loss": 3.0, "heldout_nats_per_token": 3.0})
    assert small(config).text == "held-out text one"
    with pytest.raises(CorpusError, match="found external text t and external text u"):
        small(config, "evaluate/dclm/official_loss")


@pytest.mark.slow
def test_without_a_store_or_runs_the_error_says_what_to_do(config: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no experiment 'miniplm'"):
        small(config)
    log_run(config, "other", 1.0)
    with pytest.raises(CorpusError, match="trainer train --student small"):
        small(config)
    with own_tracking_store(), pytest.raises(CorpusError, match="no experiment"):
        small(dataclasses.replace(config, root=str(tmp_path / "empty")))
    assert not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_the_teachers_forward_passes_count_in_the_compute(config: ExperimentConfig) -> None:
    teacher = {"n_parameters": 4500}
    with tracked_run(config, "small") as run:
        run.log_params({**parameters(), "kd_teacher": teacher})
        run.log_metrics({"heldout_nats_per_token": 3.0})
    runs = small(config)
    assert runs.curves[0].compute_flop == (100 * (6.0 * 1000 + 2.0 * 4500) * 8 * 16,)
    assert runs.flop(12_800) == runs.curves[0].compute_flop[0]
    assert runs.tokens(runs.flop(12_800)) == 12_800


@pytest.mark.slow
def test_the_trainers_own_runs_are_read(config: ExperimentConfig, tmp_path: Path) -> None:
    """The names of parameters and metrics are the names that `train` and `evaluate` log."""
    bare = json.loads((tmp_path / "experiment.yaml").read_text())
    del bare["reference"], bare["models"]["reference"]
    (tmp_path / "experiment.yaml").write_text(json.dumps(bare))
    conf = ["-c", str(tmp_path / "experiment.yaml")]
    for steps in (4, 6):
        assert main(["train", *conf, f"train.steps={steps}"]) == 0
        assert main(["evaluate", *conf, f"train.steps={steps}"]) == 0
    runs = small(config)
    tokens_a_step = TRAIN["batch_sequences"] * LENGTH
    assert [curve.compute_flop for curve in runs.curves] == [
        (6.0 * runs.n_parameters * steps * tokens_a_step,) for steps in (4, 6)
    ]
    assert runs.text != "held-out text without a fingerprint"
    assert [len(curve.loss) for curve in small(config, "train_loss").curves] == [2, 4]  # 2 warm-up steps


# --- the command ---


def students(config: ExperimentConfig, **changes: dict[str, Any]) -> ExperimentConfig:
    """The config with the students `difference` and `random`, each with its corpus; and with their runs in MLflow."""
    path = config.local_folder().parent / "experiment.yaml"
    raw = json.loads(path.read_text())
    raw["refine"]["corpora"]["random"] = {"select": {"rule": "random", "ratio": 0.5}}
    raw["students"] = {
        "difference": raw["students"]["small"],
        "random": {**raw["students"]["small"], "corpus": "random"},
    }
    path.write_text(json.dumps(raw))
    config = load_config(path)
    for name, of in (("difference", law(3e3, 0.45, 1.9)), ("random", law(3e3, 0.45, 2.0))):
        for steps in (20, 40, 80, 160, 320, 640):
            loss = of.loss(steps * FLOP_A_STEP)
            log_run(config, name, loss, **{"corpus": name, **changes.get(name, {}), "train": {"steps": steps}})
    return config


@pytest.mark.slow
def test_students_are_compared_with_the_random_corpus_of_their_size(config: ExperimentConfig) -> None:
    config = students(config)
    options = ScalingOptions(tokens=(10**6,), replicates=20)
    result = scaling(config, options)
    assert set(result["laws"]) == {"difference", "random"}
    assert set(result["compute_saved"]) == {"difference"}
    assert result["laws"]["random"]["floor"] == pytest.approx(2.0, rel=1e-3)
    assert result["laws"]["random"]["extrapolated"][0]["compute_flop"] == 6e9
    largest, at_tokens = result["compute_saved"]["difference"]["at"]
    assert largest["baseline_flop"] == pytest.approx(640 * FLOP_A_STEP, rel=1e-3)
    assert largest["baseline_tokens"] == pytest.approx(640 * 128, rel=1e-3)
    assert 1 < largest["times_less_compute"] < at_tokens["times_less_compute"]
    swapped = scaling(config, dataclasses.replace(options, students=("random",), baseline="difference"))
    assert set(swapped["compute_saved"]) == {"random"}
    assert swapped["compute_saved"]["random"]["at"][0]["times_less_compute"] < 1
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        scaling(config, dataclasses.replace(options, baseline="randon"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "u"}, "the losses are of different texts: held-out text u and held-out text t"),
        ({"tokenizer": "other"}, "use --metric heldout_bits_per_byte"),
    ],
)
def test_losses_that_mean_different_things_are_not_compared(
    config: ExperimentConfig, changes: dict[str, Any], reason: str
) -> None:
    config = students(config, difference=changes)
    options = ScalingOptions(tokens=(10**6,), replicates=20)
    saved = scaling(config, options)["compute_saved"]["difference"]
    assert reason in saved["not_comparable"]
    assert saved["at"] == []
    bits = scaling(config, dataclasses.replace(options, metric="heldout_bits_per_byte"))["compute_saved"]["difference"]
    assert (bits["not_comparable"] is None) == ("tokenizer" in changes)


@pytest.mark.slow
def test_an_undetermined_law_is_neither_extrapolated_nor_compared(
    config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = students(config)
    for steps in (20, 40, 80, 160, 320, 640):
        log_run(config, "flat", 3.0 + steps % 7 / 50, train={"steps": steps})
    path = config.local_folder().parent / "experiment.yaml"
    raw = json.loads(path.read_text())
    raw["students"]["flat"] = raw["students"]["difference"]
    path.write_text(json.dumps(raw))
    result = scaling(load_config(path), ScalingOptions(replicates=20, plot=path.parent / "laws.png"))
    assert "the loss falls by" in result["laws"]["flat"]["undetermined"][0]
    assert result["laws"]["flat"]["extrapolated"] == []
    assert result["compute_saved"]["flat"]["not_comparable"] == "the runs of flat do not determine its law"
    assert result["compute_saved"]["difference"]["at"]
    assert "flat: the runs do not determine the law" in caplog.text
    assert (path.parent / "laws.png").exists()


def blocks_of(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "scaling-laws.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def close(value: Any, expected: Any) -> bool:
    """Equal, with numbers within 2 %: the last digits depend on the version of scipy."""
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(close(value[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(close, value, expected))
    if isinstance(expected, float):
        return bool(value == pytest.approx(expected, rel=0.02))
    return bool(value == expected)


@pytest.mark.slow
def test_the_documented_example_prints_what_is_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(CONF)
    (program,), (printed,) = blocks_of("python"), blocks_of("json")
    exec(compile(program, "docs/scaling-laws.md", "exec"), {})
    (command,) = [block for block in blocks_of("bash") if "scaling-example" in block]
    capsys.readouterr()
    assert main(command.removeprefix("python -m trainer ").split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert close(result, json.loads(printed)), result
    assert (tmp_path / "build" / "scaling-example" / "laws.png").exists()


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ["scaling", "-c", str(CONF / "demo.yaml"), f"root={tmp_path}/root"]
    assert main([*demo, "--dry-run", "--tokens", "300B,1.5T"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == [300 * 10**9, 1500 * 10**9]
    assert plan["students"] == ["miniplm", "conventional"]
    assert main([*demo, "--student", "minplm"]) == 2
    assert "did you mean 'miniplm'" in capsys.readouterr().err
    assert main(demo) == 1
    assert "has no experiment 'miniplm-demo': train and evaluate the students first" in capsys.readouterr().err
    for wrong in (["--tokens", "1T,x"], ["--tokens", "0"], ["--replicates", "19"]):
        with pytest.raises(SystemExit) as ended:
            main([*demo, *wrong])
        assert ended.value.code == 2
    assert not (tmp_path / "root").exists()


# --- limited data ---


@pytest.mark.slow
def test_students_on_limited_data_see_equally_many_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    conf = ["-c", str(CONF / "data_limited.yaml"), f"root={tmp_path}/root"]
    config = load_config(CONF / "data_limited.yaml")
    shares = {}
    for name, student in config.students.items():
        select = config.refine.corpora[student.corpus].select
        assert select is not None
        assert select.by == "tokens"
        shares[name] = select.ratio
    assert shares == {"conventional": 1.0, "difference_75": 0.75, "difference_50": 0.5, "difference_25": 0.25}
    assert len({(str(student.train), str(student.architecture)) for student in config.students.values()}) == 1
    assert config.score.sample == 0.5
    # The plan comes before the refusal: its corpus is not here.
    assert cli.main(["run", *conf, "--dry-run"]) == 2
    assert "refined/alpha_25" in capsys.readouterr().out
    assert main(["train", *conf, "--dry-run", "train.steps=200000"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert {plan["tokens"] for plan in plans.values()} == {200_000 * 512 * 1024}
    assert main(["scaling", *conf, "--dry-run"]) == 0
