"""Builds the site: the pages of `docs/`, two files of the repository's top folder, and the generated reference pages.

Input: `docs/*.md`, `docs/images`, `docs/site/mkdocs.yml`, `CONTRIBUTING.md`, `CHANGELOG.md`, the notebooks, the code.
Output: the pages in `<site>-pages/`, from which Zensical makes `<site>/`. Zensical reads mkdocs.yml but runs no hooks,
so the pages are complete before it starts. It is called strictly: a link to a page or an anchor that does not exist is
an error.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from docs.site import commands, configuration, notebooks, tables
from docs.site.markdown import with_pipes_in_code

REPOSITORY = Path(__file__).resolve().parents[2]
_TOP_FILES = ("CONTRIBUTING.md", "CHANGELOG.md")
_REFERENCE = {
    "configuration.md": configuration.page,
    "commands.md": commands.page,
    "tables.md": tables.page,
}


def write_pages(folder: Path) -> dict[str, str]:
    """Writes all pages of the site, the generated ones included.

    Args:
        folder: folder of the pages; it is emptied first.

    Returns:
        The pages of the notebooks by title, for the navigation.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "reference").mkdir(parents=True)
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        (folder / page.name).write_text(with_pipes_in_code(page.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(REPOSITORY / "docs" / "images", folder / "images")
    for name in _TOP_FILES:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        (folder / name.lower()).write_text(text.replace("](docs/", "]("), encoding="utf-8")
    for name, page_text in _REFERENCE.items():
        (folder / "reference" / name).write_text(with_pipes_in_code(page_text()), encoding="utf-8")
    pages = notebooks.write_pages(REPOSITORY / "notebooks", folder / "notebooks")
    return {title: f"notebooks/{name}" for title, name in pages.items()}


def build(site: Path) -> int:
    """Builds the site.

    Args:
        site: folder of the site; the pages and Zensical's cache are next to it, in `<site>-pages`.

    Returns:
        Zensical's exit code: 0, or 1 if a link is broken.
    """
    project = site.with_name(f"{site.name}-pages")
    pages_of_notebooks = write_pages(project / "docs")
    shutil.rmtree(site, ignore_errors=True)
    settings = yaml.safe_load((REPOSITORY / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    # After the pages for a start.
    settings["nav"].insert(1, {"Notebooks": [{title: page} for title, page in pages_of_notebooks.items()]})
    # Zensical writes only below the folder of its config.
    settings |= {"docs_dir": "docs", "site_dir": "site"}
    config = project / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    exit_code = subprocess.run(command, check=False).returncode
    if exit_code == 0:
        shutil.move(project / "site", site)
    return exit_code
