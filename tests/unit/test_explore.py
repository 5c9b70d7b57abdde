"""`miniplm explore`: its pages against the rows in plain Python, over HTTP, and once in Chromium."""

import html
import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs import explore as explore_job
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.errors import CorpusError
from miniplm_udf.explorer.candidates import ROWS_PER_PAGE, ExploredCorpus
from miniplm_udf.explorer.server import make_server
from miniplm_udf.refinement.refine import resolve_corpus
from tests.support import report_root
from tests.support.browser import PHONE, opened
from tests.support.browser import chromium as chromium
from tests.support.report_root import ALIASES, HOSTILE, NOW, SOURCES, score


class Site:
    """A served corpus: its candidates, best first, and how many of them were kept."""

    def __init__(
        self, config: ExperimentConfig, ranked: list[dict[str, Any]], texts: dict[str, str], port: int
    ) -> None:
        self.config, self.ranked, self.texts, self.port = config, ranked, texts, port
        self.n_kept = len(ranked) // 2

    def get(self, path: str = "/", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def sides(self, **query: Any) -> dict[str, tuple[int, list[str]]]:
        """The number of rows that match and the ids that are shown, by side."""
        page = self.get("/?" + urllib.parse.urlencode(query)).read().decode()
        shown = {}
        for name, section in re.findall(r'<section class="(\w+)">(.*?)</section>', page, re.S):
            number = re.search(r"<h2>\w+: ([\d,]+)</h2>", section)
            assert number
            shown[name] = int(number[1].replace(",", "")), re.findall(r"<code>([0-9a-f]{32})</code>", section)
        return shown


def write_corpus(config: ExperimentConfig, ranked: list[dict[str, Any]], name: str, where: str = "") -> None:
    """The better half as version 0 of a corpus, with its row in `corpora`; without Spark."""
    rows = [{**row, "n_tokens": row["teacher_n_tokens"], "score": score(row)} for row in ranked[: len(ranked) // 2]]
    table = schemas.refined(name, ALIASES)
    declared = [{column: row[column] for column in table.column_names} for row in rows]
    write_deltalake(config.layout.table(table.name), pa.Table.from_pylist(declared, schema=table.arrow_schema()))
    resolved = to_dict(resolve_corpus(config, name)) | ({"where": where} if where else {})
    record = {
        "name": name, "version": 0, "config": json.dumps({**resolved, "tokens_of": "teacher", "models": ALIASES}),
        "inputs": json.dumps({"matrix_version": 0, "model_revisions": {}}), "threshold": rows[-1]["score"],
        "n_candidates": len(ranked), "candidate_tokens": 1, "n_instances": len(rows), "n_tokens": 1,
        "fingerprint": "f", "code_revision": "0", "created_at": NOW,
    }  # fmt: skip
    report_root.write(config, schemas.CORPORA, [record])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("explore")
    config = report_root.report_config(folder / "a root, zwölf")
    instances = report_root.instance_rows()
    matrix = report_root.matrix_rows([row for row in instances if row["split"] == "pool"])
    report_root.write(config, schemas.INSTANCES, instances)
    report_root.write(config, schemas.score_matrix(ALIASES), matrix)
    candidates = [row for row in matrix if row["teacher_n_tokens"] >= 32]
    ranked = sorted(candidates, key=lambda row: (-score(row), row["instance_id"]))
    write_corpus(config, ranked, "difference")
    # Spark's function, which DuckDB has not.
    write_corpus(config, ranked, "random", where="xxhash64(instance_id) % 2 = 0 and soundex(source) = 'x'")
    opened_corpus = ExploredCorpus(config, "difference", str(folder / "candidates.duckdb"))
    server = make_server(opened_corpus)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    texts = {row["instance_id"]: row["text"] for row in instances}
    yield Site(config, ranked, texts, server.server_address[1])
    server.shutdown()
    server.server_close()
    opened_corpus.close()


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["instance_id"] for row in rows]


def test_both_sides_of_the_cut_nearest_first(site: Site) -> None:
    kept, dropped = site.ranked[: site.n_kept], site.ranked[site.n_kept :]
    shown = site.sides()
    assert shown["kept"] == (len(kept), ids(kept[::-1])[:ROWS_PER_PAGE])
    assert shown["dropped"] == (len(dropped), ids(dropped)[:ROWS_PER_PAGE])
    page = site.get().read().decode()
    distance = score(dropped[0]) - score(kept[-1])
    assert f"<b>{score(dropped[0]):.4f}</b> ({distance:+.4f} from the cut)" in page


def test_pages_show_every_row_once(site: Site) -> None:
    n_pages = -(-(len(site.ranked) - site.n_kept) // ROWS_PER_PAGE)
    seen = [site.sides(order="highest", page=page)["dropped"][1] for page in range(n_pages)]
    assert [each for page in seen for each in page] == ids(site.ranked[site.n_kept :])
    first, last = (site.get(f"/?order=highest&page={page}").read().decode() for page in (0, n_pages - 1))
    assert ('rel="prev"' in first, 'rel="next"' in first) == (False, True)
    assert ('rel="prev"' in last, 'rel="next"' in last) == (True, False)


@pytest.mark.parametrize("source", SOURCES)
def test_filters_by_source_score_and_text(site: Site, source: str) -> None:
    low, high, text = 0.2, 1.2, "SCRIPT"
    shown = site.sides(source=source, low=low, high=high, text=text, order="lowest")
    for side, rows in (("kept", site.ranked[: site.n_kept]), ("dropped", site.ranked[site.n_kept :])):
        expected = [
            row for row in rows
            if row["source"] == source and low <= score(row) <= high
            and text.lower() in site.texts[row["instance_id"]].lower()
        ]  # fmt: skip
        assert shown[side] == (len(expected), ids(expected[::-1])[:ROWS_PER_PAGE])


def test_texts_and_queries_are_escaped(site: Site) -> None:
    page = site.get("/?" + urllib.parse.urlencode({"text": "<script>"})).read().decode()
    assert html.escape(HOSTILE.split("&")[0].strip(), quote=False).split("'")[0] in page
    assert "<script" not in page
    injected = "'; drop table candidates; --"
    assert site.sides(source=injected, text=injected)["kept"] == (0, [])
    assert site.sides()["kept"][0] == site.n_kept


@pytest.mark.parametrize("query", ["low=x&high=nan&page=-1&order=zzz", "page=" + "9" * 40, "low=&high=&source=&text="])
def test_values_that_cannot_be_read_count_as_absent(site: Site, query: str) -> None:
    answer = site.get("/?" + query)
    assert answer.status == 200
    assert f"<h2>Kept: {site.n_kept:,}</h2>" in answer.read().decode()


def test_only_this_machine_and_only_this_page(site: Site) -> None:
    assert site.get(Host=f"evil.example:{site.port}").status == 403
    assert site.get("/etc/passwd").status == 404
    assert "default-src 'none'" in str(site.get().getheader("Content-Security-Policy"))


def test_a_rule_that_needs_spark_is_said(site: Site, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="use `miniplm inspect random`"):
        ExploredCorpus(site.config, "random", str(tmp_path / "x.duckdb"))


def test_a_port_that_is_taken_is_said(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert explore_job.main(["difference", "--root", site.config.root, "--port", str(site.port)]) == 2
    assert f"--port {site.port}" in capsys.readouterr().err


@pytest.mark.long
def test_a_reader_filters_in_a_browser(site: Site, chromium: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{site.port}/"
    for scheme in ("light", "dark"):
        with opened(chromium, url, PHONE, scheme) as shown:
            assert shown.hidden_width() <= 0
            shown.page.fill("input[name=text]", "<script>")
            shown.page.select_option("select[name=order]", "highest")
            shown.page.click("button")
            shown.page.wait_for_url("**order=highest**")
            assert shown.page.input_value("input[name=text]") == "<script>"
            matching = [row for row in site.ranked[: site.n_kept] if "<script>" in site.texts[row["instance_id"]]]
            assert shown.page.inner_text(".kept code >> nth=0") == matching[0]["instance_id"]
            assert shown.errors == []
            assert all(address.startswith(url) for address in shown.requests)
            shown.page.screenshot(path=tmp_path / f"explore-{scheme}.png")
