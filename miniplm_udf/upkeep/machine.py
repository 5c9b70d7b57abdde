"""The state of this machine for `miniplm doctor`: Python, packages, Java, GPUs, memory and disk. Starts no Spark.

Input: the metadata of installed packages, the answers of `java` and `nvidia-smi`, and of torch in a process of its own.
Output: findings, each with the command that installs what is missing. Works in the base install. Writes nothing.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "note", "missing"]

_DISTRIBUTION = "miniplm"
_LEAST_PYTHON, _LEAST_JAVA = (3, 11), 17
# Below these, the driver's default of 4 GiB, or a local Spark session, has too little.
_LEAST_MEMORY_BYTES, _LEAST_DISK_BYTES = 6 * 2**30, 5 * 2**30
_GIB = 2**30
_ANSWER_SECONDS = 120.0
# Extras that only repeat others, or are for people who change this project.
_LEFT_OUT = ("dev", "demo")
_TORCH = (
    "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available(), torch.cuda.device_count()]))"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of a part of the installation.

    Attributes:
        part: name of the part.
        state: ok; note: it is usable, and the text says how it is limited; missing: some commands cannot run.
        text: what is there, for people.
        remedy: the command or the setting that repairs it; "" if nothing is wrong.
        is_required: whether the base commands, or the root that the user named, need it.
        versions: versions of installed packages by name; None for a package that is not installed.
    """

    part: str
    state: State
    text: str
    remedy: str = ""
    is_required: bool = False
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)


def python() -> Finding:
    """The version of Python."""
    is_new = sys.version_info >= _LEAST_PYTHON
    return Finding(
        part="python",
        state="ok" if is_new else "missing",
        text=f"{platform.python_version()} in {sys.executable}",
        remedy="" if is_new else "install Python 3.11 or newer, make an environment with it, and install miniplm there",
        is_required=True,
    )


def packages() -> list[Finding]:
    """The packages of the base install and of each extra."""
    try:
        declared = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]
        extras = metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        text = "miniplm is not installed in this Python, so its packages are not known; it runs from its folder"
        return [Finding(part="packages", state="note", text=text, remedy="pip install -e . in the clone of miniplm")]
    base = [needed for needed in declared if needed.marker is None or needed.marker.evaluate({"extra": ""})]
    findings = [_packages("base", base, f"pip install {_DISTRIBUTION}", is_required=True)]
    for extra in sorted(set(extras) - set(_LEFT_OUT)):
        needed = [each for each in declared if each not in base and _belongs_to(each, extra)]
        findings.append(_packages(f"extra {extra}", needed, f"pip install '{_DISTRIBUTION}[{extra}]'"))
    return findings


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _packages(part: str, needed: Sequence[Requirement], install: str, is_required: bool = False) -> Finding:
    versions = {requirement.name: _version(requirement.name) for requirement in needed}
    missing = [each.name for each in needed if versions[each.name] is None]
    wrong = [
        f"{each.name}{each.specifier} (found {version})"
        for each in needed
        if (version := versions[each.name]) is not None and not each.specifier.contains(version, prereleases=True)
    ]
    n_good = len(versions) - len(missing) - len(wrong)
    parts = [f"{n_good} of {len(versions)} packages"]
    parts += [f"not installed: {', '.join(missing)}"] if missing else []
    parts += [f"wrong version: {', '.join(wrong)}"] if wrong else []
    return Finding(
        part=part,
        state="missing" if missing or wrong else "ok",
        text="; ".join(parts),
        remedy=install if missing or wrong else "",
        is_required=is_required,
        versions=versions,
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def java() -> Finding:
    """The Java that Spark would start."""
    home = os.environ.get("JAVA_HOME")
    program = str(Path(home, "bin", "java")) if home else "java"
    answer = _answer([program, "-version"])
    match = re.search(r'version "((?:1\.)?(\d+)[^"]*)"', answer or "")
    where = f"{program} (JAVA_HOME)" if home else shutil.which("java") or "PATH"
    if match is not None and int(match[2]) >= _LEAST_JAVA:
        return Finding(part="java", state="ok", text=f"{match[1]} in {where}")
    text = f"{match[1] if match else 'none'} in {where}; Spark needs {_LEAST_JAVA} or newer"
    remedy = "sudo apt-get install openjdk-17-jre-headless (another system: install Java 17 or newer, set JAVA_HOME)"
    return Finding(part="java", state="missing", text=text, remedy=remedy)


def gpus() -> Iterator[Finding]:
    """The GPUs that the driver of this machine reports, and those that torch can use."""
    columns = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = _answer(["nvidia-smi", *columns], only_success=True)
    cards = [line.strip() for line in (answer or "").splitlines() if line.strip()]
    text = "; ".join(cards) or "none found by nvidia-smi: models run on the CPU"
    yield Finding(part="gpus", state="ok" if cards else "note", text=text)
    if _version("torch") is None:
        return
    lines = (_answer([sys.executable, "-c", _TORCH], only_success=True) or "").splitlines()
    if not lines:
        remedy = f"python -c 'import torch' shows why; pip install --force-reinstall '{_DISTRIBUTION}[score]'"
        yield Finding(part="torch", state="missing", text="it is installed and cannot be imported", remedy=remedy)
        return
    version, has_cuda, n_devices = json.loads(lines[-1])
    yield Finding(
        part="torch",
        state="missing" if cards and not has_cuda else "ok",
        text=f"{version}, {n_devices} GPUs usable" if has_cuda else f"{version}, on the CPU",
        remedy="install a torch that is built for the CUDA of this driver" if cards and not has_cuda else "",
    )


def memory() -> Finding:
    """The memory of this machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    is_small = total < _LEAST_MEMORY_BYTES
    return Finding(
        part="memory",
        state="note" if is_small else "ok",
        text=f"{total / _GIB:.1f} GiB, {len(os.sched_getaffinity(0))} cores",
        remedy="lower spark.conf: {spark.driver.memory: 2g} in the config (default 4g)" if is_small else "",
    )


def disk(folder: Path, purpose: str) -> Finding:
    """Returns the free space where a folder is, or will be.

    Args:
        folder: the folder; it may be absent.
        purpose: what is stored there, for the name of the part.
    """
    place = existing(folder)
    free = shutil.disk_usage(place).free
    is_small = free < _LEAST_DISK_BYTES
    return Finding(
        part=f"disk ({purpose})",
        state="note" if is_small else "ok",
        text=f"{free / _GIB:.1f} GiB free in {place}",
        remedy="free some space, or choose another place" if is_small else "",
    )


def existing(folder: Path) -> Path:
    """Returns the folder, or the nearest folder above it that exists.

    Args:
        folder: any path.
    """
    path = folder.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _answer(command: Sequence[str], only_success: bool = False) -> str | None:
    """Returns the output of a program; None if it cannot be started, takes too long, or (with `only_success`) fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if only_success:
        return done.stdout if done.returncode == 0 else None
    return done.stdout + done.stderr
