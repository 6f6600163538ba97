from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BeginRolloutRequest(_message.Message):
    __slots__ = ("project", "model", "version", "stage", "dataset", "skip_evaluation", "skip_shadow", "layer", "from_bucket", "to_bucket", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SKIP_EVALUATION_FIELD_NUMBER: _ClassVar[int]
    SKIP_SHADOW_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FROM_BUCKET_FIELD_NUMBER: _ClassVar[int]
    TO_BUCKET_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    stage: str
    dataset: str
    skip_evaluation: bool
    skip_shadow: bool
    layer: str
    from_bucket: int
    to_bucket: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., stage: _Optional[str] = ..., dataset: _Optional[str] = ..., skip_evaluation: _Optional[bool] = ..., skip_shadow: _Optional[bool] = ..., layer: _Optional[str] = ..., from_bucket: _Optional[int] = ..., to_bucket: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class BeginRolloutResponse(_message.Message):
    __slots__ = ("rollout", "existed", "report")
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    rollout: int
    existed: bool
    report: str
    def __init__(self, rollout: _Optional[int] = ..., existed: _Optional[bool] = ..., report: _Optional[str] = ...) -> None: ...

class PlanRolloutRequest(_message.Message):
    __slots__ = ("project", "model", "version")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    version: int
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class PlanRolloutResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...

class GetRolloutRequest(_message.Message):
    __slots__ = ("project", "model")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class GetRolloutResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...

class ChangeRolloutRequest(_message.Message):
    __slots__ = ("project", "model", "change", "features", "who", "why")
    class Change(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CHANGE_UNSPECIFIED: _ClassVar[ChangeRolloutRequest.Change]
        HOLD: _ClassVar[ChangeRolloutRequest.Change]
        RESUME: _ClassVar[ChangeRolloutRequest.Change]
        ACKNOWLEDGE: _ClassVar[ChangeRolloutRequest.Change]
        END: _ClassVar[ChangeRolloutRequest.Change]
        OFF: _ClassVar[ChangeRolloutRequest.Change]
        ON: _ClassVar[ChangeRolloutRequest.Change]
        ADVANCE: _ClassVar[ChangeRolloutRequest.Change]
    CHANGE_UNSPECIFIED: ChangeRolloutRequest.Change
    HOLD: ChangeRolloutRequest.Change
    RESUME: ChangeRolloutRequest.Change
    ACKNOWLEDGE: ChangeRolloutRequest.Change
    END: ChangeRolloutRequest.Change
    OFF: ChangeRolloutRequest.Change
    ON: ChangeRolloutRequest.Change
    ADVANCE: ChangeRolloutRequest.Change
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    model: str
    change: ChangeRolloutRequest.Change
    features: _containers.RepeatedScalarFieldContainer[str]
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., model: _Optional[str] = ..., change: _Optional[_Union[ChangeRolloutRequest.Change, str]] = ..., features: _Optional[_Iterable[str]] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class ChangeRolloutResponse(_message.Message):
    __slots__ = ("control_entry", "existed", "report")
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    existed: bool
    report: str
    def __init__(self, control_entry: _Optional[int] = ..., existed: _Optional[bool] = ..., report: _Optional[str] = ...) -> None: ...
