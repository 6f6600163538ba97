from . import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PushRequest(_message.Message):
    __slots__ = ("project", "source", "rows", "wait_visible")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WAIT_VISIBLE_FIELD_NUMBER: _ClassVar[int]
    project: str
    source: str
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    wait_visible: bool
    def __init__(self, project: _Optional[str] = ..., source: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ..., wait_visible: _Optional[bool] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("accepted", "duplicates", "early", "rejected", "last_sequence")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    EARLY_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    duplicates: int
    early: int
    rejected: _containers.RepeatedCompositeFieldContainer[Rejected]
    last_sequence: int
    def __init__(self, accepted: _Optional[int] = ..., duplicates: _Optional[int] = ..., early: _Optional[int] = ..., rejected: _Optional[_Iterable[_Union[Rejected, _Mapping]]] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("row", "reason")
    ROW_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    row: int
    reason: str
    def __init__(self, row: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class MaterializeRequest(_message.Message):
    __slots__ = ("project", "sources", "through", "dry_run")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    project: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    through: int
    dry_run: bool
    def __init__(self, project: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., through: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class MaterializeProgress(_message.Message):
    __slots__ = ("source", "view", "rows_read", "rows_applied", "rows_stale", "done", "through", "rows_new", "rows_total", "entities", "seconds", "message")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ROWS_READ_FIELD_NUMBER: _ClassVar[int]
    ROWS_APPLIED_FIELD_NUMBER: _ClassVar[int]
    ROWS_STALE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    ROWS_NEW_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    source: str
    view: str
    rows_read: int
    rows_applied: int
    rows_stale: int
    done: bool
    through: int
    rows_new: int
    rows_total: int
    entities: int
    seconds: float
    message: str
    def __init__(self, source: _Optional[str] = ..., view: _Optional[str] = ..., rows_read: _Optional[int] = ..., rows_applied: _Optional[int] = ..., rows_stale: _Optional[int] = ..., done: _Optional[bool] = ..., through: _Optional[int] = ..., rows_new: _Optional[int] = ..., rows_total: _Optional[int] = ..., entities: _Optional[int] = ..., seconds: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("project",)
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    project: str
    def __init__(self, project: _Optional[str] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: int
    def __init__(self, events: _Optional[int] = ...) -> None: ...

class CompactRequest(_message.Message):
    __slots__ = ("project", "sources", "dry_run")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    project: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    dry_run: bool
    def __init__(self, project: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ImportFilesRequest(_message.Message):
    __slots__ = ("project", "source")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    project: str
    source: str
    def __init__(self, project: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class TableProgress(_message.Message):
    __slots__ = ("source", "rows_written", "tables", "done")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    source: str
    rows_written: int
    tables: _containers.RepeatedCompositeFieldContainer[TableDone]
    done: bool
    def __init__(self, source: _Optional[str] = ..., rows_written: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableDone, _Mapping]]] = ..., done: _Optional[bool] = ...) -> None: ...

class TableDone(_message.Message):
    __slots__ = ("source", "changed", "files_before", "files_after", "files_taken", "bytes_before", "bytes_after", "rows", "buckets", "seconds")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    FILES_BEFORE_FIELD_NUMBER: _ClassVar[int]
    FILES_AFTER_FIELD_NUMBER: _ClassVar[int]
    FILES_TAKEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BYTES_AFTER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    source: str
    changed: bool
    files_before: int
    files_after: int
    files_taken: int
    bytes_before: int
    bytes_after: int
    rows: int
    buckets: int
    seconds: float
    def __init__(self, source: _Optional[str] = ..., changed: _Optional[bool] = ..., files_before: _Optional[int] = ..., files_after: _Optional[int] = ..., files_taken: _Optional[int] = ..., bytes_before: _Optional[int] = ..., bytes_after: _Optional[int] = ..., rows: _Optional[int] = ..., buckets: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
