"""The proxy's arithmetic: ranks, agreement, warnings, operations; what a corpus that it ranks is resolved to."""

import dataclasses
import random
from pathlib import Path

import pytest

from jobs import proxy as job
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.rules import PREDICTION, in_sample, uniform
from miniplm_udf.config.sections import ModelConfig, ProxyConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.proxy import costs, quality
from miniplm_udf.proxy.report import PoolRows, ProxyReport
from miniplm_udf.refinement import follow, refine
from miniplm_udf.scores import query as scores
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streams import facts
from tests.support.selection_oracles import exact
from tests.support.stage_summaries import simplest

CONF = Path(__file__).resolve().parents[2] / "conf"


def ids(n: int) -> list[str]:
    return [f"{number:04x}" for number in range(n)]


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5, 5.0])
def test_spearman_is_that_of_the_mean_ranks(slope: float) -> None:
    rng = random.Random(slope)
    # Rounded: with ties.
    rows = [(round(x, 1), round(slope * x + rng.gauss(0, 1), 1)) for x in (rng.gauss(0, 1) for _ in range(300))]
    found = quality.judge(ids(300), [a for a, _ in rows], [b for _, b in rows])
    assert found.spearman == pytest.approx(exact(rows), abs=1e-12)
    assert found.n_rows == 300
    assert found.spearman_error == pytest.approx(1 / 299**0.5)


def test_agreement_counts_the_true_top_in_the_predicted_top() -> None:
    scores_of = [float(number) for number in range(100)]
    same = quality.judge(ids(100), scores_of, [2 * score - 7 for score in scores_of])
    assert same.top == {str(ratio): quality.TopShare(kept=1.0, chance=ratio) for ratio in (0.1, 0.25, 0.5)}
    reversed_ = quality.judge(ids(100), scores_of, [-score for score in scores_of])
    assert [top.kept for top in reversed_.top.values()] == [0.0, 0.0, 0.0]
    # The highest ten are 90 to 99; of them the prediction has 95 to 99 among its own.
    half = quality.judge(ids(100), scores_of, [score if score >= 95 else 94 - score for score in scores_of])
    assert half.top["0.1"].kept == 0.5
    # All predictions tie, so the least ids are the predicted top, which truly are the lowest; and there is no order.
    flat = quality.judge(ids(100), scores_of, [1.0] * 100)
    assert (flat.spearman, flat.top["0.5"].kept) == (None, 0.0)
    assert quality.judge(ids(3), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).top.keys() == {"0.5"}


@pytest.mark.parametrize(
    ("rho", "error", "is_worthless"),
    [
        (0.9, 0.01, False),
        (0.2, 0.01, False),
        (0.19, 0.01, True),
        (0.3, 0.2, True),
        (None, 0.01, True),
        (-0.9, 0.01, True),
    ],
)
def test_a_proxy_without_an_order_is_called_worthless(rho: float | None, error: float, is_worthless: bool) -> None:
    found = quality.warnings(quality.Quality(n_rows=50, spearman=rho, spearman_error=error, top={}))
    assert ["worthless" in note for note in found] == ([True] if is_worthless else [])


def test_operations_of_both_ways() -> None:
    solver = {"n_grams": 100.0, "iterations": 9}
    pool = {"n_rows": 1000, "n_bytes": 40_000, "estimated_tokens": 10_000}
    found = costs.flops([(10**6, 500), (10**4, 600)], 2_000, pool, solver, n_fitted=40)
    assert found.models_on_scored == 2 * (10**6 * 500 + 10**4 * 600)
    assert found.models_on_pool == 20 * found.models_on_scored
    assert found.models_per_token == 2 * (10**6 + 10**4)
    assert found.proxy_predict == 5 * 100 * 1000
    assert found.proxy_per_token == 50
    assert found.proxy_fit == 4 * 100 * 40 * 10
    assert found.with_proxy == found.models_on_scored + found.proxy_predict + found.proxy_fit
    assert found.share == found.with_proxy / found.models_on_pool


