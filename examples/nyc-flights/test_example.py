"""What the demo's verdict rests on: an audit that sees single bits, an AUC that counts ties, clocks that are right."""

import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import demo_rollout
import prepare
import replay
import train


def float64(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


@pytest.mark.parametrize(
    ("served", "offline", "differs"),
    [
        (1.5, 1.5, False),
        (0.1 + 0.2, 0.3, True),
        (0.0, -0.0, True),
        (None, None, False),
        (None, 0.0, True),
        (0.0, None, True),
        (float("nan"), float("nan"), False),
        (float("nan"), None, True),
        (float64(0x7FF8000000000000), float64(0x7FF8000000000001), True),
    ],
)
def test_the_audit_sees_bits(served, offline, differs):
    pair = [pa.chunked_array([pa.array([7.0], pa.float64()), pa.array([value], pa.float64())]) for value in (served, offline)]
    assert replay.differing(*pair).tolist() == [False, differs]


@pytest.mark.parametrize(
    ("arrow", "one", "other"),
    [(pa.string(), "a", "A"), (pa.int64(), 1, 2), (pa.bool_(), True, False), (prepare.TIMESTAMP, 1, 2), (pa.float32(), 0.0, -0.0)],
)
def test_the_audit_of_other_types(arrow, one, other):
    served, offline = pa.chunked_array([[one, one, None, None]], type=arrow), pa.chunked_array([[one, other, None, one]], type=arrow)
    assert replay.differing(served, offline).tolist() == [False, True, False, True]


def test_the_audit_counts_statuses_and_types():
    rows = pa.table({c: ["x"] for c in ("event_timestamp", "origin", "dest", "tailnum", "carrier", "flight")})
    served = pa.table({"v:f": [1.0], "v:f__status": pa.array([1], pa.int8())})
    other_status = pa.table({"v:f": [1.0], "v:f__status": pa.array([4], pa.int8())})
    other_type = pa.table({"v:f": pa.array([1.0], pa.float32()), "v:f__status": pa.array([1], pa.int8())})
    for offline, mismatched in ((served, 0), (other_status, 1), (other_type, 1)):
        found = replay.audit(served, offline, rows, "GetFeatures")
        assert (found.compared, found.mismatched, len(found.examples)) == (1, mismatched, mismatched)
    with pytest.raises(SystemExit, match="does not know it"):
        replay.audit(served, pa.table({"other": [1]}), rows, "GetFeatures")


@pytest.mark.parametrize(
    ("score", "late", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
    ],
)
def test_auc(score, late, expected):
    assert train.auc(np.array(score, dtype=np.float32), np.array(late, dtype=bool)) == expected


def check_landing(departed: str, zone: str, arr_time: float, air_time: float | None, landed: str) -> None:
    flights = pd.DataFrame({"arr_time": [arr_time], "air_time": [air_time], "distance": [1000.0]}, dtype="float64")
    left = pd.Series(pd.to_datetime([departed], utc=True)).astype("datetime64[us, UTC]")
    found = prepare.landed_utc(flights, left, pd.Series([zone]))
    assert found[0] == pd.Timestamp(landed, tz="UTC")


def test_landings():
    # The same day, three hours behind; over midnight; into midnight itself, which the table writes as 2400.
    check_landing("2013-07-01T12:00", "America/Los_Angeles", 1100, 330, "2013-07-01T18:00")
    check_landing("2013-07-02T02:00", "America/New_York", 30, 130, "2013-07-02T04:30")
    check_landing("2013-07-02T02:00", "America/New_York", 2400, 100, "2013-07-02T04:00")
    # On the night that repeats an hour, the reading nearer to the time in the air.
    check_landing("2013-11-03T04:00", "America/New_York", 130, 60, "2013-11-03T05:30")
    check_landing("2013-11-03T04:00", "America/New_York", 130, 120, "2013-11-03T06:30")
    # In the hour that a spring night skips: the first moment after it.
    check_landing("2013-03-10T05:00", "America/New_York", 230, 90, "2013-03-10T07:00")
    # Diverted: no time in the air, but an arrival.
    check_landing("2013-07-01T12:00", "America/Chicago", 1800, None, "2013-07-01T23:00")


def test_scheduled_times_over_daylight_saving():
    days = {"year": [2013] * 3, "month": [3, 3, 11], "day": [9, 10, 3], "sched_dep_time": [600, 600, 600]}
    hours = ["2013-03-09T11:00:00Z", "2013-03-10T10:00:00Z", "2013-11-03T11:00:00Z"]
    _, utc = prepare.scheduled_utc(pd.DataFrame({**days, "time_hour": hours}))
    assert utc.tolist() == [pd.Timestamp(hour) for hour in hours]


def test_an_archive_in_celsius(tmp_path):
    hours = [pd.Timestamp("2013-07-09", tz="UTC") + pd.Timedelta(hours=n) for n in range(3)]
    table = pa.table({"origin": ["JFK"] * 3, "observed_at": pa.array(hours, prepare.TIMESTAMP), "temp": [32.0, 212.0, None]})
    folder = tmp_path / "data" / "weather"
    folder.mkdir(parents=True)
    demo_rollout.Archive.write(table, folder / "2013-07.parquet")
    archive = demo_rollout.Archive(tmp_path)
    micros = [int(hour.timestamp() * 1e6) for hour in hours]

    def temps():
        return demo_rollout.pq.read_table(archive.july).column("temp").to_pylist()

    archive.publish(micros[2])
    assert temps() == [32.0, 212.0, None], "nothing is rewritten before it begins"
    archive.since = micros[0]
    archive.publish(micros[1])
    assert temps() == [0.0, 212.0, None], "what is newer is as it was measured"
    archive.publish(micros[2])
    assert temps() == [0.0, 100.0, None]
    assert demo_rollout.pq.read_table(archive.july).column("observed_at").to_pylist() == hours
