"""
Split comparisons in two halves by their post, for two reward models of which one judges what the other has trained.

    python benchmark/real_data/split_pairs.py TLDR_DIR/comparisons runs/real/day-test-seed44413/pairs

Writes OUTPUT/reward/ and OUTPUT/judge_model/, each with one half of the train split and the whole of the others.
"""

import shutil
import sys
import zlib
from pathlib import Path

import pyarrow.parquet as pq

HALVES = ("reward", "judge_model")


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    source, output = map(Path, sys.argv[1:])
    table = pq.read_table(source / "train.parquet")
    # A digest of the id: the same half in every run, whatever the order of the rows.
    half = [zlib.crc32(info["id"].encode()) % 2 for info in table["info"].to_pylist()]
    for number, name in enumerate(HALVES):
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter([value == number for value in half]), folder / "train.parquet")
        for split in ("validation", "test"):
            shutil.copy(source / f"{split}.parquet", folder)
        print(f"{folder}: {half.count(number):,} of {len(half):,} pairs")


if __name__ == "__main__":
    main()
