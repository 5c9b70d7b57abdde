"""The report as a reader sees it, in Chromium: on a phone, on a desk, on paper, light and dark."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import report_facts
from tests.support.browser import DESK, PHONE, opened
from tests.support.browser import chromium as chromium

# Pixels. Smaller letters cannot be read on a phone.
SMALLEST_LETTERS = 10.5

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report_facts.page(), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_page_fits_its_window_and_asks_for_nothing(chromium: Any, url: str, size: dict[str, int]) -> None:
    with opened(chromium, url, size) as shown:
        # The folded parts are a part of the page, too.
        shown.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert shown.hidden_width() <= 0
        assert shown.requests == [url]
        assert shown.errors == []
        scrolled = shown.page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth).length"
        )
        assert scrolled > 0 or size is DESK
        outside = "[...document.querySelectorAll('table')].filter(each => !each.closest('.scroll')).length"
        assert shown.page.evaluate(outside) == 0


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_letters_in_figures_can_be_read(chromium: Any, url: str, size: dict[str, int]) -> None:
    heights = (
        "[...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility()).map(svg => "
        "[svg.getScreenCTM().a, ...[...svg.querySelectorAll('text')]"
        ".map(text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a)])"
    )
    with opened(chromium, url, size) as shown:
        figures = shown.page.evaluate(heights)
        assert len(figures) == 5
        for _, *letters in figures:
            assert len(letters) > 5
            assert min(letters) >= SMALLEST_LETTERS
        captions = "document.querySelectorAll('figure').length - document.querySelectorAll('figcaption').length"
        assert shown.page.evaluate(captions) == 0


def test_light_and_dark_differ_and_paper_is_light(chromium: Any, url: str) -> None:
    colors = (
        "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.querySelector('svg text')).fill"
    )
    seen = {}
    for scheme in ("light", "dark"):
        with opened(chromium, url, DESK, scheme) as shown:
            seen[scheme] = shown.page.evaluate(colors)
            shown.page.emulate_media(media="print")
            seen[f"{scheme}, paper"] = shown.page.evaluate(colors)
    assert seen["light"] == "rgb(255, 255, 255)rgb(43, 49, 64)"
    assert seen["dark"] != seen["light"]
    assert seen["dark, paper"] == seen["light, paper"] == seen["light"]


def test_page_prints_with_its_folded_parts(chromium: Any, url: str, tmp_path: Path) -> None:
    with opened(chromium, url) as shown:
        height = "document.querySelector('details').getBoundingClientRect().height"
        assert shown.page.evaluate(height) < 50
        shown.page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins
        shown.page.emulate_media(media="print")
        assert shown.page.evaluate(height) > 200
        assert shown.hidden_width() <= 0
        shown.page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
