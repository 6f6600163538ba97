from . import flags_pb2 as _flags_pb2
from . import rollout_pb2 as _rollout_pb2
from . import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetMemoryRequest(_message.Message):
    __slots__ = ("project",)
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    project: str
    def __init__(self, project: _Optional[str] = ...) -> None: ...

class GetMemoryResponse(_message.Message):
    __slots__ = ("capacity", "allowed", "resident", "models", "alarms")
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    capacity: int
    allowed: int
    resident: int
    models: _containers.RepeatedCompositeFieldContainer[ModelMemory]
    alarms: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, capacity: _Optional[int] = ..., allowed: _Optional[int] = ..., resident: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelMemory, _Mapping]]] = ..., alarms: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelMemory(_message.Message):
    __slots__ = ("name", "bytes", "arithmetic", "device")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    arithmetic: str
    device: str
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., arithmetic: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class GetCatalogRequest(_message.Message):
    __slots__ = ("project",)
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    project: str
    def __init__(self, project: _Optional[str] = ...) -> None: ...

class GetCatalogResponse(_message.Message):
    __slots__ = ("project", "catalog_digest", "views", "services", "sources", "control_head")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    CATALOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    CONTROL_HEAD_FIELD_NUMBER: _ClassVar[int]
    project: str
    catalog_digest: str
    views: _containers.RepeatedCompositeFieldContainer[ViewInfo]
    services: _containers.RepeatedCompositeFieldContainer[ServiceInfo]
    sources: _containers.RepeatedCompositeFieldContainer[SourceInfo]
    control_head: int
    def __init__(self, project: _Optional[str] = ..., catalog_digest: _Optional[str] = ..., views: _Optional[_Iterable[_Union[ViewInfo, _Mapping]]] = ..., services: _Optional[_Iterable[_Union[ServiceInfo, _Mapping]]] = ..., sources: _Optional[_Iterable[_Union[SourceInfo, _Mapping]]] = ..., control_head: _Optional[int] = ...) -> None: ...

class ViewInfo(_message.Message):
    __slots__ = ("name", "entity", "storage_digest", "semantic_digest", "ready")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    STORAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    name: str
    entity: str
    storage_digest: str
    semantic_digest: str
    ready: bool
    def __init__(self, name: _Optional[str] = ..., entity: _Optional[str] = ..., storage_digest: _Optional[str] = ..., semantic_digest: _Optional[str] = ..., ready: _Optional[bool] = ...) -> None: ...

class ServiceInfo(_message.Message):
    __slots__ = ("name", "semantic_digest", "inputs", "features", "units")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    semantic_digest: str
    inputs: _containers.RepeatedCompositeFieldContainer[NamedType]
    features: _containers.RepeatedCompositeFieldContainer[NamedType]
    units: _containers.RepeatedCompositeFieldContainer[NamedType]
    def __init__(self, name: _Optional[str] = ..., semantic_digest: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[NamedType, _Mapping]]] = ..., features: _Optional[_Iterable[_Union[NamedType, _Mapping]]] = ..., units: _Optional[_Iterable[_Union[NamedType, _Mapping]]] = ...) -> None: ...

class SourceInfo(_message.Message):
    __slots__ = ("name", "kind", "schema", "event_time", "created_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    CREATED_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    schema: _containers.RepeatedCompositeFieldContainer[NamedType]
    event_time: str
    created_time: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., schema: _Optional[_Iterable[_Union[NamedType, _Mapping]]] = ..., event_time: _Optional[str] = ..., created_time: _Optional[str] = ...) -> None: ...

class NamedType(_message.Message):
    __slots__ = ("name", "type", "nullable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NULLABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    nullable: bool
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., nullable: _Optional[bool] = ...) -> None: ...

class RefreshRequest(_message.Message):
    __slots__ = ("project", "at_least")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    project: str
    at_least: int
    def __init__(self, project: _Optional[str] = ..., at_least: _Optional[int] = ...) -> None: ...

