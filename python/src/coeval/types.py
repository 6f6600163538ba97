"""The types of values, and what calls return.

A type travels in the catalog as text (`float64`, `list<string>`, `decimal(18,2)`); each text is exactly one Arrow type.
Results keep the protobuf answer and decode a column when it is asked for, so that a caller who wants one number pays
for one.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from . import errors

if TYPE_CHECKING:
    import pandas

    from ._generated import gateway_pb2

TIMESTAMP = pa.timestamp("us", tz="UTC")
# Stands for "no time" in event times and positions.
NO_TIME = -(2**63)

_PLAIN: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
    "timestamp": TIMESTAMP,
    "date": pa.date32(),
}
_PLAIN_TEXT = {arrow: text for text, arrow in _PLAIN.items()}


def parse_type(text: str) -> pa.DataType:
    """The Arrow type a type's text stands for."""
    parser = _TypeParser(text)
    parsed = parser.type()
    if parser.rest.strip():
        parser.fail()
    return parsed


class _TypeParser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.rest = text

    def fail(self) -> Any:
        raise errors.InvalidArgument(f"`{self.text}` is not a type")

    def word(self) -> str:
        self.rest = self.rest.lstrip()
        end = 0
        while end < len(self.rest) and (self.rest[end].isalnum() or self.rest[end] in "_-"):
            end += 1
        word, self.rest = self.rest[:end], self.rest[end:]
        return word or self.fail()

    def expect(self, mark: str) -> None:
        self.rest = self.rest.lstrip()
        if not self.rest.startswith(mark):
            self.fail()
        self.rest = self.rest[len(mark) :]

    def sees(self, mark: str) -> bool:
        self.rest = self.rest.lstrip()
        return self.rest.startswith(mark)

    def number(self) -> int:
        word = self.word()
        try:
            return int(word)
        except ValueError:
            return self.fail()

    def type(self) -> pa.DataType:
        word = self.word()
        if word in _PLAIN:
            return _PLAIN[word]
        if word == "decimal":
            self.expect("(")
            precision = self.number()
            self.expect(",")
            scale = self.number()
            self.expect(")")
            return pa.decimal128(precision, scale)
        if word == "vector":
            self.expect("(")
            dimensions = self.number()
            self.expect(")")
            return pa.list_(pa.float32(), dimensions)
        if word == "list":
            self.expect("<")
            item = self.type()
            self.expect(">")
            return pa.list_(item)
        if word == "map":
            self.expect("<")
            if self.type() != pa.string():
                self.fail()
            self.expect(",")
            value = self.type()
            self.expect(">")
            return pa.map_(pa.string(), value)
        if word == "struct":
            self.expect("<")
            fields: list[pa.Field] = []
            while not self.sees(">"):
                if fields:
                    self.expect(",")
                name = self.word()
                self.expect(":")
                fields.append(pa.field(name, self.type()))
            self.expect(">")
            return pa.struct(fields)
        return self.fail()


def type_text(arrow: pa.DataType) -> str:
    """The text of an Arrow type that is one of ours."""
    if arrow in _PLAIN_TEXT:
        return _PLAIN_TEXT[arrow]
    if pa.types.is_decimal128(arrow):
        return f"decimal({arrow.precision},{arrow.scale})"
    if pa.types.is_fixed_size_list(arrow) and arrow.value_type == pa.float32():
        return f"vector({arrow.list_size})"
    if pa.types.is_list(arrow):
        return f"list<{type_text(arrow.value_type)}>"
    if pa.types.is_map(arrow):
        return f"map<string,{type_text(arrow.item_type)}>"
    if pa.types.is_struct(arrow):
        return f"struct<{','.join(f'{f.name}:{type_text(f.type)}' for f in arrow)}>"
    raise errors.InvalidArgument(f"arrow type `{arrow}` has no coeval type")


