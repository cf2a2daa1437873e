#!/usr/bin/env bash
# An environment of its own for a version of TRL, in benchmark/systems/peers/.venv-VERSION (ignored by git): its
# versions are not this project's.
#   bash benchmark/systems/peers/setup.sh 1.16.0
set -euo pipefail
cd "$(dirname "$0")"
venv=.venv-${1:?name a version of TRL}
if [ ! -f "$venv/installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet "trl==$1" torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
    touch "$venv/installed"
fi
