#!/usr/bin/env bash
# Compiles miniplm_udf/s3_commits/*.java into miniplm-s3.jar. Needs a JDK, and the jars of a session with an S3 root.
set -euo pipefail
cd "$(dirname "$0")/../miniplm_udf/s3_commits"
spark=$(python -c 'import pyspark, pathlib; print(pathlib.Path(pyspark.__file__).parent / "jars")')
cached=${MINIPLM_CACHE:-$HOME/.cache/miniplm}/ivy/jars
classes=$(mktemp -d)
trap 'rm -rf "$classes"' EXIT
javac --release 17 -Xlint:all,-path,-classfile,-serial,-processing -cp "$spark/*:$cached/*" -d "$classes" ./*.java
# The sources are in the jar: a test compares them with the files next to it.
cp ./*.java "$classes/miniplm/s3/"
jar --create --file miniplm-s3.jar --date=2026-01-01T00:00:00Z -C "$classes" .
