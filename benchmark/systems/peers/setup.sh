#!/usr/bin/env bash
# An environment of its own for TRL, in benchmark/systems/peers/.venv (ignored by git): its versions are not this project's.
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -f .venv/installed ]; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet -r requirements.txt
    touch .venv/installed
fi
