"""Headless Chromium for tests that look at a page as a reader does. Tests skip where Chromium is not installed.

`conf/need_chromium.sh` installs Debian's package; playwright only drives it, and downloads no browser of its own.
"""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}


# For a module: two at a time are not possible in one process, and its event loop would disturb other tests.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; `opened` opens its pages."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed: conf/need_chromium.sh installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses to run in its sandbox as root; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """An open page, and the URLs that it asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def hidden_width(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@contextlib.contextmanager
def opened(browser: Any, url: str, size: dict[str, int] = DESK, scheme: str = "light") -> Iterator[Opened]:
    """Opens a URL in a page of its own."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    shown = Opened(page)
    try:
        page.goto(url, wait_until="load")
        yield shown
    finally:
        page.close()
