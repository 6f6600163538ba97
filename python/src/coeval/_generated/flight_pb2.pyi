from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TrainingSetCommand(_message.Message):
    __slots__ = ("project", "service", "dataset", "statuses", "visibility", "seed", "order", "encode_for", "compression")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    VISIBILITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FOR_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    project: str
    service: str
    dataset: str
    statuses: bool
    visibility: str
    seed: int
    order: str
    encode_for: str
    compression: str
    def __init__(self, project: _Optional[str] = ..., service: _Optional[str] = ..., dataset: _Optional[str] = ..., statuses: _Optional[bool] = ..., visibility: _Optional[str] = ..., seed: _Optional[int] = ..., order: _Optional[str] = ..., encode_for: _Optional[str] = ..., compression: _Optional[str] = ...) -> None: ...

class DatasetTicket(_message.Message):
    __slots__ = ("project", "name", "id", "rank", "world_size", "shuffle_seed", "offset", "limit", "columns", "encode_for", "compression", "batch_rows", "endpoints", "inputs_only")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_SEED_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FOR_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    project: str
    name: str
    id: str
    rank: int
    world_size: int
    shuffle_seed: int
    offset: int
    limit: int
    columns: _containers.RepeatedScalarFieldContainer[str]
    encode_for: str
    compression: str
    batch_rows: int
    endpoints: int
    inputs_only: bool
    def __init__(self, project: _Optional[str] = ..., name: _Optional[str] = ..., id: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., shuffle_seed: _Optional[int] = ..., offset: _Optional[int] = ..., limit: _Optional[int] = ..., columns: _Optional[_Iterable[str]] = ..., encode_for: _Optional[str] = ..., compression: _Optional[str] = ..., batch_rows: _Optional[int] = ..., endpoints: _Optional[int] = ..., inputs_only: _Optional[bool] = ...) -> None: ...
