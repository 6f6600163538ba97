"""What can go wrong, by what the caller would do about it.

The server answers with a gRPC status over two transports (gRPC and Arrow Flight) whose Python libraries raise different
exceptions. Both become one family here. The text is the server's own, without what the transports wrap around it.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn


class CoevalError(Exception):
    """Any failure. `code` is the gRPC status in small letters; `retryable` says whether the same call may succeed later."""

    code = "unknown"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class InvalidArgument(CoevalError, ValueError):
    """The request itself is wrong: a missing column, a wrong type, an unknown option."""

    code = "invalid_argument"


class NotFound(CoevalError, LookupError):
    """No such project, service, source, model or dataset."""

    code = "not_found"


class AlreadyExists(CoevalError):
    """It is there already, and is not the same."""

    code = "already_exists"


class Conflict(CoevalError):
    """The state is not one in which this can be done, or changed under the call."""

    code = "failed_precondition"


class Refused(CoevalError):
    """The server does not do this, or not for this caller."""

    code = "permission_denied"


class ResourceExhausted(CoevalError):
    """A bound was reached: message size, queue length, memory."""

    code = "resource_exhausted"
    retryable = True


class Unavailable(CoevalError, ConnectionError):
    """No server there, or it is starting, draining or cut off from what it needs."""

    code = "unavailable"
    retryable = True


class DeadlineExceeded(CoevalError, TimeoutError):
    """The answer did not come in time."""

    code = "deadline_exceeded"
    retryable = True


class MissingDependency(CoevalError, ImportError):
    """An optional library is needed for this call and is not installed."""

    code = "missing_dependency"


_BY_CODE: dict[str, type[CoevalError]] = {
    "invalid_argument": InvalidArgument,
    "out_of_range": InvalidArgument,
    "not_found": NotFound,
    "already_exists": AlreadyExists,
    "failed_precondition": Conflict,
    "aborted": Conflict,
    "permission_denied": Refused,
    "unauthenticated": Refused,
    "unimplemented": Refused,
    "resource_exhausted": ResourceExhausted,
    "unavailable": Unavailable,
    "deadline_exceeded": DeadlineExceeded,
}

# pyarrow.flight tells some statuses apart by exception class and the others only by a word in the text.
_FLIGHT_CLASSES = {
    "ArrowInvalid": "invalid_argument",
    "ArrowKeyError": "not_found",
    "ArrowNotImplementedError": "unimplemented",
    "ArrowCancelled": "cancelled",
    "FlightUnavailableError": "unavailable",
    "FlightTimedOutError": "deadline_exceeded",
    "FlightUnauthenticatedError": "unauthenticated",
    "FlightUnauthorizedError": "permission_denied",
    "FlightCancelledError": "cancelled",
    "FlightInternalError": "internal",
}
_FLIGHT_TEXT = re.compile(
    r"^(?:Flight |gRPC )?(?:returned|failed with|error,)?.*?,? with message: (?P<text>.*)$", re.DOTALL
)
_FLIGHT_KIND = re.compile(r"^(?:Flight|gRPC) returned (?P<kind>[a-z ]+?) error, with message:")
_FLIGHT_TAIL = re.compile(
    r"\.? (?:gRPC client debug context|Client context|Detail): .*$", re.DOTALL
)
_FLIGHT_KINDS = {
    "invalid argument": "invalid_argument",
    "out of range": "out_of_range",
    "not found": "not_found",
    "already exists": "already_exists",
    "failed precondition": "failed_precondition",
    "aborted": "aborted",
    "resource exhausted": "resource_exhausted",
    "unavailable": "unavailable",
    "timeout": "deadline_exceeded",
    "deadline exceeded": "deadline_exceeded",
    "unimplemented": "unimplemented",
    "unauthenticated": "unauthenticated",
    "permission denied": "permission_denied",
    "unauthorized": "permission_denied",
}


def from_code(code: str, message: str) -> CoevalError:
    """The exception for a status code name such as `not_found`."""
    return _BY_CODE.get(code, CoevalError)(message or code.replace("_", " "), code=code)


def from_grpc(error: Any) -> CoevalError:
    """The exception for a `grpc.RpcError` (which in practice is also a `grpc.Call`)."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    details = error.details() if callable(getattr(error, "details", None)) else None
    return from_code(code.name.lower() if code is not None else "unknown", details or str(error))


def from_flight(error: Exception) -> CoevalError:
    """The exception for what pyarrow.flight raises."""
    text = str(error)
    kind = _FLIGHT_KIND.match(text)
    code = _FLIGHT_KINDS.get(kind["kind"]) if kind else None
    if code is None:
        code = _FLIGHT_CLASSES.get(type(error).__name__, "unknown")
    inner = _FLIGHT_TEXT.match(text)
    message = _FLIGHT_TAIL.sub("", inner["text"] if inner else text).strip()
    return from_code(code, message)


def missing(library: str, call: str) -> NoReturn:
    """Raises the error for an optional library that a call needs."""
    raise MissingDependency(f"{call} needs {library}: pip install 'coeval[{library}]'")
