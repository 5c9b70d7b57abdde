"""`miniplm doctor`: versions, Java, GPUs, jars, storage and MLflow's store of this machine, and what is missing.

Needs the base install alone; starts no Spark, makes no root. With a config or a root, it also checks the root (on S3
it writes and deletes a small object) and MLflow's store. Exit code 0 if the base commands have what they need and the
root can be used, else 1; what only some commands need, such as Java, does not change the exit code.

    miniplm doctor [-c conf/demo.yaml | --root s3a://bucket/run1] [--json]
"""

import argparse
import os
import sys
import textwrap
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import fsspec

from jobs import spark_jars
from jobs.command import add_config_arguments, guarded, make_parser, read_config
from jobs.text import as_json, table
from miniplm_udf import __version__, object_storage, storage, storage_errors
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.errors import EXIT_DONE, EXIT_FAILED, ConfigError, first_line
from miniplm_udf.upkeep import machine, storage_probe
from miniplm_udf.upkeep.machine import Finding

_PACKAGES = {"s3a": ("s3fs", "s3"), "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "abfss": ("adlfs", "azure")}
_SERVER_SECONDS = 10.0
_WIDTH = 110


def examine(config: ExperimentConfig | None) -> list[Finding]:
    """Returns what was found out about this machine.

    Args:
        config: the experiment whose root and MLflow store are checked; None checks neither.
    """
    findings = [machine.python(), *machine.packages(), machine.java(), *machine.gpus(), machine.memory()]
    findings.append(machine.disk(storage.cache_folder(), "cache"))
    findings.append(_jars(with_s3=config is not None and object_storage.is_s3(config.root)))
    findings.append(_object_storage(config))
    if config is not None:
        findings += [*_root(config), _mlflow(config)]
    return findings


def _jars(with_s3: bool) -> Finding:
    """The jars of a Spark session: in this node's cache, or to be fetched."""
    missing = spark_jars.missing_jars(with_s3)
    what = "Delta's jars and S3's" if with_s3 else "Delta's jars"
    if not missing:
        return Finding(part="jars", state="ok", text=f"{what} are cached in {spark_jars.jar_folder()}")
    text = f"{len(missing)} of {what} are fetched by the first Spark command, which needs a network"
    remedy = f"without a network: copy {spark_jars.jar_folder()} from a machine that has them"
    return Finding(part="jars", state="note", text=text, remedy=remedy)


def _object_storage(config: ExperimentConfig | None) -> Finding:
    """The settings that reach S3; credentials by the name of their variable alone."""
    service = object_storage.service(config.storage if config else StorageConfig(), os.environ)
    variables = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    sources = [name for name in variables if os.environ.get(name)]
    sources += ["~/.aws"] if Path("~/.aws").expanduser().exists() else []
    return Finding(
        part="object storage",
        state="ok",
        text=f"endpoint {service.endpoint or 'AWS'}, region {service.region or 'not set'}, credentials from "
        f"{', '.join(sources) or 'the role of this machine'}",
    )


def _root(config: ExperimentConfig) -> Iterator[Finding]:
    """The root: whether it can be used, and the space that a local one has."""
    shown = storage.redact(config.root)
    if storage.is_local(config.root):
        yield machine.disk(Path(storage.local_path(config.root)), "root")
        place = machine.existing(Path(storage.local_path(config.root)))
        if place.is_dir() and os.access(place, os.W_OK):
            yield Finding(part="root", state="ok", text=f"{shown} can be written", is_required=True)
        else:
            remedy = "choose another folder with root=FOLDER, or have its owner permit writing"
            yield _bad_root(f"{shown}: {place} is no folder that you can write", remedy)
        return
    package, extra = _PACKAGES.get(config.root.partition("://")[0], ("", ""))
    if package and find_spec(package) is None:
        yield _bad_root(f"{shown} needs the package {package}", f"pip install 'miniplm[{extra}]'")
        return
    yield _remote_root(config, shown)


def _remote_root(config: ExperimentConfig, shown: str) -> Finding:
    try:
        storage_probe.probe(config.root)
        filesystem, path = fsspec.core.url_to_fs(config.root)
        is_there = filesystem.exists(path)
    except Exception as error:  # any client's error: the finding says what it was
        reason = str(error) if isinstance(error, ConfigError) else storage_errors.explain(error) or first_line(error)
        return _bad_root(reason, "correct the settings in `storage` or in the environment; see docs/storage.md")
    can = "can be reached and written" if object_storage.is_s3(config.root) else "can be reached"
    return Finding(part="root", state="ok", text=f"{shown} {can}{'' if is_there else ', is empty'}", is_required=True)


def _bad_root(text: str, remedy: str) -> Finding:
    return Finding(part="root", state="missing", text=text, remedy=remedy, is_required=True)


def _mlflow(config: ExperimentConfig) -> Finding:
    """MLflow's store: a server that answers, or a database file that exists or can be made."""
    uri = config.mlflow_uri()
    shown = storage.redact(uri)
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SERVER_SECONDS).close()
        except (OSError, ValueError) as error:
            remedy = "start the server, or correct mlflow.tracking_uri (or MLFLOW_TRACKING_URI)"
            return Finding(part="mlflow", state="missing", text=f"{shown} does not answer: {error}", remedy=remedy)
        return Finding(part="mlflow", state="ok", text=f"the server {shown} answers")
    if not uri.startswith("sqlite:///"):
        return Finding(part="mlflow", state="note", text=f"{shown} was not checked")
    file = Path(uri.removeprefix("sqlite:///"))
    if file.exists():
        return Finding(part="mlflow", state="ok", text=f"the database {file}")
    if os.access(machine.existing(file), os.W_OK):
        return Finding(part="mlflow", state="ok", text=f"the database {file}, made by the first training")
    remedy = "set mlflow.tracking_uri to a server, or report.folder to a folder that you can write"
    return Finding(part="mlflow", state="missing", text=f"{file} cannot be made", remedy=remedy)


