"""The `miniplm` command: one word a stage, `run` for all of them.

Owns only the choice of the word; every stage parses its own options. Nothing heavy is imported before the word is
known.
"""

import importlib
import sys
from collections.abc import Sequence

from miniplm_udf import __version__

COMMANDS = {
    "run": "all stages in order, skipping those whose inputs and config have not changed",
    "estimate": "what it will cost, from a sample: tokens, FLOPs, seconds, bytes, rejects; writes nothing",
    "ingest": "files or a table -> instances and rejects",
    "annotate": "instances -> annotations: duplicates, contamination, language, quality, as columns for refine",
    "reference": "train the reference LM on the reference split, once",
    "score": "instances -> scores -> score_matrix, with every configured model",
    "stream": "a service: ingest, score and the matrix at once, until told to stop",
    "proxy": "a small regressor learns the score from a scored sample, and predicts it for all the pool",
    "refine": "score_matrix -> a new version of each refined corpus; --follow keeps them growing",
    "corpus": "versions of corpora: list, show, diff, pin, unpin, restore, rebuild; take-down of documents",
    "inspect": "texts that a corpus kept, or dropped, with their scores",
    "export": "a corpus as JSON lines or Parquet, with texts, spans and scores, for other trainers",
    "pack": "refined corpora -> token sequences for the students' tokenizers",
    "train": "train the students",
    "evaluate": "held-out loss of the students",
    "report": "summary.json and report.html",
    "status": "where the queries of a root stand; Prometheus text",
    "verify": "checks a root: nothing lost, nothing twice, every sum",
    "maintain": "merges small files and removes old ones; pinned versions and running queries keep theirs",
    "demo-text": "write the demo's corpus from documentation found on this machine",
}
# Commands with a `main` of their own; the others are stages of a pipeline.
_OWN_MAIN = ("corpus", "demo-text", "estimate", "export", "inspect", "maintain", "proxy", "status", "stream", "verify")
# A file of that name would hide Python's own module from the others in its folder.
_MODULES = {"inspect": "inspect_corpus"}
_STAGES = ("ingest", "annotate", "reference", "score", "refine", "pack", "train", "evaluate", "report")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: miniplm COMMAND -c CONFIG [options] [key=value ...]",
            "",
            "MiniPLM (arXiv 2410.17215) as a streaming engine on Spark. Commands:",
            "",
            *lines,
            "",
            "`miniplm COMMAND --help` tells the rest. Example: miniplm run -c conf/demo.yaml root=/data/demo",
            "exit codes: 0 done; 1 failed; 2 bad config or usage; 3 done, with rejects over the configured share",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    word, rest = arguments[0], arguments[1:]
    if word == "--version":
        print(f"miniplm {__version__}")
        return 0
    if word not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"miniplm: unknown command {word!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # `refine` is a stage, and with options of its own a service, or a list.
    if word in _OWN_MAIN or (word == "refine" and {"--follow", "--corpus", "--rules", "-h", "--help"} & set(rest)):
        return int(importlib.import_module(f"jobs.{_MODULES.get(word, word.replace('-', '_'))}").main(rest))
    pipeline = importlib.import_module("jobs.pipeline")
    return int(pipeline.main(rest, stage=word if word in _STAGES else None))


if __name__ == "__main__":
    sys.exit(main())
