"""Types by their text, and errors by their status."""

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from coeval import errors
from coeval.types import TIMESTAMP, canonical_type, parse_type, type_text


@pytest.mark.parametrize(
    ("text", "arrow"),
    [
        ("bool", pa.bool_()),
        ("int32", pa.int32()),
        ("float32", pa.float32()),
        ("timestamp", TIMESTAMP),
        ("date", pa.date32()),
        ("decimal(18,2)", pa.decimal128(18, 2)),
        ("decimal(10,-2)", pa.decimal128(10, -2)),
        ("list<float64>", pa.list_(pa.float64())),
        ("list<list<string>>", pa.list_(pa.list_(pa.string()))),
        ("map<string,float64>", pa.map_(pa.string(), pa.float64())),
        ("struct<a:int64,b:list<string>>", pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))])),
        ("vector(16)", pa.list_(pa.float32(), 16)),
    ],
)
def test_type_texts(text, arrow):
    assert parse_type(text) == arrow
    assert type_text(arrow) == text


@pytest.mark.parametrize("text", ["", "flaot64", "list<", "list<int64", "decimal(18)", "vector(x)", "int64 int64", "map<int64,int64>"])
def test_texts_that_are_no_types(text):
    with pytest.raises(errors.InvalidArgument, match="is not a type"):
        parse_type(text)


def test_types_nobody_declared():
    assert canonical_type(pa.timestamp("ns", tz="America/New_York")) == TIMESTAMP
    assert canonical_type(pa.uint64()) == pa.int64()
    assert canonical_type(pa.dictionary(pa.int8(), pa.large_string())) == pa.string()
    with pytest.raises(errors.InvalidArgument, match="no coeval type"):
        canonical_type(pa.duration("s"))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            pa.ArrowInvalid(
                "Flight returned invalid argument error, with message: the spine has no column `origin`."
                " gRPC client debug context: UNKNOWN:Error received from peer"
            ),
            errors.InvalidArgument,
            "the spine has no column `origin`",
        ),
        (
            pa.ArrowKeyError("Flight returned not found error, with message: no service `x`. Detail: NotFound"),
            errors.NotFound,
            "no service `x`",
        ),
        (
            flight.FlightUnavailableError("Flight returned unavailable error, with message: failed to connect"),
            errors.Unavailable,
            "failed to connect",
        ),
        (flight.FlightInternalError("something else"), errors.CoevalError, "something else"),
    ],
)
def test_flight_errors(error, kind, text):
    mapped = errors.from_flight(error)
    assert type(mapped) is kind
    assert mapped.message == text


def test_kinds_of_errors():
    assert isinstance(errors.from_code("not_found", "x"), LookupError)
    assert isinstance(errors.from_code("aborted", "x"), errors.Conflict)
    assert errors.from_code("unavailable", "x").retryable
    assert not errors.from_code("invalid_argument", "x").retryable
    assert errors.from_code("internal", "x").code == "internal"
