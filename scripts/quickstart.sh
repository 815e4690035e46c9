#!/usr/bin/env bash
# Installs the project into .venv and trains ISANet on the synthetic task: 1 to 4 minutes on two
# cores after the installation. Arguments are passed on: scripts/quickstart.sh --name mine
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv .
.venv/bin/isanet-pl fit --config configs/quickstart.yaml "$@"