def config(corpus: CorpusConfig) -> ExperimentConfig:
    models = {alias: ModelConfig(path="/nowhere") for alias in ("teacher", "reference")}
    return ExperimentConfig(
        root="/tmp/unused", models=models, proxy=ProxyConfig(), refine=RefineConfig(corpora={"a": corpus})
    )


def test_a_corpus_of_the_proxy_is_ranked_by_the_prediction() -> None:
    resolved = refine.resolve_corpus(config(CorpusConfig(candidates="proxy_scores")), "a")
    assert (resolved.score, resolved.where, resolved.rule) == (PREDICTION, "estimated_tokens >= 32", None)
    assert resolved.select == SelectConfig(ratio=0.5)
    # A resolved corpus, out of a version's provenance, is itself again.
    assert refine.resolve_corpus(config(resolved), "a") == resolved
    seeded = CorpusConfig(candidates="proxy_scores", select=SelectConfig(rule="random", ratio=0.5, seed=2))
    assert refine.resolve_corpus(config(seeded), "a").score == uniform(2)
    own = CorpusConfig(candidates="proxy_scores", score="coalesce(reference_nll_mean, prediction)")
    assert refine.resolve_corpus(config(own), "a").score == own.score
    plain = refine.plain_config(config(own), own)
    assert schemas.refined_as("a", plain).column_names == ["instance_id", "source", "n_tokens", "n_bytes", "score"]
    with pytest.raises(ConfigError, match="only score_matrix can be followed"):
        follow._followable("a", resolved)


def test_the_rule_that_the_proxy_learns_needs_its_models() -> None:
    overrides = ["proxy={}", "score.models=[teacher]", "refine={corpora: {}}", "students={}"]
    with pytest.raises(ConfigError, match=r"proxy\.score: miniplm: expected one of \['teacher'\], found 'reference'"):
        load_config(CONF / "demo.yaml", overrides)
    assert load_config(CONF / "demo.yaml", ["proxy={}"]).proxy == ProxyConfig()
    assert load_config(CONF / "demo.yaml").proxy is None


def test_draws_for_different_purposes_are_different_and_a_sample_has_its_own_query(tmp_path: Path) -> None:
    assert in_sample(1.0) == "true"
    draws = [uniform(0), uniform(0, "proxy.rows"), uniform(0, "proxy.heldout"), in_sample(0.5).split(" < ")[0]]
    assert len(set(draws)) == 4
    model = ModelDescription(
        model_id="m", tokenizer_hash="t", dtype="float32", context_tokens=8, window_overlap_tokens=0,
        context_prefix="none", document_separator="x", document_separator_id=0, prefix_token_id=None, vocab_size=8,
        n_parameters=1, weights_hash="w", path="p",
    )  # fmt: skip
    for share in (1.0, 0.05, 1e-5):
        name = scores.checkpoint_name((model,), share)
        assert facts.read(f"{tmp_path}/{name}").sample == share
    assert len({scores.checkpoint_name((model,), share) for share in (1.0, 0.05, 1e-5)}) == 3


def test_the_report_is_one_line_to_read() -> None:
    judged = quality.judge(ids(40), list(map(float, range(40))), list(map(float, range(40))))
    pool = {"n_rows": 1000, "n_bytes": 40_000, "estimated_tokens": 10_000}
    counted = costs.flops([(10**6, 500)], 2_000, pool, {"n_grams": 100.0, "iterations": 9}, 40)
    rows = PoolRows(pool=1000, scored=50)
    line = job.text(dataclasses.replace(simplest(ProxyReport), heldout=judged, flops=counted, rows=rows))
    assert "on 40 held-out instances Spearman 1.000; it finds 1.000 of the true top 0.1 (by chance 0.1)" in line
    assert "1,000 instances predicted, 50 of them scored by models" in line
    assert "models 2e+06, proxy 50; in all, 1e+09 instead of 2e+10 (5.0%)" in line
