#!/usr/bin/env bash
# Set up .venv, if it is not there, and run the tests:  bash tests/run.sh [pytest arguments]
# Real TL;DR data in the folder that TLDR_DIR names is used where it is given; tests that need it say so if it is not.
set -euo pipefail
. "$(dirname "$0")/../benchmark/setup.sh"
exec python -m pytest tests -q -rs --durations=15 -n 2 --dist loadfile --no-loadscope-reorder "$@"
