from . import flags_pb2 as _flags_pb2
from . import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_STATUS_UNSPECIFIED: _ClassVar[RowStatus]
    OK: _ClassVar[RowStatus]
    FALLBACK: _ClassVar[RowStatus]
    FAILED: _ClassVar[RowStatus]

class WaitReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_REASON_UNSPECIFIED: _ClassVar[WaitReason]
    NONE: _ClassVar[WaitReason]
    EXECUTOR_BUSY: _ClassVar[WaitReason]
    LINGER: _ClassVar[WaitReason]
    MEMORY_PERMIT: _ClassVar[WaitReason]
    TIER: _ClassVar[WaitReason]
ROW_STATUS_UNSPECIFIED: RowStatus
OK: RowStatus
FALLBACK: RowStatus
FAILED: RowStatus
WAIT_REASON_UNSPECIFIED: WaitReason
NONE: WaitReason
EXECUTOR_BUSY: WaitReason
LINGER: WaitReason
MEMORY_PERMIT: WaitReason
TIER: WaitReason

class GetFeaturesRequest(_message.Message):
    __slots__ = ("project", "service", "features", "rows", "at", "include_provenance", "deadline_ms")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    project: str
    service: str
    features: FeatureList
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    at: _containers.RepeatedScalarFieldContainer[int]
    include_provenance: bool
    deadline_ms: int
    def __init__(self, project: _Optional[str] = ..., service: _Optional[str] = ..., features: _Optional[_Union[FeatureList, _Mapping]] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ..., at: _Optional[_Iterable[int]] = ..., include_provenance: _Optional[bool] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class FeatureList(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class GetFeaturesResponse(_message.Message):
    __slots__ = ("features", "at", "views", "semantic_digest", "stale", "rows")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[FeatureColumn]
    at: _containers.RepeatedScalarFieldContainer[int]
    views: _containers.RepeatedCompositeFieldContainer[ViewProvenance]
    semantic_digest: str
    stale: bool
    rows: int
    def __init__(self, features: _Optional[_Iterable[_Union[FeatureColumn, _Mapping]]] = ..., at: _Optional[_Iterable[int]] = ..., views: _Optional[_Iterable[_Union[ViewProvenance, _Mapping]]] = ..., semantic_digest: _Optional[str] = ..., stale: _Optional[bool] = ..., rows: _Optional[int] = ...) -> None: ...

class FeatureColumn(_message.Message):
    __slots__ = ("name", "values", "statuses", "reasons")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _types_pb2.Column
    statuses: _containers.RepeatedScalarFieldContainer[_types_pb2.FieldStatus]
    reasons: _containers.RepeatedScalarFieldContainer[_types_pb2.UnavailableReason]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Union[_types_pb2.Column, _Mapping]] = ..., statuses: _Optional[_Iterable[_Union[_types_pb2.FieldStatus, str]]] = ..., reasons: _Optional[_Iterable[_Union[_types_pb2.UnavailableReason, str]]] = ...) -> None: ...

class ViewProvenance(_message.Message):
    __slots__ = ("view", "alias", "event_times", "positions", "storage_digest")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIMES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    STORAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    view: str
    alias: str
    event_times: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Position]
    storage_digest: str
    def __init__(self, view: _Optional[str] = ..., alias: _Optional[str] = ..., event_times: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[_Union[_types_pb2.Position, _Mapping]]] = ..., storage_digest: _Optional[str] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("project", "model", "rows", "at", "deadline_ms", "include_features", "include_provenance", "version", "request_id", "tier")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FEATURES_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    at: _containers.RepeatedScalarFieldContainer[int]
    deadline_ms: int
    include_features: bool
    include_provenance: bool
    version: int
    request_id: str
    tier: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ..., at: _Optional[_Iterable[int]] = ..., deadline_ms: _Optional[int] = ..., include_features: _Optional[bool] = ..., include_provenance: _Optional[bool] = ..., version: _Optional[int] = ..., request_id: _Optional[str] = ..., tier: _Optional[str] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("outputs", "outcomes", "at", "features", "views", "request_id", "semantic_digest", "stale", "timings")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    outcomes: _containers.RepeatedCompositeFieldContainer[RowOutcome]
    at: _containers.RepeatedScalarFieldContainer[int]
    features: _containers.RepeatedCompositeFieldContainer[FeatureColumn]
    views: _containers.RepeatedCompositeFieldContainer[ViewProvenance]
    request_id: str
    semantic_digest: str
    stale: bool
    timings: Timings
    def __init__(self, outputs: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ..., outcomes: _Optional[_Iterable[_Union[RowOutcome, _Mapping]]] = ..., at: _Optional[_Iterable[int]] = ..., features: _Optional[_Iterable[_Union[FeatureColumn, _Mapping]]] = ..., views: _Optional[_Iterable[_Union[ViewProvenance, _Mapping]]] = ..., request_id: _Optional[str] = ..., semantic_digest: _Optional[str] = ..., stale: _Optional[bool] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class RowOutcome(_message.Message):
    __slots__ = ("version", "arm", "status", "reason", "wait_reason", "wait_us", "waits", "cached")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    version: int
    arm: str
    status: RowStatus
    reason: str
    wait_reason: WaitReason
    wait_us: int
    waits: WaitTimes
    cached: bool
    def __init__(self, version: _Optional[int] = ..., arm: _Optional[str] = ..., status: _Optional[_Union[RowStatus, str]] = ..., reason: _Optional[str] = ..., wait_reason: _Optional[_Union[WaitReason, str]] = ..., wait_us: _Optional[int] = ..., waits: _Optional[_Union[WaitTimes, _Mapping]] = ..., cached: _Optional[bool] = ...) -> None: ...

class WaitTimes(_message.Message):
    __slots__ = ("executor_busy_us", "linger_us", "memory_permit_us", "tier_us")
    EXECUTOR_BUSY_US_FIELD_NUMBER: _ClassVar[int]
    LINGER_US_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PERMIT_US_FIELD_NUMBER: _ClassVar[int]
    TIER_US_FIELD_NUMBER: _ClassVar[int]
    executor_busy_us: int
    linger_us: int
    memory_permit_us: int
    tier_us: int
    def __init__(self, executor_busy_us: _Optional[int] = ..., linger_us: _Optional[int] = ..., memory_permit_us: _Optional[int] = ..., tier_us: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("features_us", "transforms_us", "queue_us", "forward_us", "total_us")
    FEATURES_US_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMS_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    FORWARD_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    features_us: int
    transforms_us: int
    queue_us: int
    forward_us: int
    total_us: int
    def __init__(self, features_us: _Optional[int] = ..., transforms_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., forward_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...
