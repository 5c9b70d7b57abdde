"""The report on a hand-made experiment: its numbers against counts in plain Python, its safety, its missing parts."""

import collections
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from jobs import report as report_job
from miniplm_udf import schemas, storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.report import figures, queries, students
from miniplm_udf.report.histogram import BUCKETS, Histogram, histogram
from miniplm_udf.report.render import build_report
from miniplm_udf.store import delta_log
from tests.support import model_records, report_root
from tests.support.report_root import HOSTILE, SOURCES, Built, score

SUMMARY = {"seconds": {"ingest": 12.3, "score": 75.2}, "tokens_per_second": {"teacher": 812.4, "reference": None}}


class Page(HTMLParser):
    """Reads a page back: tables as rows of texts, the attributes that load or link, the texts shown in `pre`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.pres: list[str] = []
        self._inside: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._inside = self.rows[-1]
            self._inside.append("")
        elif tag == "pre":
            self._inside = self.pres
            self._inside.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "pre"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self._inside[-1] += data

    def row(self, *start: str) -> list[str]:
        """The one row that starts with these cells."""
        found = [row for row in self.rows if row[: len(start)] == list(start)]
        assert len(found) == 1, (start, found)
        return found[0]


@pytest.fixture(scope="module")
def built(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield report_root.build_root(spark, tmp_path_factory.getbasetemp() / "an experiment, zwölf")


@pytest.fixture(scope="module")
def html(spark: Any, built: Built) -> str:
    path = build_report(spark, built.config, SUMMARY)
    assert path == built.config.report_file("report.html")
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_headline_numbers_equal_counts_of_the_rows(page: Page) -> None:
    assert page.row("pool") == ["pool", "320"]
    assert page.row("heldout") == ["heldout", "40"]
    assert page.row("ingest", "invalid_json")[2] == "4"
    assert page.row("ingest", "invalid_utf8")[2] == "2"
    assert page.row("score, teacher", "no_tokens")[2] == "3"
    assert page.row("all", "")[2] == "9"
    assert page.row("teacher", "1,234,567")[2:6] == ["float32", "512", "320", "812"]
    assert page.row("reference", "1,234,567")[5] == "–"
    assert ["12.3 s", "1 min 15 s", "1 min 28 s"] in page.rows


def test_sources_of_each_corpus_equal_counts_of_the_rows(page: Page, built: Built) -> None:
    for name in ("difference", "random"):
        kept_ids = {row["instance_id"] for row in built.kept[name]}
        for source in SOURCES:
            rows = [row for row in built.candidates if row["source"] == source]
            kept = [row for row in rows if row["instance_id"] in kept_ids]
            tokens = [sum(row["teacher_n_tokens"] for row in chosen) for chosen in (rows, kept)]
            expected = [
                source, f"{len(rows):,}", f"{len(kept):,}", f"{len(kept) / len(rows):.1%}".replace("%", " %"),
                f"{tokens[0]:,}", f"{tokens[1]:,}",
                f"{sum(map(score, rows)) / len(rows):.3f}",
                f"{sum(score(row) < 0 for row in rows) / len(rows):.1%}".replace("%", " %"),
            ]  # fmt: skip
            assert expected in page.rows, (name, expected)


def test_examples_are_the_rows_at_the_ends_and_around_the_cut(spark: Any, built: Built) -> None:
    corpus = queries.corpora(spark, built.config)[0]
    ranked = sorted(built.candidates, key=lambda row: (-score(row), row["instance_id"]))
    ids, n_kept = [row["instance_id"] for row in ranked], len(built.kept["difference"])
    shown = {label: [example.instance_id for example in examples] for label, examples in corpus.examples.items()}
    assert shown["Highest"] == ids[:3]
    assert shown["Lowest"] == ids[::-1][:3]
    assert shown["Just above the cut"] == ids[n_kept - 1 : n_kept - 4 : -1]
    assert shown["Just below the cut"] == ids[n_kept : n_kept + 3]
    middle = [ids.index(found) for found in shown["Middle"]]
    assert all(abs(place - len(ids) / 2) <= 4 for place in middle), middle
    texts = {row["instance_id"]: row["text"] for row in built.instances}
    for example in (example for examples in corpus.examples.values() for example in examples):
        assert example.text == texts[example.instance_id][:600]
        assert example.n_characters == len(texts[example.instance_id])
        assert example.is_cut == (example.n_characters > 600)
    assert corpus.score.median() == pytest.approx(score(ranked[len(ranked) // 2]), abs=0.05)


def test_rows_scored_after_the_refinement_are_no_candidates(spark: Any, built: Built) -> None:
    corpus = queries.corpora(spark, built.config)[0]
    assert corpus.notes == []
    assert corpus.total.n_candidates == len(built.candidates) == corpus.record["n_candidates"]
    counted = corpus.score
    assert sum(counted.kept) == len(built.kept["difference"]) == corpus.total.n_kept
    assert sum(counted.kept) + sum(counted.dropped) + counted.n_below + counted.n_above == len(built.candidates)
    assert corpus.cut == min(score(row) for row in built.kept["difference"])


def test_a_lost_matrix_version_is_said(spark: Any, built: Built) -> None:
    notes: list[str] = []
    found = queries._table_at(spark, built.config, "score_matrix", 999, notes)
    assert found.count() == 320
    assert "Version 999" in notes[0]


def test_corpus_text_is_escaped_and_cut(html: str, page: Page) -> None:
    assert page.tags["script"] == 0
    assert page.tags["b"] == html.count("<b>") > 0
    assert "&lt;script&gt;" in html
    shown = [text for text in page.pres if text.startswith(HOSTILE)]
    assert shown, "no hostile text is among the examples: the test tests nothing"
    assert all(len(text) <= 600 for text in page.pres if text.startswith(HOSTILE))
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; $x_1^$" in html
    assert "chat-tuned &lt;model&gt;" in html


def test_page_is_self_contained(html: str, page: Page) -> None:
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "action"), (name, value)
        assert not (name.endswith("href") and not (value or "").startswith("#")), (name, value)
        assert not re.search("https?:", value or ""), (name, value)
    assert page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]{0,2})", html)) <= {"#p", "#m", "#h"}
    without_texts = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    assert "http://" not in without_texts
    assert "https://" not in without_texts


def test_students_stand_side_by_side_and_noise_is_said(html: str, page: Page) -> None:
    assert page.row("miniplm", "difference")[-1] == "2.1034"
    assert page.row("conventional", "random")[-1] == "2.1271"
    assert page.row("miniplm", "conventional")[2:] == ["−0.0237", "−1.11 %", "lower (better): noise at this size"]
    assert page.row("docstrings", "2.1034") == ["docstrings", "2.1034", "2.1271"]
    assert page.row("dclm", "miniplm")[2:] == ["9,876", "3.5758", "3.7861", "3.9965", "2.1034"]
    assert page.row("miniplm", "52.6 %") == ["miniplm", "52.6 %", "42.1 %", "47.3 %"]
    assert '<th class="num">PIQA</th><th class="num">my_task</th><th class="num">average</th>' in html
    assert "At this size a win or a loss is noise" in html
    assert 'aria-label="Training loss of miniplm, conventional"' in html


def test_mlflow_holds_one_comparison_run_with_the_newest_report(spark: Any, built: Built, html: str) -> None:
    from mlflow import MlflowClient

    result = report_job.run(spark, built.config)
    client = MlflowClient(tracking_uri=built.config.mlflow_uri())
    experiment = client.get_experiment_by_name("miniplm-demo")
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 'comparison'")
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    logged = Path(unquote(storage.local_path(runs[0].info.artifact_uri)))  # MLflow percent-encodes it
    assert logged.is_relative_to(built.config.local_folder() / "mlartifacts")
    assert sorted(path.name for path in logged.iterdir()) == ["report.html", "summary.json"]
    assert (logged / "report.html").read_text() == Path(result.report).read_text()


def test_curve_keeps_the_later_value_of_a_step_logged_twice(built: Built) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=built.config.mlflow_uri())
    experiment = client.get_experiment_by_name("miniplm-demo")
    run_id = client.create_run(experiment.experiment_id, run_name="resumed").info.run_id
    for timestamp, step, value in ((1, 5, 9.0), (2, 10, 8.0), (3, 10, 7.0), (4, 15, 6.0)):
        client.log_metric(run_id, "train_loss", value, step=step, timestamp=timestamp)
    assert students._curve(built.config, run_id) == [(5, 9.0), (10, 7.0), (15, 6.0)]
    assert students._curve(built.config, "0" * 32) == []


def test_report_of_instances_alone_and_of_nothing(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # A store that cannot be: the report is written, MLflow is left out with a warning.
    config = report_root.report_config(tmp_path / "root", "mlflow.tracking_uri=sqlite:////dev/null/mlflow.db")
    with pytest.raises(CorpusError, match="instances"):
        build_report(spark, config, {})
    report_root.write(config, schemas.INSTANCES, report_root.instance_rows()[:3])
    html = Path(build_report(spark, config, {})).read_text()
    for said in (
        "No row was rejected",
        "No model has scored yet",
        "No corpus was refined yet",
        "No student was trained",
    ):
        assert said in html


def _frame(spark: Any, values: list[float]) -> Any:
    return spark.createDataFrame([(v, i % 3 == 0) for i, v in enumerate(values)], "value double, kept boolean")


@pytest.mark.parametrize("values", [[], [1.5], [2.0] * 7, [-1.0, 1.0], [float(v) for v in range(1000)]])
def test_histogram_counts_every_row(spark: Any, values: list[float]) -> None:
    found = histogram(_frame(spark, values), "value")
    assert len(found.kept) == len(found.dropped) == BUCKETS
    assert sum(found.kept) == len(values[::3])
    assert sum(found.dropped) == len(values) - len(values[::3])
    assert (found.n_below, found.n_above) == (0, 0)
    assert sum(found.coarser(32).kept) == sum(found.kept)
    width = (found.high - found.low) / BUCKETS
    for i, value in enumerate(values):
        bucket = min(int((value - found.low) / width), BUCKETS - 1)
        assert (found.kept if i % 3 == 0 else found.dropped)[bucket] >= 1


def test_histogram_is_not_stretched_by_a_few_far_rows(spark: Any) -> None:
    values = [i / 1000 for i in range(1000)] + [1e9, -1e9]
    found = histogram(_frame(spark, values), "value")
    assert (found.n_below, found.n_above) == (1, 1)
    assert -0.5 < found.low <= 0.005
    assert 0.99 <= found.high < 1.5
    assert sum(found.kept) + sum(found.dropped) == 1000
    assert found.median() == pytest.approx(0.5, abs=0.01)


def test_many_sources_are_summed_up() -> None:
    def share(i: int) -> queries.SourceShare:
        return queries.SourceShare(source=f"s{i}", n_candidates=10, n_kept=i % 3, candidate_tokens=100, kept_tokens=10,
                                   n_negative=1, score_mean=float(i))  # fmt: skip

    shown = queries._shown([share(i) for i in range(100)])
    assert len(shown) == queries.SHOWN_SOURCES + 1
    assert shown[-1].source == "(70 more sources)"
    assert shown[-1].n_candidates == 700
    assert shown[-1].n_kept == sum(i % 3 for i in range(30, 100))
    assert shown[-1].score_mean == pytest.approx(sum(range(30, 100)) / 70)


def test_noise_ends_where_the_rule_says() -> None:
    def student(name: str, heldout: int, is_random: bool = False, tokens: int = 10**9) -> students.StudentFacts:
        sets = {"heldout": model_records.set_evaluation(model_records.text_loss(1.0, heldout))}
        return students.StudentFacts(
            name=name, corpus="c", tokenizer="t", is_random=is_random, is_baseline=is_random, setting="",
            training=model_records.training_record(tokens=tokens), evaluation=model_records.evaluation(sets), curve=[],
        )  # fmt: skip

    large, baseline = student("a", 10**6), student("b", 10**6, is_random=True)
    assert [d.is_noise for d in students.differences([large, baseline])] == [False]
    assert [d.is_noise for d in students.differences([student("c", 10**6 - 1), baseline])] == [True]
    assert [d.is_noise for d in students.differences([large, student("d", 10**6 - 1, is_random=True)])] == [True]
    short = student("e", 10**6, tokens=10**9 - 1), student("f", 10**6, is_random=True, tokens=10**9 - 1)
    assert [d.is_noise for d in students.differences(short)] == [True]
    assert students.differences([large]) == []


def test_figures_take_hostile_names() -> None:
    counted = Histogram(low=0.0, high=1.0, kept=[1] * BUCKETS, dropped=[0] * BUCKETS)
    svg = str(figures.score_histogram(counted, '"><script>$\\frac{', 0.5))
    assert "<script>" not in svg
    assert "xmlns" not in svg
    assert "cut at 0.5" in svg
    assert svg == str(figures.score_histogram(counted, '"><script>$\\frac{', 0.5)), "not deterministic"


def test_table_facts_count_rows(spark: Any, built: Built, page: Page) -> None:
    assert page.row("instances")[2] == "360"
    assert page.row("scores")[2] == "640"
    version = delta_log.newest_version(built.config.layout.table("refined/difference"))
    assert page.row("refined/difference")[1:3] == [str(version), f"{len(built.kept['difference']):,}"]