def canonical_type(arrow: pa.DataType) -> pa.DataType:
    """The one of our types that holds every value of an Arrow type nobody declared."""
    t = pa.types
    if t.is_dictionary(arrow):
        return canonical_type(arrow.value_type)
    if t.is_boolean(arrow):
        return pa.bool_()
    if t.is_int8(arrow) or t.is_int16(arrow) or t.is_int32(arrow) or t.is_uint8(arrow) or t.is_uint16(arrow):
        return pa.int32()
    if t.is_integer(arrow):
        return pa.int64()
    if t.is_float16(arrow) or t.is_float32(arrow):
        return pa.float32()
    if t.is_float64(arrow):
        return pa.float64()
    if t.is_string(arrow) or t.is_large_string(arrow) or t.is_string_view(arrow):
        return pa.string()
    if t.is_binary(arrow) or t.is_large_binary(arrow) or t.is_fixed_size_binary(arrow) or t.is_binary_view(arrow):
        return pa.binary()
    if t.is_timestamp(arrow):
        return TIMESTAMP
    if t.is_date(arrow):
        return pa.date32()
    if t.is_decimal(arrow) and arrow.precision <= 38:
        return pa.decimal128(arrow.precision, arrow.scale)
    if t.is_fixed_size_list(arrow) and t.is_float32(arrow.value_type):
        return pa.list_(pa.float32(), arrow.list_size)
    if t.is_list(arrow) or t.is_large_list(arrow):
        return pa.list_(canonical_type(arrow.value_type))
    if t.is_map(arrow):
        return pa.map_(pa.string(), canonical_type(arrow.item_type))
    if t.is_struct(arrow):
        return pa.struct([pa.field(f.name, canonical_type(f.type)) for f in arrow])
    raise errors.InvalidArgument(f"arrow type `{arrow}` has no coeval type")


class Status(enum.IntEnum):
    """What is true of a feature value."""

    UNSPECIFIED = 0
    PRESENT = 1
    NULL_VALUE = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4
    UNAVAILABLE = 5


class UnavailableReason(enum.IntEnum):
    """Why a value is UNAVAILABLE."""

    UNSPECIFIED = 0
    TIMEOUT = 1
    BACKFILLING = 2
    AT_BEFORE_STORE = 3
    STORE_ERROR = 4
    OFFLINE_ONLY = 5


class RowStatus(enum.IntEnum):
    """How a predicted row came about."""

    UNSPECIFIED = 0
    OK = 1
    FALLBACK = 2
    FAILED = 3


@dataclass(frozen=True)
class Position:
    """A point in the order of events; `time` in microseconds, None where nothing was ever applied."""

    time: int | None
    sequence: int


@dataclass(frozen=True)
class ViewAnswer:
    """What a view answered from, row by row."""

    view: str
    alias: str
    event_times: pa.Array
    positions: list[Position]
    storage_digest: str


class Features:
    """Feature values of rows, in the order asked, with a truthful status each."""

    def __init__(
        self,
        columns: Any,
        at: Any,
        views: Any,
        *,
        rows: int,
        semantic_digest: str,
        stale: bool,
        types: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        self._columns = columns
        self._at = at
        self._views = views
        self._rows = rows
        self._types = types or {}
        #: Digest of the compiled service that answered.
        self.semantic_digest = semantic_digest
        #: Some value is older than its view's declared freshness.
        self.stale = stale

    @property
    def names(self) -> list[str]:
        """The features, in order."""
        return [column.name for column in self._columns]

    @property
    def at(self) -> pa.Array:
        """The time each row was answered at."""
        return _times(self._at)

    @property
    def statuses(self) -> dict[str, np.ndarray]:
        """For each feature an int8 array with one `Status` per row."""
        return {column.name: np.array(column.statuses, dtype=np.int8) for column in self._columns}

    @property
    def reasons(self) -> dict[str, list[UnavailableReason]]:
        """For the features with an UNAVAILABLE row: one reason per row."""
        return {c.name: [UnavailableReason(r) for r in c.reasons] for c in self._columns if len(c.reasons)}

    @property
    def views(self) -> list[ViewAnswer]:
        """Event times and positions of each view read; empty unless asked for with `provenance=True`."""
        return [
            ViewAnswer(
                view=view.view,
                alias=view.alias,
                event_times=_times(view.event_times),
                positions=[Position(None if p.time == NO_TIME else p.time, p.sequence) for p in view.positions],
                storage_digest=view.storage_digest,
            )
            for view in self._views
        ]

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, name: str) -> pa.Array:
        for column in self._columns:
            if column.name == name:
                return self._decode(column)
        raise KeyError(name)

    def to_arrow(self, statuses: bool = False) -> pa.Table:
        """One column per feature; with `statuses` each is followed by `<feature>__status` (int8)."""
        columns: dict[str, pa.Array] = {}
        for column in self._columns:
            columns[column.name] = self._decode(column)
            if statuses:
                numbers = bytes(column.statuses)
                columns[f"{column.name}__status"] = pa.Array.from_buffers(
                    pa.int8(), len(numbers), [None, pa.py_buffer(numbers)]
                )
        return pa.table(columns)

    def to_pandas(self, statuses: bool = False) -> pandas.DataFrame:
        """As `to_arrow`, as a DataFrame."""
        return _pandas(self.to_arrow(statuses), "Features.to_pandas")

    def _decode(self, column: gateway_pb2.FeatureColumn) -> pa.Array:
        from .columns import from_column

        return from_column(column.values, self._types.get(column.name), rows=self._rows)


