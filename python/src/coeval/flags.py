"""Feature flags: what the server says a flag is, and where a unit falls.

`coeval.openfeature` is the provider for OpenFeature's SDK; this is what it is made of.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import errors
from ._generated import flags_pb2

#: What every layer throws its units into.
BUCKETS = 10_000

#: A part of a unit's key.
KeyPart = str | int | bool | bytes


@dataclass(frozen=True)
class Placed:
    """Where a unit falls in one layer."""

    bucket: int
    #: Tells units apart: what exposures and rollouts count by.
    unit: int


def place(salt: str, *key: KeyPart) -> Placed:
    """Places a unit, as the server does: SHA-256 of parts, each behind its length.

    With a layer's name as `salt` this is the bucket that splits and rollouts go by. With the project's key for sensitive data, in
    hexadecimal, `unit` is the hash that the log of exposures has in place of the key.
    """
    digest = hashlib.sha256()
    for part in ("coeval-bucket-1", salt, *key):
        data = part if isinstance(part, bytes) else _text(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    words = digest.digest()
    bucket = int.from_bytes(words[:8], "big") * BUCKETS >> 64
    return Placed(bucket, int.from_bytes(words[8:16], "big"))


def _text(part: KeyPart) -> str:
    if isinstance(part, bool):
        return "true" if part else "false"
    if isinstance(part, (str, int)):
        return str(part)
    raise errors.InvalidArgument(f"a unit's key has texts, integers, booleans and bytes, not {type(part).__name__}")


@dataclass(frozen=True)
class FlagValue:
    """What a flag is for one unit. After an error `value` is None: whoever asks has a default of its own."""

    name: str
    value: Any
    variant: str | None
    #: OpenFeature's: TARGETING_MATCH, SPLIT, DEFAULT, DISABLED or ERROR.
    reason: str
    #: OpenFeature's: FLAG_NOT_FOUND, PARSE_ERROR, TYPE_MISMATCH, TARGETING_KEY_MISSING or GENERAL.
    error_code: str | None
    error_message: str | None
    #: The entry of the control log that made the flag so.
    entry: int | None
    #: boolean, string, integer, float or object; None for a flag that does not exist.
    type: str | None


def request(
    project: str,
    names: Mapping[str, str | None] | Iterable[str],
    unit: str | None,
    context: Mapping[str, Any] | None,
    expose: bool,
) -> flags_pb2.EvaluateFlagsRequest:
    """The question about some flags, or about all if none are named."""
    wanted = names.items() if isinstance(names, Mapping) else ((name, None) for name in names)
    message = flags_pb2.EvaluateFlagsRequest(
        project=project,
        flags=[flags_pb2.FlagQuestion(name=name, type=of or "") for name, of in wanted],
        context=json.dumps(dict(context), default=_attribute) if context else "",
        exposures=flags_pb2.EXPOSURES_LOG if expose else flags_pb2.EXPOSURES_NONE,
    )
    if unit is not None:
        message.targeting_key = unit
    return message


def _attribute(value: Any) -> Any:
    """What JSON has no word for: times become RFC 3339, in UTC where they have no zone."""
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)).isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return value.item()
    raise errors.InvalidArgument(f"a {type(value).__name__} cannot be an attribute of a context")


def read(value: flags_pb2.FlagValue) -> FlagValue:
    return FlagValue(
        name=value.name,
        value=json.loads(value.value) if value.value else None,
        variant=value.variant or None if not value.error_code else None,
        reason=value.reason,
        error_code=value.error_code or None,
        error_message=value.error_message or None,
        entry=value.entry or None,
        type=value.type or None,
    )
