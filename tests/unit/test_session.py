"""The session's settings: what conf/spark says and what the jobs set themselves must be one."""

from pathlib import Path

import pytest

from jobs import session

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
    assert session._delta_jars()["spark.jars.packages"] == session.DELTA_PACKAGE
    jars = tmp_path / "ivy" / "jars"
    jars.mkdir(parents=True)
    for name in session.DELTA_JARS[:-1]:
        (jars / name).touch()
    assert "spark.jars" not in session._delta_jars(), "a cache that lacks a jar is no cache"
    (jars / session.DELTA_JARS[-1]).touch()
    found = session._delta_jars()
    assert found["spark.jars"].count(str(jars)) == len(session.DELTA_JARS)
    assert "spark.jars.packages" not in found
