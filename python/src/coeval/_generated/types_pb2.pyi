from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FieldStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIELD_STATUS_UNSPECIFIED: _ClassVar[FieldStatus]
    PRESENT: _ClassVar[FieldStatus]
    NULL_VALUE: _ClassVar[FieldStatus]
    NOT_FOUND: _ClassVar[FieldStatus]
    OUTSIDE_MAX_AGE: _ClassVar[FieldStatus]
    UNAVAILABLE: _ClassVar[FieldStatus]

class UnavailableReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNAVAILABLE_REASON_UNSPECIFIED: _ClassVar[UnavailableReason]
    TIMEOUT: _ClassVar[UnavailableReason]
    BACKFILLING: _ClassVar[UnavailableReason]
    AT_BEFORE_STORE: _ClassVar[UnavailableReason]
    STORE_ERROR: _ClassVar[UnavailableReason]
    OFFLINE_ONLY: _ClassVar[UnavailableReason]
FIELD_STATUS_UNSPECIFIED: FieldStatus
PRESENT: FieldStatus
NULL_VALUE: FieldStatus
NOT_FOUND: FieldStatus
OUTSIDE_MAX_AGE: FieldStatus
UNAVAILABLE: FieldStatus
UNAVAILABLE_REASON_UNSPECIFIED: UnavailableReason
TIMEOUT: UnavailableReason
BACKFILLING: UnavailableReason
AT_BEFORE_STORE: UnavailableReason
STORE_ERROR: UnavailableReason
OFFLINE_ONLY: UnavailableReason

class Column(_message.Message):
    __slots__ = ("name", "validity", "bools", "int32s", "int64s", "floats", "doubles", "strings", "binaries", "timestamps", "dates", "decimals", "lists", "maps", "structs", "vectors")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALIDITY_FIELD_NUMBER: _ClassVar[int]
    BOOLS_FIELD_NUMBER: _ClassVar[int]
    INT32S_FIELD_NUMBER: _ClassVar[int]
    INT64S_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    BINARIES_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_FIELD_NUMBER: _ClassVar[int]
    DATES_FIELD_NUMBER: _ClassVar[int]
    DECIMALS_FIELD_NUMBER: _ClassVar[int]
    LISTS_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    STRUCTS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    validity: bytes
    bools: BoolValues
    int32s: Int32Values
    int64s: Int64Values
    floats: FloatValues
    doubles: DoubleValues
    strings: StringValues
    binaries: BinaryValues
    timestamps: TimestampValues
    dates: DateValues
    decimals: DecimalValues
    lists: ListValues
    maps: MapValues
    structs: StructValues
    vectors: VectorValues
    def __init__(self, name: _Optional[str] = ..., validity: _Optional[bytes] = ..., bools: _Optional[_Union[BoolValues, _Mapping]] = ..., int32s: _Optional[_Union[Int32Values, _Mapping]] = ..., int64s: _Optional[_Union[Int64Values, _Mapping]] = ..., floats: _Optional[_Union[FloatValues, _Mapping]] = ..., doubles: _Optional[_Union[DoubleValues, _Mapping]] = ..., strings: _Optional[_Union[StringValues, _Mapping]] = ..., binaries: _Optional[_Union[BinaryValues, _Mapping]] = ..., timestamps: _Optional[_Union[TimestampValues, _Mapping]] = ..., dates: _Optional[_Union[DateValues, _Mapping]] = ..., decimals: _Optional[_Union[DecimalValues, _Mapping]] = ..., lists: _Optional[_Union[ListValues, _Mapping]] = ..., maps: _Optional[_Union[MapValues, _Mapping]] = ..., structs: _Optional[_Union[StructValues, _Mapping]] = ..., vectors: _Optional[_Union[VectorValues, _Mapping]] = ...) -> None: ...

class BoolValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, values: _Optional[_Iterable[bool]] = ...) -> None: ...

class Int32Values(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Int64Values(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class FloatValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class DoubleValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class StringValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class BinaryValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, values: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TimestampValues(_message.Message):
    __slots__ = ("microseconds",)
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    microseconds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, microseconds: _Optional[_Iterable[int]] = ...) -> None: ...

class DateValues(_message.Message):
    __slots__ = ("days",)
    DAYS_FIELD_NUMBER: _ClassVar[int]
    days: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, days: _Optional[_Iterable[int]] = ...) -> None: ...

class DecimalValues(_message.Message):
    __slots__ = ("precision", "scale", "unscaled")
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    UNSCALED_FIELD_NUMBER: _ClassVar[int]
    precision: int
    scale: int
    unscaled: bytes
    def __init__(self, precision: _Optional[int] = ..., scale: _Optional[int] = ..., unscaled: _Optional[bytes] = ...) -> None: ...

class ListValues(_message.Message):
    __slots__ = ("lengths", "items")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    items: Column
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., items: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...

class MapValues(_message.Message):
    __slots__ = ("lengths", "keys", "values")
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    keys: Column
    values: Column
    def __init__(self, lengths: _Optional[_Iterable[int]] = ..., keys: _Optional[_Union[Column, _Mapping]] = ..., values: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...

class StructValues(_message.Message):
    __slots__ = ("fields",)
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    fields: _containers.RepeatedCompositeFieldContainer[Column]
    def __init__(self, fields: _Optional[_Iterable[_Union[Column, _Mapping]]] = ...) -> None: ...

class VectorValues(_message.Message):
    __slots__ = ("dimensions", "values")
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    dimensions: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, dimensions: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("time", "sequence")
    TIME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    time: int
    sequence: int
    def __init__(self, time: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...
