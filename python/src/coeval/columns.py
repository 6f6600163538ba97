"""Columns as they travel, from and to Arrow, value for value and null for null.

Nothing may change on the way: not the bits of a NaN, not a null inside a null's neighbour, not the scale of a decimal.
`from_column(to_column(name, array)) == array` for every type the catalog can declare. Rows that are null carry a zero,
an empty string or an empty list, whatever lay under the null in the Arrow buffer, so that equal columns are equal bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from . import errors
from ._generated import types_pb2
from .types import TIMESTAMP, canonical_type



def to_column(name: str, array: pa.Array | pa.ChunkedArray) -> types_pb2.Column:
    """The column that carries `array`. Arrow types that are not ours become the one that holds all their values."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        # combine_chunks of a chunked array may itself be chunked, when one array cannot hold it all.
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    target = canonical_type(array.type)
    if array.type != target:
        try:
            array = array.cast(target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise errors.InvalidArgument(f"column `{name}`: {error}") from error
    column = types_pb2.Column(name=name)
    present = _present(array)
    if present is not None:
        column.validity = np.packbits(present, bitorder="little").tobytes()
    _put_values(column, array, present)
    return column


def from_column(column: types_pb2.Column, arrow: pa.DataType | None = None, rows: int | None = None) -> pa.Array:
    """The Arrow array a column carries.

    `arrow` is only needed for what a column without items cannot say; `rows` checks the length.
    """
    kind = column.WhichOneof("values")
    if kind is None:
        return _untyped(column, arrow, rows)
    array = _FROM[kind](column, getattr(column, kind))
    if rows is not None and len(array) != rows:
        raise errors.CoevalError(f"column `{column.name}` has {len(array)} values where {rows} rows were answered")
    # A list without items says nothing of its items, and a struct nothing of its field names beyond these.
    if arrow is not None and array.type != arrow and len(array) == array.null_count:
        return pa.nulls(len(array), arrow)
    return array


def _untyped(column: types_pb2.Column, arrow: pa.DataType | None, rows: int | None) -> pa.Array:
    # A column without values can only mean nulls, and needs to be told how many.
    if rows is None:
        rows = 0
    if any(column.validity):
        raise errors.CoevalError(f"column `{column.name}` says that values are present and carries none")
    return pa.nulls(rows, arrow or pa.null())


def _present(array: pa.Array) -> np.ndarray | None:
    if array.null_count == 0:
        return None
    return np.asarray(array.is_valid())


def _put_values(column: types_pb2.Column, array: pa.Array, present: np.ndarray | None) -> None:
    arrow = array.type
    t = pa.types
    if len(array) == 0:
        # Without values protobuf would not say which kind was meant.
        _set_kind(column, arrow)
    if t.is_boolean(arrow):
        column.bools.values.extend(array.fill_null(False).to_pylist())
    elif t.is_int32(arrow):
        column.int32s.values.extend(_flat(array, np.int32))
    elif t.is_int64(arrow):
        column.int64s.values.extend(_flat(array, np.int64))
    elif t.is_float32(arrow):
        column.floats.values.extend(_flat(array, np.float32))
    elif t.is_float64(arrow):
        column.doubles.values.extend(_flat(array, np.float64))
    elif t.is_string(arrow):
        column.strings.values.extend(array.fill_null("").to_pylist())
    elif t.is_binary(arrow):
        column.binaries.values.extend(array.fill_null(b"").to_pylist())
    elif t.is_timestamp(arrow):
        column.timestamps.microseconds.extend(_flat(array.view(pa.int64()), np.int64))
    elif t.is_date32(arrow):
        column.dates.days.extend(_flat(array.view(pa.int32()), np.int32))
    elif t.is_decimal128(arrow):
        column.decimals.precision = arrow.precision
        column.decimals.scale = arrow.scale
        column.decimals.unscaled = _unscaled(array, present)
    elif t.is_fixed_size_list(arrow):
        _put_vectors(column, array, present)
    elif t.is_list(arrow):
        lengths, rows = _ranges(array, present)
        column.lists.lengths.extend(lengths)
        column.lists.items.CopyFrom(to_column("item", array.values.take(rows)))
    elif t.is_map(arrow):
        lengths, rows = _ranges(array, present)
        column.maps.lengths.extend(lengths)
        entries = _map_entries(array)
        column.maps.keys.CopyFrom(to_column("key", entries.field(0).take(rows)))
        column.maps.values.CopyFrom(to_column("value", entries.field(1).take(rows)))
    elif t.is_struct(arrow):
        # flatten() carries the nulls of the struct into its fields.
        for field, values in zip(arrow, array.flatten(), strict=True):
            column.structs.fields.append(to_column(field.name, values))
    else:
        raise errors.InvalidArgument(f"column `{column.name}` has type `{arrow}`, which cannot travel")


def _set_kind(column: types_pb2.Column, arrow: pa.DataType) -> None:
    t = pa.types
    kinds = [
        (t.is_boolean, "bools"),
        (t.is_int32, "int32s"),
        (t.is_int64, "int64s"),
        (t.is_float32, "floats"),
        (t.is_float64, "doubles"),
        (t.is_string, "strings"),
        (t.is_binary, "binaries"),
        (t.is_timestamp, "timestamps"),
        (t.is_date32, "dates"),
        (t.is_decimal128, "decimals"),
        (t.is_fixed_size_list, "vectors"),
        (t.is_list, "lists"),
        (t.is_map, "maps"),
        (t.is_struct, "structs"),
    ]
    for matches, kind in kinds:
        if matches(arrow):
            getattr(column, kind).SetInParent()


def _flat(array: pa.Array, dtype: Any) -> list[Any]:
    # Straight from the buffer: conversions that go through Python objects or casts would be free to touch NaNs.
    values = np.frombuffer(array.buffers()[1] or b"", dtype=dtype)[array.offset : array.offset + len(array)]
    if array.null_count:
        values = np.where(np.asarray(array.is_valid()), values, dtype(0))
    return values.tolist()


def _unscaled(array: pa.Array, present: np.ndarray | None) -> bytes:
    little = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8).reshape(-1, 16)
    little = little[array.offset : array.offset + len(array)]
    if present is not None:
        little = np.where(present[:, None], little, np.uint8(0))
    return little[:, ::-1].tobytes()


