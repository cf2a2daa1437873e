"""
Run a command with its output in a log, and append what it cost to a file: seconds, processor seconds, peak memory.
An attempt that is killed together with this process leaves no line.

    python benchmark/real_data/timed.py COST.jsonl LOG COMMAND...
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import Jobs  # noqa: E402


def main():
    cost, log, *command = sys.argv[1:]
    jobs = Jobs()
    code = jobs.run(command, log)
    with open(cost, "a", encoding="utf-8") as file:
        file.write(json.dumps(jobs.cost[log]) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