class RefreshResponse(_message.Message):
    __slots__ = ("control_head", "ready", "reasons")
    CONTROL_HEAD_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    control_head: int
    ready: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, control_head: _Optional[int] = ..., ready: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("header", "chunk", "golden_chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ModelHeader
    chunk: bytes
    golden_chunk: bytes
    def __init__(self, header: _Optional[_Union[ModelHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., golden_chunk: _Optional[bytes] = ...) -> None: ...

class ModelHeader(_message.Message):
    __slots__ = ("project", "model", "author", "commit", "environment_digest", "seed", "hardware", "libraries", "dataset", "metrics", "importances")
    class LibrariesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ImportancesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    LIBRARIES_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCES_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    author: str
    commit: str
    environment_digest: str
    seed: int
    hardware: str
    libraries: _containers.ScalarMap[str, str]
    dataset: str
    metrics: _containers.ScalarMap[str, float]
    importances: _containers.ScalarMap[str, float]
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., author: _Optional[str] = ..., commit: _Optional[str] = ..., environment_digest: _Optional[str] = ..., seed: _Optional[int] = ..., hardware: _Optional[str] = ..., libraries: _Optional[_Mapping[str, str]] = ..., dataset: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., importances: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("version", "digest", "existed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    existed: bool
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., existed: _Optional[bool] = ...) -> None: ...

class DeployModelRequest(_message.Message):
    __slots__ = ("project", "model", "version", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class DeployModelResponse(_message.Message):
    __slots__ = ("version", "champion", "existed", "notes", "gateways")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHAMPION_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    version: int
    champion: int
    existed: bool
    notes: _containers.RepeatedScalarFieldContainer[str]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayVersion]
    def __init__(self, version: _Optional[int] = ..., champion: _Optional[int] = ..., existed: _Optional[bool] = ..., notes: _Optional[_Iterable[str]] = ..., gateways: _Optional[_Iterable[_Union[GatewayVersion, _Mapping]]] = ...) -> None: ...

class GatewayVersion(_message.Message):
    __slots__ = ("gateway", "address", "state", "reason", "notes", "memory_bytes", "max_rows")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    address: str
    state: str
    reason: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    memory_bytes: int
    max_rows: int
    def __init__(self, gateway: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., memory_bytes: _Optional[int] = ..., max_rows: _Optional[int] = ...) -> None: ...

class PromoteModelRequest(_message.Message):
    __slots__ = ("project", "model", "version", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RollbackModelRequest(_message.Message):
    __slots__ = ("project", "model", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class TrafficResponse(_message.Message):
    __slots__ = ("champion", "before", "previous", "ended")
    CHAMPION_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    champion: int
    before: int
    previous: int
    ended: int
    def __init__(self, champion: _Optional[int] = ..., before: _Optional[int] = ..., previous: _Optional[int] = ..., ended: _Optional[int] = ...) -> None: ...

class RetireModelRequest(_message.Message):
    __slots__ = ("project", "model", "version", "force", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    force: bool
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., force: _Optional[bool] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RetireModelResponse(_message.Message):
    __slots__ = ("control_entry",)
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    def __init__(self, control_entry: _Optional[int] = ...) -> None: ...

class ApproveModelRequest(_message.Message):
    __slots__ = ("project", "model", "version", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class ApproveModelResponse(_message.Message):
    __slots__ = ("control_entry",)
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    def __init__(self, control_entry: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("project",)
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    project: str
    def __init__(self, project: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "version", "digest", "service", "service_digest", "author", "commit", "environment_digest", "seed", "hardware", "libraries", "dataset", "metrics", "registered_at", "state", "approvals", "golden_digest", "gateways", "given_up")
    class LibrariesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    LIBRARIES_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    APPROVALS_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    service: str
    service_digest: str
    author: str
    commit: str
    environment_digest: str
    seed: int
    hardware: str
    libraries: _containers.ScalarMap[str, str]
    dataset: str
    metrics: _containers.ScalarMap[str, float]
    registered_at: str
    state: str
    approvals: _containers.RepeatedCompositeFieldContainer[Approval]
    golden_digest: str
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayVersion]
    given_up: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., service: _Optional[str] = ..., service_digest: _Optional[str] = ..., author: _Optional[str] = ..., commit: _Optional[str] = ..., environment_digest: _Optional[str] = ..., seed: _Optional[int] = ..., hardware: _Optional[str] = ..., libraries: _Optional[_Mapping[str, str]] = ..., dataset: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., registered_at: _Optional[str] = ..., state: _Optional[str] = ..., approvals: _Optional[_Iterable[_Union[Approval, _Mapping]]] = ..., golden_digest: _Optional[str] = ..., gateways: _Optional[_Iterable[_Union[GatewayVersion, _Mapping]]] = ..., given_up: _Optional[str] = ...) -> None: ...

class Approval(_message.Message):
    __slots__ = ("who", "why", "at")
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    who: str
    why: str
    at: str
    def __init__(self, who: _Optional[str] = ..., why: _Optional[str] = ..., at: _Optional[str] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ("project",)
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    project: str
    def __init__(self, project: _Optional[str] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets",)
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[DatasetInfo]
    def __init__(self, datasets: _Optional[_Iterable[_Union[DatasetInfo, _Mapping]]] = ...) -> None: ...

class DatasetInfo(_message.Message):
    __slots__ = ("name", "id", "service", "service_digest", "rows", "location", "created_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    id: str
    service: str
    service_digest: str
    rows: int
    location: str
    created_at: str
    def __init__(self, name: _Optional[str] = ..., id: _Optional[str] = ..., service: _Optional[str] = ..., service_digest: _Optional[str] = ..., rows: _Optional[int] = ..., location: _Optional[str] = ..., created_at: _Optional[str] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("project", "entity", "keys", "dry_run", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    entity: str
    keys: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    dry_run: bool
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., entity: _Optional[str] = ..., keys: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ..., dry_run: _Optional[bool] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class ForgetProgress(_message.Message):
    __slots__ = ("stage", "result")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    stage: str
    result: ForgetResult
    def __init__(self, stage: _Optional[str] = ..., result: _Optional[_Union[ForgetResult, _Mapping]] = ...) -> None: ...

class ForgetResult(_message.Message):
    __slots__ = ("control_entry", "existed", "places", "hashes", "seconds")
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    existed: bool
    places: _containers.RepeatedCompositeFieldContainer[ForgottenPlace]
    hashes: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, control_entry: _Optional[int] = ..., existed: _Optional[bool] = ..., places: _Optional[_Iterable[_Union[ForgottenPlace, _Mapping]]] = ..., hashes: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class ForgottenPlace(_message.Message):
    __slots__ = ("kind", "name", "rows_removed", "rows_cleared", "files", "note")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    ROWS_CLEARED_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    rows_removed: int
    rows_cleared: int
    files: int
    note: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., rows_removed: _Optional[int] = ..., rows_cleared: _Optional[int] = ..., files: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class AddLabelsRequest(_message.Message):
    __slots__ = ("project", "model", "metric", "columns")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    metric: str
    columns: _containers.RepeatedCompositeFieldContainer[_types_pb2.Column]
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., metric: _Optional[str] = ..., columns: _Optional[_Iterable[_Union[_types_pb2.Column, _Mapping]]] = ...) -> None: ...

class AddLabelsResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class GetQualityRequest(_message.Message):
    __slots__ = ("project", "model", "to", "every", "output")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    to: int
    every: int
    output: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., to: _Optional[int] = ..., every: _Optional[int] = ..., output: _Optional[str] = ..., **kwargs) -> None: ...

class GetQualityResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...

class GetDriftRequest(_message.Message):
    __slots__ = ("project", "model", "version", "arm", "to", "features", "histograms")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    arm: str
    to: int
    features: _containers.RepeatedScalarFieldContainer[str]
    histograms: bool
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., arm: _Optional[str] = ..., to: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., histograms: _Optional[bool] = ..., **kwargs) -> None: ...

class GetDriftResponse(_message.Message):
    __slots__ = ("version", "arm", "verdict", "to", "rows", "uncounted_rows", "features", "report")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    UNCOUNTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    version: int
    arm: str
    verdict: str
    to: int
    rows: int
    uncounted_rows: int
    features: _containers.RepeatedCompositeFieldContainer[FeatureDrift]
    report: str
    def __init__(self, version: _Optional[int] = ..., arm: _Optional[str] = ..., verdict: _Optional[str] = ..., to: _Optional[int] = ..., rows: _Optional[int] = ..., uncounted_rows: _Optional[int] = ..., features: _Optional[_Iterable[_Union[FeatureDrift, _Mapping]]] = ..., report: _Optional[str] = ..., **kwargs) -> None: ...

class FeatureDrift(_message.Message):
    __slots__ = ("name", "verdict", "effect", "reasons")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    verdict: str
    effect: float
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., verdict: _Optional[str] = ..., effect: _Optional[float] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...
