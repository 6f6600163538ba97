from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Exposures(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPOSURES_UNSPECIFIED: _ClassVar[Exposures]
    EXPOSURES_LOG: _ClassVar[Exposures]
    EXPOSURES_NONE: _ClassVar[Exposures]
EXPOSURES_UNSPECIFIED: Exposures
EXPOSURES_LOG: Exposures
EXPOSURES_NONE: Exposures

class EvaluateFlagsRequest(_message.Message):
    __slots__ = ("project", "flags", "targeting_key", "context", "exposures")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TARGETING_KEY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    EXPOSURES_FIELD_NUMBER: _ClassVar[int]
    project: str
    flags: _containers.RepeatedCompositeFieldContainer[FlagQuestion]
    targeting_key: str
    context: str
    exposures: Exposures
    def __init__(self, project: _Optional[str] = ..., flags: _Optional[_Iterable[_Union[FlagQuestion, _Mapping]]] = ..., targeting_key: _Optional[str] = ..., context: _Optional[str] = ..., exposures: _Optional[_Union[Exposures, str]] = ...) -> None: ...

class FlagQuestion(_message.Message):
    __slots__ = ("name", "type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ...) -> None: ...

class EvaluateFlagsResponse(_message.Message):
    __slots__ = ("flags", "control_head")
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_HEAD_FIELD_NUMBER: _ClassVar[int]
    flags: _containers.RepeatedCompositeFieldContainer[FlagValue]
    control_head: int
    def __init__(self, flags: _Optional[_Iterable[_Union[FlagValue, _Mapping]]] = ..., control_head: _Optional[int] = ...) -> None: ...

class FlagValue(_message.Message):
    __slots__ = ("name", "value", "variant", "reason", "error_code", "error_message", "entry", "type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    variant: str
    reason: str
    error_code: str
    error_message: str
    entry: int
    type: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., variant: _Optional[str] = ..., reason: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., entry: _Optional[int] = ..., type: _Optional[str] = ...) -> None: ...

class ListFlagsRequest(_message.Message):
    __slots__ = ("project", "names")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    project: str
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, project: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ListFlagsResponse(_message.Message):
    __slots__ = ("flags", "holdout", "control_head")
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    HOLDOUT_FIELD_NUMBER: _ClassVar[int]
    CONTROL_HEAD_FIELD_NUMBER: _ClassVar[int]
    flags: _containers.RepeatedCompositeFieldContainer[FlagInfo]
    holdout: HoldoutInfo
    control_head: int
    def __init__(self, flags: _Optional[_Iterable[_Union[FlagInfo, _Mapping]]] = ..., holdout: _Optional[_Union[HoldoutInfo, _Mapping]] = ..., control_head: _Optional[int] = ...) -> None: ...

class FlagInfo(_message.Message):
    __slots__ = ("flag", "entry", "who", "why", "at", "attributes", "problems")
    FLAG_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    flag: str
    entry: int
    who: str
    why: str
    at: str
    attributes: _containers.RepeatedCompositeFieldContainer[FlagAttribute]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, flag: _Optional[str] = ..., entry: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ..., at: _Optional[str] = ..., attributes: _Optional[_Iterable[_Union[FlagAttribute, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class FlagAttribute(_message.Message):
    __slots__ = ("name", "types")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    name: str
    types: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., types: _Optional[_Iterable[str]] = ...) -> None: ...

class HoldoutInfo(_message.Message):
    __slots__ = ("buckets", "entry", "who", "why", "at")
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    buckets: int
    entry: int
    who: str
    why: str
    at: str
    def __init__(self, buckets: _Optional[int] = ..., entry: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ..., at: _Optional[str] = ...) -> None: ...

class SetFlagRequest(_message.Message):
    __slots__ = ("project", "flag", "after", "reshuffle", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    RESHUFFLE_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    flag: str
    after: int
    reshuffle: bool
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., flag: _Optional[str] = ..., after: _Optional[int] = ..., reshuffle: _Optional[bool] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class SetFlagResponse(_message.Message):
    __slots__ = ("control_entry", "existed", "attributes")
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    existed: bool
    attributes: _containers.RepeatedCompositeFieldContainer[FlagAttribute]
    def __init__(self, control_entry: _Optional[int] = ..., existed: _Optional[bool] = ..., attributes: _Optional[_Iterable[_Union[FlagAttribute, _Mapping]]] = ...) -> None: ...

class RemoveFlagRequest(_message.Message):
    __slots__ = ("project", "name", "after", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    name: str
    after: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., name: _Optional[str] = ..., after: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RemoveFlagResponse(_message.Message):
    __slots__ = ("control_entry",)
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    def __init__(self, control_entry: _Optional[int] = ...) -> None: ...

class SetHoldoutRequest(_message.Message):
    __slots__ = ("project", "buckets", "who", "why")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    project: str
    buckets: int
    who: str
    why: str
    def __init__(self, project: _Optional[str] = ..., buckets: _Optional[int] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class SetHoldoutResponse(_message.Message):
    __slots__ = ("control_entry", "existed")
    CONTROL_ENTRY_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    control_entry: int
    existed: bool
    def __init__(self, control_entry: _Optional[int] = ..., existed: _Optional[bool] = ...) -> None: ...

class GetFlagHistoryRequest(_message.Message):
    __slots__ = ("project", "name", "changes_max")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANGES_MAX_FIELD_NUMBER: _ClassVar[int]
    project: str
    name: str
    changes_max: int
    def __init__(self, project: _Optional[str] = ..., name: _Optional[str] = ..., changes_max: _Optional[int] = ...) -> None: ...

class GetFlagHistoryResponse(_message.Message):
    __slots__ = ("changes", "truncated")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[FlagChange]
    truncated: bool
    def __init__(self, changes: _Optional[_Iterable[_Union[FlagChange, _Mapping]]] = ..., truncated: _Optional[bool] = ...) -> None: ...

class FlagChange(_message.Message):
    __slots__ = ("entry", "at", "who", "why", "flag")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    entry: int
    at: str
    who: str
    why: str
    flag: str
    def __init__(self, entry: _Optional[int] = ..., at: _Optional[str] = ..., who: _Optional[str] = ..., why: _Optional[str] = ..., flag: _Optional[str] = ...) -> None: ...

class GetFlagExposuresRequest(_message.Message):
    __slots__ = ("project", "name", "to")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    project: str
    name: str
    to: int
    def __init__(self, project: _Optional[str] = ..., name: _Optional[str] = ..., to: _Optional[int] = ..., **kwargs) -> None: ...

class GetFlagExposuresResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...
