#!/usr/bin/env bash
# Makes sure that the tests of pages have Chromium: installs Debian's package if run by root with apt, else prints the command.
# The tests skip without it, so this script never fails.
set -uo pipefail

has_chromium() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null; }

if has_chromium; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1
fi
if ! has_chromium; then
  echo "The tests of pages are skipped without Chromium. Install it, for example: sudo apt-get install chromium"
fi
exit 0