def _put_vectors(column: types_pb2.Column, array: pa.Array, present: np.ndarray | None) -> None:
    dimensions = array.type.list_size
    column.vectors.dimensions = dimensions
    items = array.values.slice(array.offset * dimensions, len(array) * dimensions)
    item_present = np.asarray(items.is_valid()).reshape(-1, dimensions)
    missing = ~item_present if present is None else ~item_present & present[:, None]
    if missing.any():
        raise errors.InvalidArgument(f"column `{column.name}`: an element of a vector is null")
    values = np.frombuffer(items.buffers()[1] or b"", dtype=np.float32)[items.offset : items.offset + len(items)]
    values = values.reshape(-1, dimensions)
    if present is not None:
        values = np.where(present[:, None], values, np.float32(0))
    column.vectors.values.extend(values.ravel().tolist())


def _ranges(array: pa.Array, present: np.ndarray | None) -> tuple[list[int], pa.Array]:
    """Lengths of the lists and the indices of their items, leaving out whatever lies under a null."""
    offsets = np.frombuffer(array.buffers()[1] or b"\0\0\0\0", dtype=np.int32)
    offsets = offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)
    starts, lengths = offsets[:-1], np.diff(offsets)
    if present is not None:
        lengths = np.where(present, lengths, 0)
    total = int(lengths.sum())
    firsts = np.cumsum(lengths) - lengths
    rows = np.repeat(starts - firsts, lengths) + np.arange(total)
    return lengths.tolist(), pa.array(rows, type=pa.int64())


def _map_entries(array: pa.MapArray) -> pa.StructArray:
    # `.keys` and `.items` leave out entries under a slice's offset in some versions of pyarrow; the child does not.
    entry = pa.struct([pa.field("key", array.type.key_type, nullable=False), array.type.item_field])
    as_list = pa.Array.from_buffers(
        pa.list_(entry),
        len(array),
        array.buffers()[:2],
        null_count=array.null_count,
        offset=array.offset,
        children=[pa.StructArray.from_arrays([array.keys, array.items], fields=list(entry))],
    )
    return as_list.values


def _absent(column: types_pb2.Column, rows: int) -> np.ndarray | None:
    """True where a row is null; None when none is."""
    if _validity(column, rows) is None:
        return None
    bits = np.frombuffer(column.validity, dtype=np.uint8)
    return np.unpackbits(bits, count=rows, bitorder="little") == 0


def _validity(column: types_pb2.Column, rows: int) -> pa.Buffer | None:
    """The wire's bitmap is Arrow's: one bit per row, lowest bit first, set where the value is present."""
    validity = column.validity
    if not validity:
        return None
    if len(validity) * 8 < rows:
        raise errors.CoevalError(f"column `{column.name}` has {rows} rows and a validity of {len(validity)} bytes")
    return pa.py_buffer(validity)


def _numbers(column: types_pb2.Column, values: Any, dtype: Any, arrow: pa.DataType) -> pa.Array:
    rows = len(values)
    numbers = np.fromiter(values, dtype=dtype, count=rows)
    return pa.Array.from_buffers(arrow, rows, [_validity(column, rows), pa.py_buffer(numbers)])


