"""What callers hold (dicts of lists, DataFrames, Arrow, polars) as Arrow columns of our types.

Training and serving must agree before the server sees anything, so spines, requests and events all pass through here and
follow the same rules:

- a time without a zone is UTC, any other is converted to it; digits below the microsecond are cut off (toward the past);
- in float columns NaN is a value and stays one, `None` and `pandas.NA` are nulls;
- in columns of any other type NaN is how pandas and friends write "missing", so it becomes null.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import errors
from .types import TIMESTAMP, canonical_type

# Rows per message: small enough for default message bounds, large enough that the per-message cost vanishes.
BATCH_ROWS_MAX = 16_384
# tonic decodes at most 4 MiB per message unless told otherwise.
BATCH_BYTES_MAX = 2 * 1024 * 1024

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)
_MICROSECOND = dt.timedelta(microseconds=1)


def to_table(rows: Any, types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """All of `rows` as one table. Columns named in `types` come out with exactly that type."""
    types = types or {}
    if _is_stream(rows):
        rows = rows.read_all()
    columns = dict(_columns_of(rows))
    arrays = {name: to_array(name, values, types.get(name)) for name, values in columns.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        raise errors.InvalidArgument(f"columns differ in length: {listed}")
    return pa.table(arrays)


def to_batches(rows: Any, types: Mapping[str, pa.DataType] | None = None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """`rows` as a schema and bounded batches; a `RecordBatchReader` is read as it is sent, not before."""
    if not _is_stream(rows):
        table = to_table(rows, types)
        return table.schema, _bounded(table.to_batches(max_chunksize=BATCH_ROWS_MAX))
    types = types or {}
    fields = [pa.field(f.name, types.get(f.name) or _own_type(f.type)) for f in rows.schema]
    schema = pa.schema(fields)

    def normal() -> Iterator[pa.RecordBatch]:
        for batch in rows:
            arrays = [to_array(f.name, batch.column(i), f.type) for i, f in enumerate(fields)]
            yield pa.RecordBatch.from_arrays([_chunkless(array) for array in arrays], schema=schema)

    return schema, _bounded(normal())


def to_array(name: str, values: Any, arrow: pa.DataType | None = None) -> pa.Array | pa.ChunkedArray:
    """One column. Without `arrow` its type is taken from the values."""
    try:
        return _to_array(values, arrow)
    except errors.CoevalError as error:
        raise errors.InvalidArgument(f"column `{name}`: {error.message}") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        wanted = f" as {arrow}" if arrow is not None else ""
        raise errors.InvalidArgument(f"column `{name}`{wanted}: {error}") from error


def to_microseconds(at: Any, rows: int) -> list[int]:
    """One time, or one per row, as microseconds since 1970 UTC."""
    if isinstance(at, (str, dt.datetime, np.datetime64, int)):
        at = [at] * rows
    if isinstance(at, list):
        at = [dt.datetime.fromisoformat(value) if isinstance(value, str) else value for value in at]
    array = to_array("at", at, TIMESTAMP)
    if array.null_count:
        raise errors.InvalidArgument("`at` holds a null: each row needs a time")
    if len(array) != rows:
        raise errors.InvalidArgument(f"`at` holds {len(array)} times for {rows} rows")
    return np.asarray(array.cast(pa.int64())).tolist()


def _is_stream(rows: Any) -> bool:
    return isinstance(rows, pa.RecordBatchReader)


def _columns_of(rows: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(rows, (pa.Table, pa.RecordBatch)):
        return zip(rows.schema.names, rows.columns, strict=True)
    if isinstance(rows, Mapping):
        return rows.items()
    module = type(rows).__module__.partition(".")[0]
    if module == "pandas" and hasattr(rows, "columns"):
        return ((str(name), rows.iloc[:, index]) for index, name in enumerate(rows.columns))
    if module == "polars" and type(rows).__name__ in ("DataFrame", "LazyFrame"):
        if hasattr(rows, "collect"):
            rows = rows.collect()
        table = rows.to_arrow()
        return zip(table.schema.names, table.columns, strict=True)
    raise errors.InvalidArgument(
        f"rows of type `{type(rows).__name__}`: give a dict of columns, a DataFrame, or an Arrow table, batch or reader"
    )


def _to_array(values: Any, arrow: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return _cast(values, arrow)
    if isinstance(values, pa.Scalar) or isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise errors.InvalidArgument(f"a column is a list of values, found `{type(values).__name__}`")
    module = type(values).__module__.partition(".")[0]
    if module == "polars":
        return _cast(values.to_arrow(), arrow)
    if module == "pandas":
        return _from_pandas(values, arrow)
    if isinstance(values, np.ndarray) and values.dtype != object:
        return _from_numpy(values, arrow)
    return _from_objects(list(values), arrow)


def _from_pandas(series: Any, arrow: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    if isinstance(series.dtype, np.dtype):
        if series.dtype == object:
            return _from_objects(series.tolist(), arrow)
        return _from_numpy(series.to_numpy(), arrow)
    if hasattr(series.dtype, "tz") and hasattr(series, "dt"):
        return _from_numpy(series.dt.tz_convert(None).to_numpy(), arrow)
    # The other extension types (string, Int64, categorical, Arrow) know their own nulls.
    return _cast(pa.array(series), arrow)


def _from_numpy(values: np.ndarray, arrow: pa.DataType | None) -> pa.Array:
    if values.ndim != 1:
        return _from_objects(list(values), arrow)
    if values.dtype.kind == "M":
        # numpy widens coarser units exactly and cuts finer ones toward the past; NaT is null.
        return _cast(pa.array(values.astype("datetime64[us]")), arrow)
    if values.dtype.kind == "f" and arrow is not None and not pa.types.is_floating(arrow):
        return _cast(pa.array(values, mask=np.isnan(values)), arrow)
    return _cast(pa.array(values, from_pandas=False), arrow)


def _from_objects(values: list[Any], arrow: pa.DataType | None) -> pa.Array:
    values = [None if _is_missing(value) else value for value in values]
    floats = arrow is not None and pa.types.is_floating(arrow)
    if arrow is None:
        # A column of floats and nothing else keeps its NaNs; one of strings with holes does not.
        floats = all(value is None or isinstance(value, (float, int, np.floating, np.integer)) for value in values)
    if not floats:
        values = [None if _is_nan(value) else value for value in values]
    if arrow == TIMESTAMP or (arrow is None and any(isinstance(value, (dt.datetime, np.datetime64)) for value in values)):
        return pa.array([_microseconds(value) for value in values], type=pa.int64()).view(TIMESTAMP)
    if arrow is not None and pa.types.is_integer(arrow):
        values = [_whole(value) for value in values]
    array = pa.array(values, type=arrow, from_pandas=False)
    return array if arrow is not None else _cast(array, None)


def _cast(values: pa.Array | pa.ChunkedArray, arrow: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    own = _own_type(values.type) if arrow is None else arrow
    if values.type == own:
        return values
    if pa.types.is_timestamp(values.type) and own == TIMESTAMP:
        if values.type.unit == "ns":
            values = pc.floor_temporal(values, unit="microsecond")
        # A time without a zone is UTC: the same number, with the zone added.
        return values.cast(pa.timestamp(values.type.unit, tz="UTC")).cast(TIMESTAMP)
    if pa.types.is_floating(values.type) and pa.types.is_integer(own):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, type=values.type), values)
    if pa.types.is_integer(values.type) and own == TIMESTAMP:
        return values.cast(pa.int64()).cast(TIMESTAMP)
    if pa.types.is_string(own) and not _is_text(values.type):
        # Arrow would print the number; a key that was meant to be text deserves to be asked about.
        raise errors.InvalidArgument(f"expected strings, found {values.type}")
    return values.cast(own)


def _is_text(arrow: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    t = pa.types
    return t.is_string(arrow) or t.is_large_string(arrow) or t.is_string_view(arrow) or t.is_null(arrow)


def _own_type(arrow: pa.DataType) -> pa.DataType:
    # A column whose type is not ours may be a spine's own business; it travels as it is.
    if pa.types.is_null(arrow):
        return arrow
    try:
        return canonical_type(arrow)
    except errors.InvalidArgument:
        return arrow


def _chunkless(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _bounded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        rows = batch.num_rows
        if rows == 0:
            continue
        size = max(batch.nbytes, 1)
        step = min(BATCH_ROWS_MAX, max(1, rows * BATCH_BYTES_MAX // size))
        for start in range(0, rows, step):
            yield batch.slice(start, step)


def _is_missing(value: Any) -> bool:
    # By name, so that pandas need not be imported to recognise what it left behind.
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and value != value


def _whole(value: Any) -> Any:
    # Arrow would cut 1.5 to 1 without a word.
    if isinstance(value, (float, np.floating)):
        if not float(value).is_integer():
            raise errors.InvalidArgument(f"expected whole numbers, found {value!r}")
        return int(value)
    return value


def _microseconds(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return None
        # Coarser units widen exactly; finer ones are cut toward the past by numpy's floor division.
        return int(value.astype("datetime64[us]").astype(np.int64))
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            value = value.replace(tzinfo=dt.timezone.utc)
        if hasattr(value, "as_unit"):  # a pandas Timestamp, which may carry nanoseconds
            return int(value.as_unit("ns").value // 1000)
        return (value - _EPOCH) // _MICROSECOND
    if isinstance(value, dt.date):
        return (dt.datetime(value.year, value.month, value.day, tzinfo=dt.timezone.utc) - _EPOCH) // _MICROSECOND
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise errors.InvalidArgument(f"expected a time, found {value!r}")
