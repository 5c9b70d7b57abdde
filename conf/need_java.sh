#!/usr/bin/env bash
# Makes sure that Spark has Java 17 or newer: installs Debian's package if run by root with apt, else prints the command.
set -euo pipefail

version() { { java -version 2>&1 || true; } | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -n 1; }

found=$(version)
if [ -n "$found" ] && [ "$found" -ge 17 ]; then exit 0; fi
echo "Java 17 or newer is needed by Spark; found: ${found:-none}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends openjdk-17-jre-headless
  found=$(version)
  if [ -n "$found" ] && [ "$found" -ge 17 ]; then exit 0; fi
  echo "openjdk-17-jre-headless is installed, yet \`java\` on PATH is ${found:-missing}: put Java 17 first on PATH"
  exit 1
fi
echo "Install it and run this again, for example: sudo apt-get install openjdk-17-jre-headless"
exit 1
