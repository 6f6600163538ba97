"""Whatever callers hold becomes the same Arrow columns, by the same rules for spines, requests and events."""

import datetime as dt
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from coeval import errors
from coeval.tables import BATCH_BYTES_MAX, BATCH_ROWS_MAX, to_array, to_batches, to_microseconds, to_table
from coeval.types import TIMESTAMP

pandas = pytest.importorskip("pandas")
NAN = float("nan")


def check(values, arrow, expected):
    array = to_array("c", values, arrow)
    if arrow is not None:
        assert array.type == arrow
    found = array.to_pylist()
    if array.type == TIMESTAMP:
        assert found == expected
        return
    assert [repr(value) for value in found] == [repr(value) for value in expected]


def test_nulls_and_nans_of_strings():
    for missing in (None, NAN, pandas.NA, np.float64("nan")):
        check(["a", missing], pa.string(), ["a", None])
        check(["a", missing], None, ["a", None])
        check(pandas.Series(["a", missing], dtype=object), pa.string(), ["a", None])
    check(pandas.Series(["a", None], dtype="string"), pa.string(), ["a", None])
    check(pandas.Series(["a", None]), pa.string(), ["a", None])
    check(pandas.Series(["a", None], dtype="category"), pa.string(), ["a", None])
    check(np.array(["a", "b"]), pa.string(), ["a", "b"])


def test_nulls_and_nans_of_floats():
    check([1, NAN, None, pandas.NA], pa.float64(), [1.0, NAN, None, None])
    check([1.5, NAN, None], None, [1.5, NAN, None])
    check(np.array([1.0, NAN]), pa.float64(), [1.0, NAN])
    check(pandas.Series([1.0, NAN]), pa.float64(), [1.0, NAN])
    check(pandas.Series([1.0, None], dtype="Float64"), pa.float64(), [1.0, None])
    check(pandas.Series([1.0, NAN, None], dtype=object), pa.float64(), [1.0, NAN, None])
    check(pa.array([1.0, NAN, None]), pa.float64(), [1.0, NAN, None])
    check([1, 2], pa.float64(), [1.0, 2.0])


def test_integers():
    check(pandas.Series([1.0, NAN]), pa.int64(), [1, None])
    check([1, 2.0, None, NAN], pa.int64(), [1, 2, None, None])
    check(pandas.Series([1, None], dtype="Int64"), pa.int64(), [1, None])
    check(np.array([1, 2], dtype=np.uint8), None, [1, 2])
    with pytest.raises(errors.InvalidArgument, match="column `c`"):
        to_array("c", [1.5], pa.int64())
    with pytest.raises(errors.InvalidArgument, match="column `c`"):
        to_array("c", np.array([1.5]), pa.int64())
    with pytest.raises(errors.InvalidArgument, match="column `c`"):
        to_array("c", [2**40], pa.int32())


def test_times():
    utc = dt.datetime(2013, 7, 1, 12, 0, tzinfo=dt.timezone.utc)
    new_york = utc.astimezone(ZoneInfo("America/New_York"))
    naive = utc.replace(tzinfo=None)
    nanoseconds = pandas.Timestamp("2013-07-01T12:00:00.000000999")
    check([utc, new_york, naive, nanoseconds, None, pandas.NaT], TIMESTAMP, [utc, utc, utc, utc, None, None])
    check([new_york], None, [utc])
    check(np.array(["2013-07-01T12", "NaT"], dtype="datetime64[h]"), TIMESTAMP, [utc, None])
    for unit in ("s", "ms", "us", "ns"):
        series = pandas.Series(pandas.to_datetime([naive, None])).astype(f"datetime64[{unit}]")
        check(series, TIMESTAMP, [utc, None])
        check(series, None, [utc, None])
        check(series.dt.tz_localize("UTC").dt.tz_convert("America/New_York"), TIMESTAMP, [utc, None])
        check(pa.array([naive, None], type=pa.timestamp(unit)), TIMESTAMP, [utc, None])
    # Toward the past, also before 1970.
    check(pa.array([-1], type=pa.timestamp("ns")), TIMESTAMP, [dt.datetime(1969, 12, 31, 23, 59, 59, 999999, dt.timezone.utc)])
    check([np.datetime64(-1, "ns")], TIMESTAMP, [dt.datetime(1969, 12, 31, 23, 59, 59, 999999, dt.timezone.utc)])
    check([pandas.Timestamp(-1)], TIMESTAMP, [dt.datetime(1969, 12, 31, 23, 59, 59, 999999, dt.timezone.utc)])
    with pytest.raises(errors.InvalidArgument, match="expected a time"):
        to_array("c", ["noon"], TIMESTAMP)


