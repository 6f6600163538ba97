"""The as-of join of the benchmark by an engine that users have already: one run in this process, one line of JSON.

    asof.py duckdb|polars|pandas DIR VIEWS

Every spine row gets the 5 features of the newest row of its key in each table, if that is at most 7 days old. The time
runs from before the first file is opened until the result is in memory; importing the engine does not count.
"""

import importlib
import sys
import time

from measure import finish

FEATURES = 5
MAX_AGE_DAYS = 7
MODULES = {
    "duckdb": ["duckdb", "pyarrow.compute"],
    "polars": ["polars"],
    "pandas": ["pandas", "pyarrow.parquet"],
}


def duckdb(folder: str, views: int):
    import duckdb

    connection = duckdb.connect()
    connection.execute("set threads=2")
    connection.execute("set TimeZone='UTC'")
    columns = ["s.*"]
    joins = []
    for view in range(views):
        columns += [
            f"case when v{view}.event_timestamp >= s.event_timestamp - interval {MAX_AGE_DAYS} day "
            f"then v{view}.v{view}_f{feature} end as v{view}_f{feature}"
            for feature in range(FEATURES)
        ]
        joins.append(
            f"asof left join '{folder}/view{view}.parquet' v{view} "
            f"on s.user_id = v{view}.user_id and s.event_timestamp >= v{view}.event_timestamp"
        )
    query = f"select {', '.join(columns)} from '{folder}/spine.parquet' s {' '.join(joins)}"
    table = connection.sql(query).to_arrow_table()

    def total(name: str) -> float:
        import pyarrow.compute as pc

        return pc.sum(table.column(name)).as_py() or 0.0

    return table.num_rows, total


def polars(folder: str, views: int):
    import polars as pl

    spine = pl.scan_parquet(f"{folder}/spine.parquet").sort("event_timestamp")
    for view in range(views):
        rows = pl.scan_parquet(f"{folder}/view{view}.parquet").drop("created").sort("event_timestamp")
        spine = spine.join_asof(
            rows, on="event_timestamp", by="user_id", strategy="backward", tolerance=f"{MAX_AGE_DAYS}d"
        )
    frame = spine.collect()
    return frame.height, lambda name: frame[name].sum()


def pandas(folder: str, views: int):
    import pandas as pd

    frame = pd.read_parquet(f"{folder}/spine.parquet").sort_values("event_timestamp")
    for view in range(views):
        rows = pd.read_parquet(f"{folder}/view{view}.parquet").drop(columns="created").sort_values("event_timestamp")
        frame = pd.merge_asof(
            frame, rows, on="event_timestamp", by="user_id", tolerance=pd.Timedelta(days=MAX_AGE_DAYS)
        )
    return len(frame), lambda name: float(frame[name].sum())


def main() -> None:
    engine, folder, views = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for module in MODULES[engine]:
        importlib.import_module(module)
    started = time.perf_counter()
    rows, total = {"duckdb": duckdb, "polars": polars, "pandas": pandas}[engine](folder, views)
    seconds = time.perf_counter() - started
    finish(rows=rows, checksum=sum(total(f"v{view}_f0") for view in range(views)), seconds=seconds)


if __name__ == "__main__":
    main()
