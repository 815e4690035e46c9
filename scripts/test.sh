#!/usr/bin/env bash
# Installs the project with its development tools into .venv, then checks and tests it.
# Arguments are passed on to pytest: scripts/test.sh -k attention. Tests on real files run where the
# environment variable ISANET_TEST_DATA names a folder with data/camvid and weights/*.pth.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv ".[dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One process a core, one thread each: threads of several test processes would only get in each
# other's way.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal "$@"