def test_repeated_hour_of_a_daylight_saving_night():
    zone = ZoneInfo("America/New_York")
    first = dt.datetime(2013, 11, 3, 1, 30, tzinfo=zone, fold=0)
    second = dt.datetime(2013, 11, 3, 1, 30, tzinfo=zone, fold=1)
    hours = np.diff(to_array("c", [first, second], TIMESTAMP).cast(pa.int64()).to_numpy()) / 3.6e9
    assert hours.tolist() == [1.0]


def test_strings_are_not_made_of_numbers():
    with pytest.raises(errors.InvalidArgument, match="column `tailnum`"):
        to_table({"tailnum": [1, 2]}, {"tailnum": pa.string()})
    with pytest.raises(errors.InvalidArgument, match="column `tailnum`"):
        to_table({"tailnum": np.array([1, 2])}, {"tailnum": pa.string()})


def test_other_types():
    check([b"a", None], pa.binary(), [b"a", None])
    check([True, None], pa.bool_(), [True, None])
    check([Decimal("1.5"), None], pa.decimal128(10, 2), [Decimal("1.50"), None])
    check([[1.0, 2.0], None], pa.list_(pa.float32(), 2), [[1.0, 2.0], None])
    check(np.array([[1.0, 2.0]]), pa.list_(pa.float64()), [[1.0, 2.0]])
    check([dt.date(2013, 7, 1)], pa.date32(), [dt.date(2013, 7, 1)])


def test_tables_from_everything():
    expected = pa.table({"k": pa.array(["a", "b"]), "t": pa.array([0, 1], type=TIMESTAMP)})
    types = {"t": TIMESTAMP}
    assert to_table({"k": ["a", "b"], "t": [0, 1]}, types) == expected
    assert to_table(expected) == expected
    assert to_table(expected.to_batches()[0]) == expected
    assert to_table(expected.to_reader()) == expected
    assert to_table(expected.to_pandas()) == expected
    assert to_table(expected.to_pandas().set_index("k", drop=False)) == expected


def test_tables_from_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    expected = pa.table({"k": pa.array(["a", None]), "x": pa.array([1.5, NAN])})
    frame = polars.DataFrame({"k": ["a", None], "x": [1.5, NAN]})
    for rows in (frame, frame.lazy()):
        assert to_table(rows).schema == expected.schema
        assert repr(to_table(rows).to_pylist()) == repr(expected.to_pylist())
    assert to_array("c", frame["k"], pa.string()).to_pylist() == ["a", None]


def test_bad_rows():
    with pytest.raises(errors.InvalidArgument, match="differ in length: `a` 1, `b` 2"):
        to_table({"a": [1], "b": [1, 2]})
    with pytest.raises(errors.InvalidArgument, match="rows of type `int`"):
        to_table(3)
    with pytest.raises(errors.InvalidArgument, match="column `a`: a column is a list"):
        to_table({"a": "JFK"})


def test_batches_are_bounded():
    table = pa.table({"x": np.arange(3 * BATCH_ROWS_MAX), "s": ["x" * 200] * (3 * BATCH_ROWS_MAX)})
    for rows in (table, table.to_reader()):
        schema, batches = to_batches(rows)
        batches = list(batches)
        assert all(b.num_rows <= BATCH_ROWS_MAX and b.nbytes <= 1.1 * BATCH_BYTES_MAX for b in batches)
        assert pa.Table.from_batches(batches, schema=schema) == table


def test_a_reader_is_read_as_it_is_sent():
    read = []

    def source():
        for i in range(3):
            read.append(i)
            yield pa.record_batch({"t": pa.array([i], type=pa.timestamp("ns"))})

    reader = pa.RecordBatchReader.from_batches(pa.schema([("t", pa.timestamp("ns"))]), source())
    schema, batches = to_batches(reader)
    assert schema.field("t").type == TIMESTAMP
    assert len(read) == 0
    next(batches)
    assert len(read) == 1
    assert sum(batch.num_rows for batch in batches) == 2


def test_at():
    noon = dt.datetime(2013, 7, 1, 12, tzinfo=dt.timezone.utc)
    micros = int(noon.timestamp() * 1_000_000)
    assert to_microseconds(noon, 2) == [micros, micros]
    assert to_microseconds("2013-07-01T12:00:00+00:00", 1) == [micros]
    assert to_microseconds([noon, noon.replace(tzinfo=None)], 2) == [micros, micros]
    assert to_microseconds(pandas.Series([noon]), 1) == [micros]
    with pytest.raises(errors.InvalidArgument, match="1 times for 2 rows"):
        to_microseconds([noon], 2)
    with pytest.raises(errors.InvalidArgument, match="null"):
        to_microseconds([None], 1)
