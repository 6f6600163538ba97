"""Compares every cell of our answer with what DuckDB makes of the same files.

    check.py as-of|as-of-created|windows|windows-hops DIR ANSWER

ANSWER is what `bench run --out` wrote for one view. As-of answers and counts and maxima of windows must be equal, sums
(which DuckDB rounds as it goes) nearly so. Where two rows of one key have the same time, DuckDB's as-of join takes
either: such spine rows are left out, and counted.
"""

import sys

import duckdb

FEATURES = [f"v0_f{feature}" for feature in range(5)]
HOUR = 3_600_000_000
DAY = 24 * HOUR
# Name, length and default hop, in microseconds.
WINDOWS = [("1h", HOUR, HOUR // 12), ("1d", DAY, HOUR), ("7d", 7 * DAY, HOUR)]
SUM_TOLERANCE = 1e-12


def as_of(folder: str) -> str:
    features = ", ".join(f"case when v.t >= s.t - {7 * DAY} then v.{name} end as {name}" for name in FEATURES)
    return f"""
        select s.rid, {features},
               exists (select 1 from v d where d.k = s.k and d.t = v.t group by d.k having count(*) > 1) as tied
        from s asof left join v on s.k = v.k and s.t >= v.t"""


def as_of_created(folder: str) -> str:
    features = ", ".join(f"arg_max(v.{name}, v.t) as {name}" for name in FEATURES)
    return f"""
        select s.rid, {features}, count(v.t) filter (v.t = w.t) > 1 as tied
        from s
        left join (select s.rid, max(v.t) t from s join v on {SEEN} group by s.rid) w on w.rid = s.rid
        left join v on {SEEN}
        group by s.rid"""


SEEN = f"s.k = v.k and v.t <= s.t and v.created <= s.t and v.t >= s.t - {7 * DAY}"


def windows(hops: bool) -> str:
    columns = []
    for name, length, hop in WINDOWS:
        tail = f"(s.t - {length})" + (f" - (s.t - {length}) % {hop}" if hops else "")
        inside = f"filter (v.t >= {tail})"
        columns += [
            f"count(v.t) {inside} as count_{name}",
            f"fsum(v.v0_f0) {inside} as sum_{name}",
            f"max(v.v0_f0) {inside} as max_{name}",
        ]
    oldest = 7 * DAY + HOUR
    return f"""
        select s.rid, {", ".join(columns)}, false as tied
        from s left join v on s.k = v.k and v.t < s.t and v.t >= s.t - {oldest}
        group by s.rid"""


def main() -> None:
    what, folder, answer = sys.argv[1:4]
    connection = duckdb.connect()
    connection.execute("set TimeZone='UTC'")
    connection.execute(f"""
        create temp view s as
        select file_row_number rid, user_id k, epoch_us(event_timestamp) t
        from read_parquet('{folder}/spine.parquet', file_row_number = true)""")
    connection.execute(f"""
        create temp view v as
        select user_id k, epoch_us(event_timestamp) t, epoch_us(created) created, {", ".join(FEATURES)}
        from '{folder}/view0.parquet'""")
    windowed = what.startswith("windows")
    if windowed:
        query = windows(hops=what == "windows-hops")
        names = [f"{function}_{window}" for window, _, _ in WINDOWS for function in ("count", "sum", "max")]
    else:
        query = {"as-of": as_of, "as-of-created": as_of_created}[what](folder)
        names = FEATURES
    connection.execute(f"create temp table theirs as {query}")
    answers = ", ".join(f'"view0:{name}" {name}' for name in names)
    connection.execute(f"""
        create temp table ours as
        select file_row_number rid, user_id k, epoch_us(event_timestamp) t, {answers}
        from read_parquet('{answer}', file_row_number = true)""")

    rows, tied = connection.execute("select count(*), count(*) filter (tied) from theirs").fetchone()
    misplaced = connection.execute(
        "select count(*) from s full join ours on s.rid = ours.rid and s.k = ours.k and s.t = ours.t "
        "where s.rid is null or ours.rid is null"
    ).fetchone()[0]
    if misplaced:
        sys.exit(f"error: {misplaced} rows of the spine are missing from the answer, or are not in their place")
    differing = 0
    for name in names:
        if name.startswith("sum_"):
            # An empty window has no sum on either side.
            differs = (
                f"(ours.{name} is null) <> (theirs.{name} is null) "
                f"or abs(ours.{name} - theirs.{name}) > {SUM_TOLERANCE} * abs(theirs.{name})"
            )
        else:
            differs = f"ours.{name} is distinct from theirs.{name}"
        found = connection.execute(
            f"select ours.rid, ours.{name}, theirs.{name} from ours join theirs using (rid) "
            f"where not tied and ({differs}) order by rid"
        ).fetchall()
        differing += len(found)
        for rid, mine, other in found[:3]:
            print(f"row {rid}, {name}: ours {mine!r}, DuckDB {other!r}", file=sys.stderr)
    if differing:
        sys.exit(f"error: {differing} cells of {rows * len(names)} differ from DuckDB ({what})")
    print(f"{what}: {(rows - tied) * len(names)} cells equal DuckDB's; {tied} spine rows with ties left out")


if __name__ == "__main__":
    main()
