"""Writes what the benchmarks read: a spine and feature tables as Parquet.

    generate.py SPINE_ROWS VIEW_ROWS KEYS VIEWS DIR [--variant plain|late|hot]

A feature table has 5 float64 features, `user_id`, `event_timestamp` in order of time over 31 days, and `created`. The
spine has `user_id`, `event_timestamp` over the last 30 of those days, and `label`. Keys are uniform. The same arguments
give the same values on every machine.

- plain: `created` follows the event by up to an hour, for every row.
- late:  `created` is the event time, but for 10 % of the rows, which become known up to a day later.
- hot:   30 % of all rows, of the spine and of every table, are moved to key 0.

The keys, times and features of `late`, and the times and features of `hot`, are those of `plain`.

A folder appears whole or not at all; one that is there already with these arguments is left alone.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = 5
DAY = 86_400_000_000
HOUR = 3_600_000_000
START = 1_700_000_000_000_000
SPAN = 30 * DAY
ROW_GROUP = 1_000_000
# Random numbers hardly compress: about what the columns of one row take, with a margin.
SPINE_ROW_BYTES = 28
VIEW_ROW_BYTES = 72
LATE_SHARE = 0.1
HOT_SHARE = 0.3
HOT_KEY = 0


def utc(times: np.ndarray) -> pa.Array:
    return pa.array(times, pa.timestamp("us", "UTC"))


def write(folder: Path, spine_rows: int, view_rows: int, keys: int, views: int, variant: str) -> None:
    # What a variant changes is drawn apart, so that everything else is the same in all of them.
    rng = np.random.default_rng(7)
    changes = np.random.default_rng(8)

    def keys_of(rows: int) -> np.ndarray:
        drawn = rng.integers(0, keys, rows)
        if variant == "hot":
            drawn[changes.random(rows) < HOT_SHARE] = HOT_KEY
        return drawn

    key = keys_of(spine_rows)
    time = START + rng.integers(0, SPAN, spine_rows)
    spine = {"user_id": key, "event_timestamp": utc(time), "label": rng.random(spine_rows)}
    pq.write_table(pa.table(spine), folder / "spine.parquet")
    for view in range(views):
        key = keys_of(view_rows)
        time = np.sort(START - DAY + rng.integers(0, SPAN + DAY, view_rows))
        created = time + rng.integers(0, HOUR, view_rows)
        if variant == "late":
            late = changes.random(view_rows) < LATE_SHARE
            created = time + np.where(late, changes.integers(1, DAY, view_rows), 0)
        table = {"user_id": key, "event_timestamp": utc(time), "created": utc(created)}
        for feature in range(FEATURES):
            table[f"v{view}_f{feature}"] = rng.random(view_rows)
        pq.write_table(pa.table(table), folder / f"view{view}.parquet", row_group_size=ROW_GROUP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spine_rows", type=int)
    parser.add_argument("view_rows", type=int)
    parser.add_argument("keys", type=int)
    parser.add_argument("views", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=["plain", "late", "hot"], default="plain")
    args = parser.parse_args()
    asked = {name: value for name, value in vars(args).items() if name != "folder"}
    done = args.folder / "generated.json"
    if done.exists() and json.loads(done.read_text()) == asked:
        return
    wanted = args.spine_rows * SPINE_ROW_BYTES + args.views * args.view_rows * VIEW_ROW_BYTES
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    # Whatever is there has other contents, so it goes first and its room counts.
    shutil.rmtree(args.folder, ignore_errors=True)
    free = shutil.disk_usage(args.folder.parent).free
    if wanted > 0.9 * free:
        sys.exit(
            f"error: {args.folder} would take about {wanted / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "free some, or point COEVAL_BENCH at a larger disk"
        )
    print(f"writing {args.folder}, about {wanted / 1e9:.2f} GB", file=sys.stderr, flush=True)
    building = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    write(building, args.spine_rows, args.view_rows, args.keys, args.views, args.variant)
    (building / done.name).write_text(json.dumps(asked) + "\n")
    building.rename(args.folder)


if __name__ == "__main__":
    main()
