"""Where benchmarks leave what they measured: `build/bench/<name>.json`, merged, so that several write one file.

Input: ratios by name, and the rows of the printed table. Output: a JSON object with `ratios`, and the rows under the
key that the benchmark chose. Keys of other benchmarks stay.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"


def record(
    name: str, ratios: Mapping[str, float], rows: Sequence[Mapping[str, Any]], key: str = "rows", folder: Path = FOLDER
) -> Path:
    """Merges ratios and rows into `<folder>/<name>.json` and returns its path.

    Args:
        rows: of the printed table, replaced as a whole under `key`.
    """
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found["ratios"] = {**found.get("ratios", {}), **ratios}
    found[key] = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text."""
    cells = [
        list(header),
        *([f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
