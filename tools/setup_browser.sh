#!/usr/bin/env bash
# Installs what the tests of the viewer's page (tests/browser) need: the Python package playwright (50 MB) into .venv,
# and a browser, unless there is one: Debian's or Ubuntu's chromium with apt-get, which asks for root.
#
#   tools/setup_browser.sh
#
# Nothing else needs them; without them those tests are skipped. MEGATRON_LASER_BROWSER=/path/to/chrome names a browser.
#
#   PYTHON=...  the interpreter to install into (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

playwright=1.65.2

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
'') ;;
*)
  echo "setup_browser: unknown argument '$1'; see --help" >&2
  exit 2
  ;;
esac
fail() {
  printf 'setup_browser: %s\n' "$*" >&2
  exit 1
}
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || fail "no $python: run tools/setup_env.sh first, or name an interpreter: PYTHON=/path/to/python3"

found=${MEGATRON_LASER_BROWSER:-}
for name in chromium chromium-browser google-chrome google-chrome-stable; do
  found=${found:-$(command -v "$name" || true)}
done
if [ -z "$found" ]; then
  command -v apt-get >/dev/null || fail "no browser and no apt-get: install Chromium or Chrome, or name one in MEGATRON_LASER_BROWSER"
  sudo=
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "no browser: as root, run apt-get install --no-install-recommends chromium"
    sudo=sudo
  fi
  $sudo apt-get update -q
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium
  found=$(command -v chromium) || fail "apt-get has installed no chromium"
fi
# The package brings its own driver; of the browsers that it could download, none is needed.
"$python" -m pip install -q --disable-pip-version-check "playwright==$playwright" || fail "pip could not install playwright $playwright"
"$python" - "$found" <<'PYTHON'
import sys

from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
    print(f"{sys.argv[1]}: {browser.version}")
    browser.close()
PYTHON
echo "now: .venv/bin/python -m pytest tests/browser"
