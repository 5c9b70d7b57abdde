"""How fast scoring on a CPU is beside vLLM's build for CPUs and llama.cpp: one model, the same texts, one run.

    python -m tests.bench.bench_engines [--instances 12] [--documents 64]

Model: SmolLM2-135M in float32, in all engines. Texts: `bench_score`'s instances of 1,024 tokens, and its documents of
mixed lengths. Each engine is installed into an environment of its own under build/bench/engines (vLLM in a minute,
llama.cpp is compiled in ten) and runs in its own process; ours is timed before and after each. Prints a row for each
engine and set of texts, and writes `build/bench/engines.json` with `vs_ENGINE_SET`: our tokens per second over the
engine's. The sums of all engines are compared.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniplm_udf.scoring.model_files import model_folder
from tests.bench.bench_score import ScoringBench, make_bench, ours, timed
from tests.support import bench_results as results
from tests.support import engines

_SUPPORT = Path(__file__).resolve().parents[1] / "support"
_TOLERANCE_NATS = 1e-3


def measure(
    bench: ScoringBench, name: str, line: Sequence[str | Path], texts: dict[str, list[str]], folder: Path
) -> list[dict[str, Any]]:
    """The rows of one engine.

    Args:
        line: the command of the engine, to which the files of texts and results are added.
        texts: texts by the name of their set.
        folder: where these files go.
    """
    before = {key: timed(functools.partial(ours, bench.scorer, each)) for key, each in texts.items()}
    ids = {key: bench.ids(each) for key, each in texts.items()}
    given, found = folder / "texts.json", folder / f"{name}.json"
    given.write_text(json.dumps(ids))
    settings = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} | engines.VLLM_SETTINGS
    with (folder / f"{name}.log").open("wb") as log:
        subprocess.run([*line, given, found], check=True, env=os.environ | settings, stdout=log, stderr=log)
    theirs = json.loads(found.read_text())
    rows = []
    for key, each in texts.items():
        sums, seconds = before[key]
        seconds = (seconds + timed(functools.partial(ours, bench.scorer, each))[1]) / 2
        n_tokens = sum(len(one) - 1 for one in ids[key])
        worst = max(abs(a - b) / (len(one) - 1) for a, b, one in zip(sums, theirs[key]["nats"], ids[key], strict=True))
        if not worst <= _TOLERANCE_NATS:
            raise RuntimeError(f"{name}: scores differ by {worst:.2g} nats a token")
        rows.append(
            {
                "engine": name, "texts": key, "mean_tokens": n_tokens / len(each),
                "ours_tokens_per_s": n_tokens / seconds, "theirs_tokens_per_s": n_tokens / theirs[key]["seconds"],
                "ratio": theirs[key]["seconds"] / seconds, "worst_nats_per_token": worst,
            }
        )  # fmt: skip
    return rows


def commands(bench: ScoringBench, folder: Path) -> dict[str, list[str | Path]]:
    """The command of each engine that can be installed."""
    package, _, file = str(bench.config.path).removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)  # importing it would need what it depends on
    assert spec is not None
    gguf = Path(str(spec.origin)).parent / file
    found: dict[str, list[str | Path]] = {}
    vllm = engines.make_environment(folder / "vllm", [engines.VLLM], engines.VLLM_LIKE_OURS)
    llama_cpp = engines.make_environment(folder / "llama_cpp", [engines.LLAMA_CPP, "numpy"])
    if vllm is not None:
        found["vllm"] = [vllm, _SUPPORT / "engine_vllm.py", model_folder(bench.config)]
    if llama_cpp is not None:
        found["llama_cpp"] = [llama_cpp, _SUPPORT / "engine_llama_cpp.py", gguf]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=12, help="of 1,024 tokens")
    parser.add_argument("--documents", type=int, default=64, help="of mixed lengths")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "engines", help="of environments and texts")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where engines.json goes")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = make_bench(given.folder)
    texts = {"1,024 tokens": bench.instances(given.instances, 1024), "mixed": bench.documents(given.documents)}
    ours(bench.scorer, texts["mixed"][:8])
    rows: list[dict[str, Any]] = []
    for name, line in commands(bench, given.folder).items():
        rows += measure(bench, name, line, texts, given.folder)
        print(results.table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
    ratios = {f"vs_{row['engine']}_{row['texts'].split()[0]}": round(row["ratio"], 3) for row in rows}
    print(ratios)
    results.record("engines", ratios, rows, folder=given.results)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
