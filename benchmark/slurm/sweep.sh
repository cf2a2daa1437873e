#!/usr/bin/env bash
# Submits the chains of several sizes, each over the paper's four seeds: the whole table of the paper.
#
#   bash benchmark/slurm/sweep.sh               # 1b, 2.8b and 6.9b: nine arrays of four jobs
#   bash benchmark/slurm/sweep.sh 1b 2.8b
#
# The variables are those of chain.sh.
set -euo pipefail
[ $# -gt 0 ] || set -- 1b 2.8b 6.9b
for size in "$@"; do
  echo "== $size"
  bash "$(dirname "$0")/chain.sh" "$size" all
done
