from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TrainingSetCommand(_message.Message):
    __slots__ = ("project", "service", "dataset", "statuses", "visibility", "seed")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    VISIBILITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    project: str
    service: str
    dataset: str
    statuses: bool
    visibility: str
    seed: int
    def __init__(self, project: _Optional[str] = ..., service: _Optional[str] = ..., dataset: _Optional[str] = ..., statuses: _Optional[bool] = ..., visibility: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class DatasetTicket(_message.Message):
    __slots__ = ("project", "name", "id")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    project: str
    name: str
    id: str
    def __init__(self, project: _Optional[str] = ..., name: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...
