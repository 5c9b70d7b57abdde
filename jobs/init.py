"""`miniplm init`: looks at your texts and your teacher, and writes a commented experiment file that runs as it is.

Reads the first rows of some files, and the small files of the teacher; starts no Spark and loads no model. Chooses the
fields, the separator, the lengths, the splits, a reference, students of two families, steps that fit the text, and the
conditions that clean the corpora; each with its reason in a comment. Prints what it saw, what may make the result worth
little, about what it will cost, and the next command. Writes one file, and replaces it only with --force.

    miniplm init --input '/texts/*.jsonl.zst' --teacher Qwen/Qwen2.5-0.5B --root /data/run1 --out experiment.yaml
"""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import shtab

from jobs.command import Parser, guarded, make_parser
from jobs.text import as_json, table
from miniplm_udf import object_storage
from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.starting.plan import Aims
from miniplm_udf.starting.start import as_plain, look
from miniplm_udf.starting.template import Start, render, si

_WIDTH = 110


def run(arguments: argparse.Namespace) -> Start:
    """Looks at everything and writes the file.

    Args:
        arguments: the parsed options.

    Returns:
        What was seen and planned.

    Raises:
        ConfigError: the file exists already, or the input or the teacher cannot be used.
        ModelLoadError: there is no such teacher.
    """
    out = Path(arguments.out)
    if out.exists() and not arguments.force:
        raise ConfigError(f"--out: {out} exists already; name another file, or replace it with --force")
    if arguments.gpus is not None and arguments.gpus < 0:
        raise ConfigError(f"--gpus: expected 0 or more, found {arguments.gpus}")
    object_storage.use(StorageConfig())
    start = look(
        arguments.input, arguments.teacher, arguments.root, arguments.separator, arguments.gpus,
        Aims(has_students=not arguments.no_students, has_whole_texts=arguments.whole_texts),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(start), encoding="utf-8")
    load_config(out)
    return start


def text(start: Start, out: str) -> str:
    """Returns what a user reads in the terminal.

    Args:
        start: the result of `run`.
        out: the file that was written.
    """
    config = shlex.quote(out)
    parts = [
        table(None, list(start.seen.items())),
        _costs(start),
        *(_wrapped(f"caution: {caution}") for caution in start.cautions),
        f"wrote {out}; each line has its reason. Next:",
        "\n".join(
            [
                f"  miniplm run -c {config} --dry-run     # checks everything and shows the plan, in seconds",
                f"  miniplm estimate -c {config}          # measures the cost on a sample, in a minute or two",
                f"  miniplm run -c {config}",
            ]
        ),
    ]
    return "\n\n".join(filter(None, parts))


def _costs(start: Start) -> str:
    """About what the run costs, from known factors."""
    plan = start.plan
    n_students = 4 if plan.aims.has_students else 0
    rows = [
        ("score", f"{si(plan.pool)}tokens, both models", plan.score_flops),
        ("reference", f"{si(plan.reference.n_tokens)}tokens, {plan.reference.steps:,} steps", plan.reference.flops),
        (
            "students",
            f"{n_students} x {si(plan.student.n_tokens)}tokens, {plan.student.steps:,} steps",
            n_students * plan.student.flops,
        ),
    ]
    lines = [
        (name, what, f"{si(flops)}FLOPs", _duration(flops / plan.machine.flops)) for name, what, flops in rows if flops
    ]
    costs = table(("about", "", "", f"on {start.seen['machine']}"), lines)
    # Measured with `make demo` on 2 cores: 74 s for ingest, annotate, refine, pack, evaluate and report.
    rest = (
        "This is the arithmetic of the models alone; small models are slower. Spark's part comes on top: its start, "
        "ingest, annotate, refine, pack and the report take a minute or two even for little text."
    )
    return f"{costs}\n\n{_wrapped(rest)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def command_parser() -> Parser:
    """The parser of `miniplm init`."""
    parser = make_parser("init", __doc__)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="texts: files, folders, globs in quotes, hf://datasets/…",
    )
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="a folder, a hub name or a .gguf file")
    root = parser.add_argument("--root", default="miniplm-root", help="where the run writes (default miniplm-root)")
    root.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    out = parser.add_argument("--out", default="experiment.yaml", help="the file to write (default experiment.yaml)")
    out.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument(
        "--separator", metavar="TOKEN", help="the teacher's end-of-document token, if its files hide it"
    )
    parser.add_argument(
        "--no-students", action="store_true", help="end with scores and corpora, and hold out no text; train elsewhere"
    )
    parser.add_argument(
        "--whole-texts",
        action="store_true",
        help="an instance for each text; default: texts joined and cut to a length",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to plan for (default: those of this machine)")
    parser.add_argument("--estimate", action="store_true", help="then measure the cost, as `miniplm estimate` does")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm init` and returns its exit code; `argv` defaults to the arguments of the process."""
    arguments = command_parser().parse_args(argv)

    def body() -> int:
        start = run(arguments)
        print(as_json({"file": arguments.out, **as_plain(start)}) if arguments.json else text(start, arguments.out))
        return EXIT_DONE

    code = guarded(body, arguments.debug)
    if code == EXIT_DONE and arguments.estimate:
        from jobs import estimate

        return estimate.main(["-c", arguments.out, *(["--json"] if arguments.json else [])])
    return code


if __name__ == "__main__":
    sys.exit(main())
