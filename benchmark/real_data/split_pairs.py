"""
Split comparisons in two halves by their post, for two reward models of which one judges what the other has trained.

    python benchmark/real_data/split_pairs.py TLDR_DIR/comparisons runs/real/day-test-seed44413/pairs [NUMBER]

Writes OUTPUT/reward/ and OUTPUT/judge_model/, each with one half of the train split (at most NUMBER pairs of it) and
the whole of the others.
"""

import re
import shutil
import sys
import zlib
from pathlib import Path

import pyarrow.parquet as pq

HALVES = ("reward", "judge_model")


def main():
    if len(sys.argv) not in (3, 4) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    source, output = map(Path, sys.argv[1:3])
    number_of_pairs = int(sys.argv[3]) if len(sys.argv) == 4 else None
    table = pq.read_table(source / "train.parquet")
    # A digest of the post's words: the same half in every run, whatever the order of the rows. Not of the id, since
    # some posts have two. News articles have no post.
    texts = [info["post"] or info["id"] for info in table["info"].to_pylist()]
    half = [zlib.crc32(re.sub(r"\W+", " ", text.lower()).strip().encode()) % 2 for text in texts]
    for number, name in enumerate(HALVES):
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        chosen = table.filter([value == number for value in half])[:number_of_pairs]
        pq.write_table(chosen, folder / "train.parquet")
        for split in ("validation", "test"):
            shutil.copyfile(source / f"{split}.parquet", folder / f"{split}.parquet")
        print(f"{folder}: {len(chosen):,} of {len(half):,} pairs")


if __name__ == "__main__":
    main()