def text(findings: Sequence[Finding]) -> str:
    """Returns the findings as a table of text, and below it what is missing with the command that installs it.

    Args:
        findings: the result of `examine`.
    """
    rows = [(finding.state, finding.part, finding.text) for finding in findings]
    parts = [f"miniplm {__version__}", table(None, rows), f"versions:\n{_versions(findings)}"]
    missing = [finding for finding in findings if finding.state == "missing"]
    for title, state in (("missing", "missing"), ("to know", "note")):
        lines = [(f.part, f.remedy) for f in findings if f.state == state and f.remedy]
        parts += [f"{title}:\n{table(None, lines, '  ')}"] if lines else []
    if not missing:
        parts.append("nothing is missing")
    elif any(finding.is_required for finding in missing):
        parts.append("the base commands, or this root, cannot be used")
    else:
        parts.append("the base commands can run; the commands that need the missing parts cannot")
    return "\n\n".join(parts)


def _versions(findings: Sequence[Finding]) -> str:
    """The versions of all installed packages, once each, in lines."""
    versions = {name: version for each in findings for name, version in each.versions.items() if version is not None}
    shown = ", ".join(f"{name} {versions[name]}" for name in sorted(versions, key=str.lower))
    indent = "  "
    return textwrap.fill(
        shown, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def exit_code(findings: Sequence[Finding]) -> int:
    """Returns 1 if something is missing that the base commands or the named root need, else 0.

    Args:
        findings: the result of `examine`.
    """
    return EXIT_FAILED if any(each.is_required and each.state == "missing" for each in findings) else EXIT_DONE


def command_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm doctor`."""
    parser = make_parser("doctor", __doc__)
    add_config_arguments(parser, takes_root=True, has_plan=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm doctor` and returns its exit code; `argv` defaults to the arguments of the process."""
    arguments = command_parser().parse_intermixed_args(argv)

    def body() -> int:
        has_place = arguments.config is not None or arguments.root is not None
        findings = examine(read_config("doctor", arguments) if has_place else None)
        print(as_json({"miniplm": __version__, "findings": findings}) if arguments.json else text(findings))
        return exit_code(findings)

    return guarded(body, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
