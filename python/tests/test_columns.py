"""Columns survive the wire value for value, null for null, bit for bit."""

import struct
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from coeval import errors
from coeval._generated import types_pb2
from coeval.columns import from_column, to_column
from coeval.types import TIMESTAMP


def over_the_wire(array: pa.Array) -> pa.Array:
    sent = to_column("c", array).SerializeToString()
    return from_column(types_pb2.Column.FromString(sent), rows=len(array))


def check(values: list, arrow: pa.DataType) -> None:
    """The array, a slice of it, all of it null, and none of it."""
    array = pa.array(values, type=arrow)
    for case in (array, array.slice(1), array.slice(1, 1), pa.nulls(3, arrow), array.slice(0, 0)):
        back = over_the_wire(case)
        assert back.type == arrow
        assert back.to_pylist() == case.to_pylist()
        back.validate(full=True)


@pytest.mark.parametrize(
    ("values", "arrow"),
    [
        ([True, None, False, True], pa.bool_()),
        ([1, None, -(2**31), 2**31 - 1], pa.int32()),
        ([1, None, -(2**63), 2**63 - 1], pa.int64()),
        ([0.5, None, float("inf"), -0.0], pa.float32()),
        ([0.1, None, float("-inf"), 5e-324], pa.float64()),
        (["", None, "naïve", "🛫"], pa.string()),
        ([b"", None, b"\x00\xff"], pa.binary()),
        ([0, None, -1, 1373000000000001], TIMESTAMP),
        ([0, None, -1, 15000], pa.date32()),
        ([Decimal("1.23"), None, Decimal("-99999999999999999999.99"), Decimal("0.00")], pa.decimal128(22, 2)),
        ([Decimal("12300"), None, Decimal("-100")], pa.decimal128(10, -2)),
        ([[1.5], None, [], [None, 2.0]], pa.list_(pa.float64())),
        ([["a"], None, [], ["b", None]], pa.list_(pa.string())),
        ([[[1], []], None, [], [None, [2, 3]]], pa.list_(pa.list_(pa.int64()))),
        ([[("a", 1)], None, [], [("a", None), ("b", 2)]], pa.map_(pa.string(), pa.int64())),
        ([{"a": 1, "b": "x"}, None, {"a": None, "b": None}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([{"a": [1]}, None, {"a": None}, {"a": []}], pa.struct([("a", pa.list_(pa.int32()))])),
        ([[1.0, 2.0], None, [-0.0, 3.5]], pa.list_(pa.float32(), 2)),
    ],
    ids=lambda case: str(case) if isinstance(case, pa.DataType) else "",
)
def test_round_trip(values, arrow):
    check(values, arrow)


@pytest.mark.parametrize("bits", [0x7FF8000000000000, 0xFFF8000000000000, 0x7FF80000DEADBEEF, 0x8000000000000000])
def test_float64_bits(bits):
    array = pa.Array.from_buffers(pa.float64(), 1, [None, pa.py_buffer(struct.pack("<Q", bits))])
    assert over_the_wire(array).buffers()[1].to_pybytes() == struct.pack("<Q", bits)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FC0BEEF, 0x80000000])
def test_float32_bits(bits):
    array = pa.Array.from_buffers(pa.float32(), 1, [None, pa.py_buffer(struct.pack("<I", bits))])
    assert over_the_wire(array).buffers()[1].to_pybytes()[:4] == struct.pack("<I", bits)


def test_nan_is_not_null():
    back = over_the_wire(pa.array([float("nan"), None], type=pa.float64()))
    assert back.null_count == 1
    assert np.isnan(back[0].as_py())


def test_what_lies_under_a_null_does_not_travel():
    hidden = pa.array([1, 2, 3], type=pa.int64())
    masked = pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(b"\x05"), hidden.buffers()[1]])
    assert list(to_column("c", masked).int64s.values) == [1, 0, 3]


def test_validity_bits():
    column = to_column("c", pa.array([1, None, 3, None, 5, 6, 7, 8, None], type=pa.int32()))
    assert column.validity == bytes([0b11110101, 0b0])
    assert to_column("c", pa.array([1, 2])).validity == b""


def test_decimals_are_big_endian_twos_complement():
    column = to_column("c", pa.array([Decimal("-0.01"), Decimal("2.56")], type=pa.decimal128(5, 2)))
    assert column.decimals.unscaled == b"\xff" * 16 + b"\x00" * 14 + b"\x01\x00"


def test_other_arrow_types_become_ours():
    assert to_column("c", pa.array([1], type=pa.uint16())).WhichOneof("values") == "int32s"
    assert to_column("c", pa.array(["a"]).dictionary_encode()).strings.values[:] == ["a"]
    assert to_column("c", pa.array(["a"], type=pa.large_string())).strings.values[:] == ["a"]
    assert to_column("c", pa.array([5], type=pa.timestamp("ms"))).timestamps.microseconds[:] == [5000]
    assert to_column("c", pa.chunked_array([[1, 2], [3]])).int64s.values[:] == [1, 2, 3]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (types_pb2.Column(name="c", int64s=types_pb2.Int64Values(values=[1, 2, 3])), "3 values where 2 rows"),
        (types_pb2.Column(name="c", validity=b"\x01"), "carries none"),
        (
            types_pb2.Column(name="c", validity=b"\x01", int64s=types_pb2.Int64Values(values=range(9))),
            "validity of 1 bytes",
        ),
        (types_pb2.Column(name="c", decimals=types_pb2.DecimalValues(unscaled=b"123")), "16 bytes each"),
    ],
)
def test_malformed_columns_are_told_apart(column, message):
    with pytest.raises(errors.CoevalError, match=message):
        from_column(column, rows=2)


def test_a_null_element_of_a_vector_is_refused():
    with pytest.raises(errors.InvalidArgument, match="element of a vector"):
        to_column("c", pa.array([[1.0, None]], type=pa.list_(pa.float32(), 2)))


def test_a_column_without_values_is_nulls_of_the_declared_type():
    array = from_column(types_pb2.Column(name="c"), pa.float64(), rows=2)
    assert array.type == pa.float64()
    assert array.null_count == 2