def _objects(column: types_pb2.Column, values: Any, arrow: pa.DataType) -> pa.Array:
    absent = _absent(column, len(values))
    if absent is None:
        return pa.array(list(values), type=arrow)
    return pa.array([None if gone else value for value, gone in zip(values, absent, strict=True)], type=arrow)


def _decimals(column: types_pb2.Column, decimals: types_pb2.DecimalValues) -> pa.Array:
    if len(decimals.unscaled) % 16:
        raise errors.CoevalError(f"column `{column.name}`: decimals are 16 bytes each, found {len(decimals.unscaled)}")
    big = np.frombuffer(decimals.unscaled, dtype=np.uint8).reshape(-1, 16)
    little = pa.py_buffer(big[:, ::-1].tobytes())
    arrow = pa.decimal128(decimals.precision, decimals.scale)
    return pa.Array.from_buffers(arrow, len(big), [_validity(column, len(big)), little])


def _offsets(lengths: Any) -> pa.Buffer:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.array(lengths, dtype=np.int64), out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise errors.CoevalError("a list column holds more items than fit one message")
    return pa.py_buffer(offsets.astype(np.int32))


def _items(lengths: Any, items: types_pb2.Column) -> pa.Array:
    array = from_column(items)
    if len(array) != sum(lengths):
        raise errors.CoevalError(f"column `{items.name}` holds {len(array)} items where {sum(lengths)} are counted")
    return array


def _lists(column: types_pb2.Column, lists: types_pb2.ListValues) -> pa.Array:
    items = _items(lists.lengths, lists.items)
    rows = len(lists.lengths)
    buffers = [_validity(column, rows), _offsets(lists.lengths)]
    return pa.Array.from_buffers(pa.list_(items.type), rows, buffers, children=[items])


def _maps(column: types_pb2.Column, maps: types_pb2.MapValues) -> pa.Array:
    keys = _items(maps.lengths, maps.keys)
    values = _items(maps.lengths, maps.values)
    rows = len(maps.lengths)
    arrow = pa.map_(keys.type, values.type)
    entries = pa.StructArray.from_arrays(
        [keys, values], fields=[pa.field("key", keys.type, nullable=False), arrow.item_field]
    )
    buffers = [_validity(column, rows), _offsets(maps.lengths)]
    return pa.Array.from_buffers(arrow, rows, buffers, children=[entries])


def _structs(column: types_pb2.Column, structs: types_pb2.StructValues) -> pa.Array:
    fields = [from_column(field) for field in structs.fields]
    rows = len(fields[0]) if fields else 0
    if any(len(field) != rows for field in fields):
        raise errors.CoevalError(f"column `{column.name}`: the fields of a struct differ in length")
    absent = _absent(column, rows)
    return pa.StructArray.from_arrays(
        fields,
        fields=[pa.field(field.name, values.type) for field, values in zip(structs.fields, fields, strict=True)],
        mask=None if absent is None else pa.array(absent),
    )


def _vectors(column: types_pb2.Column, vectors: types_pb2.VectorValues) -> pa.Array:
    dimensions = vectors.dimensions
    values = np.array(vectors.values, dtype=np.float32)
    if dimensions == 0 or len(values) % dimensions:
        raise errors.CoevalError(f"column `{column.name}`: {len(values)} floats do not make vectors of {dimensions}")
    rows = len(values) // dimensions
    arrow = pa.list_(pa.float32(), dimensions)
    return pa.Array.from_buffers(arrow, rows, [_validity(column, rows)], children=[pa.array(values)])


_FROM: dict[str, Any] = {
    "bools": lambda column, v: _objects(column, v.values, pa.bool_()),
    "int32s": lambda column, v: _numbers(column, v.values, np.int32, pa.int32()),
    "int64s": lambda column, v: _numbers(column, v.values, np.int64, pa.int64()),
    "floats": lambda column, v: _numbers(column, v.values, np.float32, pa.float32()),
    "doubles": lambda column, v: _numbers(column, v.values, np.float64, pa.float64()),
    "strings": lambda column, v: _objects(column, v.values, pa.string()),
    "binaries": lambda column, v: _objects(column, v.values, pa.binary()),
    "timestamps": lambda column, v: _numbers(column, v.microseconds, np.int64, TIMESTAMP),
    "dates": lambda column, v: _numbers(column, v.days, np.int32, pa.date32()),
    "decimals": _decimals,
    "lists": _lists,
    "maps": _maps,
    "structs": _structs,
    "vectors": _vectors,
}
