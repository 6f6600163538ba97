"""Windowed aggregates at spine times by an engine that users have already: one run in this process, one line of JSON.

    windows.py duckdb-join|duckdb-window|polars DIR

At every spine row: count, sum and max of one column over the past 1 hour, 1 day and 7 days, its own time excluded and
the far end exact. The time runs from before the first file is opened until the result is in memory; importing the engine
does not count.
"""

import importlib
import sys
import time

from measure import finish

WINDOWS = {"1h": "1 hour", "1d": "1 day", "7d": "7 day"}


def connect():
    import duckdb

    connection = duckdb.connect()
    connection.execute("set threads=2")
    connection.execute("set TimeZone='UTC'")
    return connection


def arrow_total(table):
    import pyarrow.compute as pc

    return table.num_rows, lambda name: pc.sum(table.column(name)).as_py() or 0


def duckdb_join(folder: str):
    inside = {name: f"filter (e.t >= s.t - interval {window})" for name, window in WINDOWS.items()}
    aggregates = ", ".join(
        f"count(e.t) {where} c{name}, sum(e.x) {where} s{name}, max(e.x) {where} m{name}"
        for name, where in inside.items()
    )
    query = f"""
        with s as (select row_number() over () rid, user_id k, event_timestamp t from '{folder}/spine.parquet'),
             e as (select user_id k, event_timestamp t, v0_f0 x from '{folder}/view0.parquet')
        select s.rid, {aggregates}
        from s left join e on s.k = e.k and e.t < s.t and e.t >= s.t - interval 7 day
        group by s.rid"""
    return arrow_total(connect().sql(query).to_arrow_table())


def duckdb_window(folder: str):
    aggregates = ", ".join(
        f"count(x) over w{name} c{name}, sum(x) over w{name} s{name}, max(x) over w{name} m{name}" for name in WINDOWS
    )
    windows = ", ".join(
        f"w{name} as (partition by k order by t range between interval {window} preceding "
        "and interval 1 microsecond preceding)"
        for name, window in WINDOWS.items()
    )
    query = f"""
        with u as (select user_id k, event_timestamp t, null::double x, true p from '{folder}/spine.parquet'
                   union all
                   select user_id, event_timestamp, v0_f0, false from '{folder}/view0.parquet')
        select * from (select k, t, p, {aggregates} from u window {windows}) where p"""
    return arrow_total(connect().sql(query).to_arrow_table())


def polars(folder: str):
    import polars as pl

    spine = pl.scan_parquet(f"{folder}/spine.parquet").select(k="user_id", t="event_timestamp")
    spine = spine.with_columns(x=pl.lit(None, pl.Float64), p=True)
    events = pl.scan_parquet(f"{folder}/view0.parquet").select(k="user_id", t="event_timestamp", x="v0_f0")
    both = pl.concat([spine, events.with_columns(p=False)]).sort("k", "t").collect()
    x = pl.col("x")
    aggregates = {"c": x.count(), "s": x.sum(), "m": x.max()}
    columns = [
        aggregate.rolling("t", period=name, closed="left").over("k").alias(f"{letter}{name}")
        for name in WINDOWS
        for letter, aggregate in aggregates.items()
    ]
    frame = both.with_columns(columns).filter("p")
    return frame.height, lambda name: frame[name].sum()


def main() -> None:
    how, folder = sys.argv[1], sys.argv[2]
    for module in ["polars"] if how == "polars" else ["duckdb", "pyarrow.compute"]:
        importlib.import_module(module)
    started = time.perf_counter()
    run = {"duckdb-join": duckdb_join, "duckdb-window": duckdb_window, "polars": polars}[how]
    rows, total = run(folder)
    seconds = time.perf_counter() - started
    finish(
        rows=rows,
        count=sum(total(f"c{name}") for name in WINDOWS),
        checksum=sum(total(f"s{name}") for name in WINDOWS),
        largest=sum(total(f"m{name}") for name in WINDOWS),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
