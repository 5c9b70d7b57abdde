"""The documentation site: it builds strictly, has a page for everything, and asks no other server for anything."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from docs.site import commands, configuration, tables
from docs.site.build import REPOSITORY, build
from jobs.cli import COMMANDS
from miniplm_udf.schemas.table_kinds import KINDS

# Attributes whose address a browser fetches by itself; a link that a reader follows is not among them.
FETCHED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "form": ("action",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
# Relations of <link> that fetch nothing.
NOT_FETCHED = {"canonical", "next", "prev", "alternate"}
OUTSIDE = re.compile(r"^\s*(https?:)?//", re.I)
# Marks for which the theme's script asks another server: for a program, or for the numbers of a repository.
LOADED_BY_SCRIPT = re.compile(r'class="[^"]*\b(mermaid|glightbox|pyodide)\b|data-md-component="source"')


class Resources(HTMLParser):
    """The addresses outside of the site that a browser fetches for a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        addresses = [values.get(name, "") for name in FETCHED.get(tag, ())]
        if tag == "link" and not set(values.get("rel", "").split()) & NOT_FETCHED:
            addresses.append(values.get("href", ""))
        addresses += re.findall(r"url\(['\"]?([^)'\"]*)", values.get("style", ""))
        self.outside += [address for address in addresses if OUTSIDE.match(address)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    assert build(folder) == 0
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_of_its_navigation(site: Path) -> None:
    settings = yaml.safe_load((REPOSITORY / "docs/site/mkdocs.yml").read_text(encoding="utf-8"))
    pages = {name for _, name in leaves(settings["nav"])}
    sources = {page.name for page in (REPOSITORY / "docs").glob("*.md")}
    assert sources | {"contributing.md", "changelog.md"} == {page for page in pages if "/" not in page}
    assert [page for page in pages if not (site / page).with_suffix(".html").is_file()] == []
    assert (site / "images/concepts.svg").is_file()


def leaves(nav: list[object]) -> list[tuple[str, str]]:
    """Titles and pages of a navigation, of all its levels."""
    pages: list[tuple[str, str]] = []
    for entry in nav:
        if isinstance(entry, str):
            pages.append(("", entry))
        elif isinstance(entry, dict):
            for title, value in entry.items():
                pages += leaves(value) if isinstance(value, list) else [(title, value)]
    return pages


@pytest.mark.slow
def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = {page.relative_to(site): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(pages) > 30
    assert {name: outside for name, page in pages.items() if (outside := Resources(page).outside)} == {}
    assert [name for name, page in pages.items() if LOADED_BY_SCRIPT.search(page)] == []
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:@import\s+|url\()['\"]?\s*(?:https?:)?//[^)'\"]*", text) == [], style.name


@pytest.mark.slow
def test_the_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    notebooks = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    pages = {
        notebook.stem: (site / f"notebooks/{notebook.stem}.html").read_text(encoding="utf-8") for notebook in notebooks
    }
    assert [name for name, page in pages.items() if "<table>" not in page] == [], "tables in the style of the pages"
    assert not any("dataframe" in page for page in pages.values())
    for name, page in pages.items():
        images = re.findall(r'<img[^>]* src="([^"]+)"', page)
        assert [image for image in images if not (site / "notebooks" / image).is_file()] == [], name
    assert pages["1_explore_scores"].count("<img") == 2


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="https://example.com/x.png">',
        '<p style="background: url(https://example.com/x.png)">',
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_seen(tag: str) -> None:
    assert len(Resources(f"<html><body>{tag}</body></html>").outside) == 1


def test_a_link_for_the_reader_is_not_fetched() -> None:
    assert Resources('<a href="https://arxiv.org/abs/2410.17215">x</a><img src="a.svg">').outside == []


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[x](gone.md)", "[x](other.md#gone)"])
def test_a_broken_link_ends_the_build(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ndocs_dir: docs\nsite_dir: site\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{link} [y](other.md#here)\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## Here\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "1 issue found" in result.stderr + result.stdout


def test_the_links_of_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_key_of_the_config_has_a_meaning() -> None:
    sections = list(configuration.sections())
    assert len(sections) > 30
    assert [f"{each.path}.{key.name}" for each in sections for key in each.keys if not key.meaning] == []
    page = configuration.page()
    assert "| `min_learning_rate_ratio` | number | `0.1` | share, 0 to 1 | final learning rate over" in page
    assert "| `root` | text | required |" in page


def test_every_command_is_on_its_page() -> None:
    page = commands.page()
    assert [name for name in COMMANDS if f"\n## `miniplm {name}`\n" not in page] == []
    assert "| `--gpus GPUS` | GPUs to estimate for (default 1) |" in page
    assert "\n### `miniplm corpus take-down`\n" in page
    assert "\n### `python -m trainer scaling`\n" in page


def test_every_table_is_on_its_page() -> None:
    declared, page = tables.declared(), tables.page()
    assert {kind.name for kind in KINDS} - {"pinned"} == set(declared)
    assert "| `nll_sum_nats` | float64 | nats | sum of -log p over the scored tokens |" in page
    assert [
        f"{name}.{column.name}" for name, each in declared.items() for column in each.columns
        if f"| `{column.name}` |" not in page
    ] == []  # fmt: skip