@dataclass(frozen=True)
class Outcome:
    """How one row of a prediction came about."""

    version: int
    arm: str
    status: RowStatus
    reason: str
    wait_reason: str
    """What the row waited for longest before the model ran."""
    wait_us: int
    waits: Mapping[str, int] = field(default_factory=dict)
    """What it waited for, in microseconds: `executor_busy`, `linger`, `memory_permit`, `tier`; only what is not 0."""
    cached: bool = False
    """The model was not asked: it has answered the same inputs before."""


@dataclass(frozen=True)
class Timings:
    """Microseconds the server spent in each stage."""

    features_us: int
    transforms_us: int
    queue_us: int
    forward_us: int
    total_us: int


class Predictions:
    """What a model answered, row by row."""

    def __init__(self, response: gateway_pb2.PredictResponse, types: Mapping[str, pa.DataType] | None = None) -> None:
        self._response = response
        self._types = types

    @property
    def outputs(self) -> dict[str, pa.Array]:
        """One array per declared output; null where the row failed."""
        from .columns import from_column

        rows = len(self._response.outcomes)
        return {column.name: from_column(column, rows=rows) for column in self._response.outputs}

    @property
    def outcomes(self) -> list[Outcome]:
        """One per row."""
        from ._generated import gateway_pb2

        return [
            Outcome(
                o.version,
                o.arm,
                RowStatus(o.status),
                o.reason,
                gateway_pb2.WaitReason.Name(o.wait_reason),
                o.wait_us,
                {part.name.removesuffix("_us"): micros for part, micros in o.waits.ListFields()},
                o.cached,
            )
            for o in self._response.outcomes
        ]

    @property
    def features(self) -> Features | None:
        """What the model was given; None unless asked for with `include_features=True`."""
        response = self._response
        if not response.features:
            return None
        return Features(
            response.features,
            response.at,
            response.views,
            rows=len(response.outcomes),
            semantic_digest=response.semantic_digest,
            stale=response.stale,
            types=self._types,
        )

    @property
    def at(self) -> pa.Array:
        """The time each row was answered at."""
        return _times(self._response.at)

    @property
    def timings(self) -> Timings:
        t = self._response.timings
        return Timings(t.features_us, t.transforms_us, t.queue_us, t.forward_us, t.total_us)

    @property
    def request_id(self) -> str:
        return self._response.request_id

    @property
    def semantic_digest(self) -> str:
        return self._response.semantic_digest

    @property
    def stale(self) -> bool:
        return self._response.stale

    def __len__(self) -> int:
        return len(self._response.outcomes)

    def __getitem__(self, output: str) -> np.ndarray:
        """One output as a numpy array; NaN where the row failed."""
        return self.outputs[output].to_numpy(zero_copy_only=False)

    def to_arrow(self) -> pa.Table:
        return pa.table(self.outputs)

    def to_pandas(self) -> pandas.DataFrame:
        return _pandas(self.to_arrow(), "Predictions.to_pandas")


@dataclass(frozen=True)
class Rejected:
    """An event that can never be applied."""

    row: int
    reason: str


@dataclass(frozen=True)
class PushResult:
    """What became of pushed events."""

    accepted: int = 0
    duplicates: int = 0
    early: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    last_sequence: int = 0

    def __add__(self, later: PushResult) -> PushResult:
        return PushResult(
            self.accepted + later.accepted,
            self.duplicates + later.duplicates,
            self.early + later.early,
            self.rejected + later.rejected,
            later.last_sequence or self.last_sequence,
        )


@dataclass(frozen=True)
class Materialized:
    """Rows of one source made visible in one view."""

    source: str
    view: str
    rows_read: int
    rows_applied: int
    rows_stale: int


@dataclass(frozen=True)
class Approval:
    """Somebody said that a version may be served."""

    who: str
    why: str
    at: str


@dataclass(frozen=True)
class GatewayVersion:
    """One version on one gateway."""

    gateway: str
    #: Empty for the gateway that was asked.
    address: str
    #: `loading`, `ready` or `failed`.
    state: str
    reason: str
    #: What whoever deploys it should know.
    notes: list[str]
    memory_bytes: int
    #: The largest batch it is served with.
    max_rows: int


