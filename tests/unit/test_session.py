"""The session's settings: what conf/spark says and what the jobs set themselves must be one."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from py4j.java_gateway import JavaPackage

from jobs import session
from miniplm_udf.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "spark"


def properties(path: Path) -> dict[str, str]:
    lines = [line.split(None, 1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {key: value.strip() for key, value in lines}


def test_the_property_files_name_deltas_jars_as_the_session_does() -> None:
    for path in CONF.glob("*.conf"):
        found = properties(path)
        assert found["spark.jars.packages"] == session.DELTA_PACKAGE
        assert found["spark.jars.excludes"] == ",".join(session.DELTA_EXCLUDES)


def test_cached_jars_are_used_without_resolving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    assert session.delta_jars()["spark.jars.packages"] == session.DELTA_PACKAGE
    jars = tmp_path / "ivy" / "jars"
    jars.mkdir(parents=True)
    for name in session.DELTA_JARS[:-1]:
        (jars / name).touch()
    assert "spark.jars" not in session.delta_jars(), "a cache that lacks a jar is no cache"
    (jars / session.DELTA_JARS[-1]).touch()
    cached = session.delta_jars()
    assert cached["spark.jars"].count(str(jars)) == len(session.DELTA_JARS)
    assert "spark.jars.packages" not in cached


@pytest.mark.parametrize("key", ["spark.executorEnv.OPENAI_API_KEY", "spark.hadoop.fs.s3a.access.key", "spark.x.token"])
def test_sparks_pages_hide_keys(key: str) -> None:
    assert re.search(session._defaults(1)["spark.redaction.regex"], key)


def test_a_driver_without_deltas_jars_is_refused() -> None:
    stopped: list[bool] = []
    package = JavaPackage("io.delta.tables.DeltaTable", None)
    delta = SimpleNamespace(delta=SimpleNamespace(tables=SimpleNamespace(DeltaTable=package)))
    without = SimpleNamespace(_jvm=SimpleNamespace(io=delta), stop=lambda: stopped.append(True))
    with pytest.raises(ConfigError, match=r"^spark\.jars\.packages: expected Delta's jars .* --properties-file"):
        session._require_delta(without)  # type: ignore[arg-type]
    assert stopped == [True]
