#!/usr/bin/env bash
# Model sizes x seeds through SFT, reward model and PPO; over-optimisation; tables and pictures of both.
#
#   bash benchmark/scaling.sh                      # benchmark/README.md says how long; resumable at any moment
#   bash benchmark/scaling.sh --smoke              # a tiny version of everything
#   bash benchmark/scaling.sh --dry_run            # what is left to do, and about how long it will take
#   bash benchmark/scaling.sh sizes plot           # without over-optimisation
#   SPLIT=validation bash benchmark/scaling.sh     # while settings are being chosen: the test split is read once
#
# All flags are those of benchmark/scaling.py, whose header says what the parts are and what they leave behind.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
split=()
[ -z "${SPLIT:-}" ] || split=(--split "$SPLIT")
exec python benchmark/scaling.py ${split[@]+"${split[@]}"} "$@"
