"""The notebooks as pages: text, code and the outputs that the files hold.

Input: `notebooks/*.ipynb`. Output: a Markdown page for each, its images in a folder next to it, and the entries of the
navigation. Runs no notebook.
"""

import re
from pathlib import Path

# pandas styles its tables itself; without this the pages' own style is used.
_STYLE_OF_PANDAS = re.compile(r"<style scoped>.*?</style>\n?", re.S)
_TABLE_OF_PANDAS = '<table border="1" class="dataframe">'


def write_pages(notebooks: Path, folder: Path) -> dict[str, str]:
    """Writes a page for each notebook.

    Args:
        notebooks: folder of the notebooks.
        folder: folder of the pages; made if there is a notebook.

    Returns:
        The names of the pages by title: the first heading of the notebook.
    """
    from nbconvert import MarkdownExporter

    pages = {}
    for notebook in sorted(notebooks.glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(notebook), {"output_files_dir": notebook.stem})
        text = _STYLE_OF_PANDAS.sub("", text).replace(_TABLE_OF_PANDAS, "<table>")
        for name, content in resources.get("outputs", {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{notebook.stem}.md").write_text(text, encoding="utf-8")
        heading = re.search(r"^# (.+)$", text, re.M)
        pages[heading[1].strip() if heading else notebook.stem] = f"{notebook.stem}.md"
    return pages
