"""Builds the site: the pages of `docs/`, two files of the repository's top folder, and the generated reference pages.

Input: `docs/*.md`, `docs/images`, `docs/site/mkdocs.yml`, `CONTRIBUTING.md`, `CHANGELOG.md` and the code. Output: the
pages in `<site>-pages/`, from which Zensical makes `<site>/`. Zensical reads mkdocs.yml but runs no hooks, so the pages
are complete before it starts. It is called strictly: a link to a page or an anchor that does not exist is an error.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from docs.site import commands, configuration, tables

REPOSITORY = Path(__file__).resolve().parents[2]
_TOP_FILES = ("CONTRIBUTING.md", "CHANGELOG.md")
_REFERENCE = {
    "configuration.md": configuration.page,
    "commands.md": commands.page,
    "tables.md": tables.page,
}


def write_pages(folder: Path) -> None:
    """Writes all pages of the site, the generated ones included.

    Args:
        folder: folder of the pages; it is emptied first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "reference").mkdir(parents=True)
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        shutil.copy(page, folder)
    shutil.copytree(REPOSITORY / "docs" / "images", folder / "images")
    for name in _TOP_FILES:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        (folder / name.lower()).write_text(text.replace("](docs/", "]("), encoding="utf-8")
    for name, page_text in _REFERENCE.items():
        (folder / "reference" / name).write_text(page_text(), encoding="utf-8")


def build(site: Path) -> int:
    """Builds the site.

    Args:
        site: folder of the site; the pages and Zensical's cache are next to it, in `<site>-pages`.

    Returns:
        Zensical's exit code: 0, or 1 if a link is broken.
    """
    project = site.with_name(f"{site.name}-pages")
    write_pages(project / "docs")
    shutil.rmtree(site, ignore_errors=True)
    settings = (REPOSITORY / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    config = project / "mkdocs.yml"
    # Zensical writes only below the folder of its config.
    config.write_text(f"{settings}docs_dir: docs\nsite_dir: site\n", encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    exit_code = subprocess.run(command, check=False).returncode
    if exit_code == 0:
        shutil.move(project / "site", site)
    return exit_code
