#!/usr/bin/env bash
# Makes .venv-peer, an environment with mmsegmentation beside this project, for tests/test_peer.py,
# which says more, and for the comparison in scripts/benchmark_efficiency.py. It takes some minutes;
# safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
[ -x .venv-peer/bin/python ] || "$(find_python)" -m venv .venv-peer
# mmsegmentation 1.2.2, the last release, refuses mmcv 2.2; mmcv-lite has no compiled operators, of
# which ISANet needs none. mmengine imports pkg_resources, which setuptools 81 drops; mmsegmentation
# imports ftfy and regex without asking for them.
.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest \
  "mmsegmentation==1.2.2" "mmengine==0.10.7" "mmcv-lite==2.1.0" "setuptools<81" ftfy regex hypothesis