@dataclass(frozen=True)
class Model:
    """One registered version, with its whole record."""

    name: str
    version: int
    digest: str
    service: str
    service_digest: str
    #: `registered`, `preparing`, `active`, `previous` or `champion`.
    state: str
    author: str
    commit: str
    environment_digest: str
    seed: int | None
    hardware: str
    libraries: dict[str, str]
    dataset: str
    metrics: dict[str, float]
    registered_at: str
    approvals: list[Approval]
    #: Empty without golden rows.
    golden_digest: str
    #: Why the last deploy came to nothing; empty after one that did not.
    given_up: str
    gateways: list[GatewayVersion]


@dataclass(frozen=True)
class Registered:
    """The version a model file got; `existed` when the same file was registered before."""

    version: int
    digest: str
    existed: bool


@dataclass(frozen=True)
class Deployed:
    """A version is active; `existed` when it was so before."""

    version: int
    #: The version that requests which name none go to.
    champion: int
    existed: bool
    #: What the gateways found out that whoever deploys should know.
    notes: list[str]


@dataclass(frozen=True)
class Traffic:
    """Where requests go that name no version; 0 stands for nowhere."""

    champion: int
    before: int
    #: What a rollback would go back to.
    previous: int


@dataclass(frozen=True)
class FeatureDrift:
    """The verdict on one feature or output."""

    name: str
    #: STABLE, INSUFFICIENT_DATA or DRIFT.
    verdict: str
    #: How far by the distance that decides, without what noise adds.
    effect: float
    #: In words, the worst first.
    reasons: list[str]


@dataclass(frozen=True)
class Drift:
    """Whether what a version was served looks like what it was trained on."""

    version: int
    arm: str
    #: The worst of the features.
    verdict: str
    #: Whole hours.
    since: datetime.datetime
    until: datetime.datetime
    rows: int
    #: Rows that were answered and not counted; `report["uncounted"]` says why.
    uncounted_rows: int
    features: list[FeatureDrift]
    #: All of it, with rates, distances, floors and (when asked for) histograms.
    report: dict[str, Any]

    def drifted(self) -> list[str]:
        return [feature.name for feature in self.features if feature.verdict == "DRIFT"]


@dataclass(frozen=True)
class SourceReport:
    """What a source's known-at rule did to one training set.

    A row is hidden when some row of the spine was late enough for its event time, but not for the time it became known.
    """

    source: str
    #: Rows that were read.
    rows: int
    #: Rows hidden from at least one row of the spine, each counted once and under one of the reasons that follow.
    hidden: int
    hidden_by_created_time: int
    hidden_by_delay: int
    hidden_by_every: int
    hidden_by_arrival: int
    #: False with `visibility="event_time"`, which let them through: the numbers then say what would have been hidden.
    enforced: bool


@dataclass(frozen=True)
class DatasetInfo:
    """A stored training set."""

    name: str
    id: str
    service: str
    service_digest: str
    rows: int
    location: str
    created_at: str


@dataclass(frozen=True)
class Service:
    name: str
    semantic_digest: str
    #: Columns a request or spine must carry.
    inputs: pa.Schema
    features: pa.Schema
    #: Columns that requests to its models may carry beside: keys of units that canaries randomise.
    units: pa.Schema = field(default_factory=lambda: pa.schema([]))


@dataclass(frozen=True)
class View:
    name: str
    entity: str
    storage_digest: str
    semantic_digest: str
    ready: bool


@dataclass(frozen=True)
class Source:
    name: str
    #: `files`, `static` or `stream`.
    kind: str
    schema: pa.Schema
    event_time: str
    created_time: str


@dataclass(frozen=True)
class Catalog:
    """What the server serves."""

    project: str
    digest: str
    control_head: int
    views: dict[str, View]
    services: dict[str, Service]
    sources: dict[str, Source]

    def __iter__(self) -> Iterator[Service]:
        return iter(self.services.values())


def _times(microseconds: Any) -> pa.Array:
    values = np.array(microseconds, dtype=np.int64)
    return pa.array(values, mask=values == NO_TIME).view(TIMESTAMP)


def _pandas(table: pa.Table, call: str) -> pandas.DataFrame:
    try:
        import pandas  # noqa: F401
    except ImportError:
        errors.missing("pandas", call)
    return table.to_pandas()
