"""`python -m docs.site.execute`: runs the notebooks on `build/demo`, and writes their outputs into the files.

Input: `notebooks/*.ipynb`, and the root in `MINIPLM_ROOT` (default `build/demo`, which `make demo` writes). Output: the
same files with the outputs of this run. A notebook is written only if `problems` finds nothing in it; else the command
ends with exit code 1. Times of execution and messages on stderr are left out, so a second run changes little.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.site.build import REPOSITORY

NOTEBOOKS = REPOSITORY / "notebooks"
LARGEST_NOTEBOOK, LARGEST_IMAGE = 300_000, 60_000
# A path on the machine that ran the notebook; and an address, in which the same letters are no path.
_LOCAL_PATH = re.compile(r"(?<![\w./])/+(?:work|root|tmp|home|Users|mnt|var|usr|opt)/")
_ADDRESS = re.compile(r"https?://\S+")
# A kernel must not inherit the connection of this process to a JVM.
_OF_A_JVM = ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET")


def execute(notebook: Path, folder: Path, **variables: str) -> Any:
    """Runs a notebook from top to bottom in a new kernel. Writes nothing.

    Args:
        notebook: the file.
        folder: working folder of the kernel.
        variables: environment variables of the kernel, besides those of this process.

    Returns:
        The executed notebook (nbformat), without execution times and without messages on stderr.

    Raises:
        CellExecutionError: a cell has raised.
    """
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_JVM} | variables
    client = NotebookClient(content, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    content.metadata.pop("widgets", None)
    content.metadata.get("language_info", {}).pop("version", None)
    for cell in content.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return content


def problems(notebook: Path) -> Iterator[str]:
    """Yields what keeps a notebook from being published, one sentence each.

    Args:
        notebook: a file with its outputs.
    """
    text = notebook.read_text(encoding="utf-8")
    if len(text.encode()) > LARGEST_NOTEBOOK:
        yield f"{notebook.name} has {len(text.encode()):,} bytes; at most {LARGEST_NOTEBOOK:,} are allowed"
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not run once each, from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    if not outputs:
        yield "it has no outputs"
    for output in outputs:
        yield from _output_problems(output)


def _output_problems(output: dict[str, Any]) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"a cell ends with {output['ename']}: {output['evalue']}"
    if output.get("name") == "stderr":
        yield f"a cell shows a message on stderr: {''.join(output['text'])[:80]}"
    data = output.get("data", {})
    if len(base64.b64decode(data.get("image/png", ""))) > LARGEST_IMAGE:
        yield f"an image has more than {LARGEST_IMAGE:,} bytes"
    texts = [output.get("text", ""), *(value for kind, value in data.items() if kind.startswith("text/"))]
    for value in texts:
        for line in "".join(value).splitlines():
            if _LOCAL_PATH.search(_ADDRESS.sub("", line)):
                yield f"an output has a path of this machine: {line.strip()[:80]}"


def main(names: list[str]) -> int:
    """Runs notebooks and writes their outputs.

    Args:
        names: names of the files without a suffix; empty: all.

    Returns:
        The exit code.
    """
    import nbformat

    exit_code = 0
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and notebook.stem not in names:
            continue
        print(f"{notebook.name}: running", flush=True)
        executed = notebook.with_suffix(".executed")
        nbformat.write(execute(notebook, NOTEBOOKS), executed)
        if wrong := list(problems(executed)):
            exit_code = 1
            print(*(f"{notebook.name}: {problem}" for problem in wrong), sep="\n", file=sys.stderr)
            executed.unlink()
        else:
            executed.replace(notebook)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
