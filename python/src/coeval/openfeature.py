"""The provider for OpenFeature: `pip install 'coeval[openfeature]'`.

    from openfeature import api
    from coeval.openfeature import CoevalProvider

    api.set_provider_and_wait(CoevalProvider("grpc://127.0.0.1:7400"))
    api.get_client().get_boolean_value("new_ranker", False, EvaluationContext("N14228", {"carrier": "UA"}))

Flags are evaluated by the server, so a change reaches every caller within a quarter of a second, and the units that a split gave
a variant are written down there. A server that is away, or a flag that is not there, gives the caller's own default with
OpenFeature's error code; no call raises and none waits longer than `timeout`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from . import errors
from .client import Client

try:
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.exception import ErrorCode, ProviderNotReadyError
    from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
    from openfeature.provider import AbstractProvider, Metadata
except ImportError as error:
    raise errors.MissingDependency(
        "coeval.openfeature needs openfeature-sdk: pip install 'coeval[openfeature]'"
    ) from error

T = TypeVar("T")


class CoevalProvider(AbstractProvider):
    """Resolves flags on a Coeval server. It owns its connection; `shutdown` of the API closes it."""

    def __init__(self, url: str, project: str | None = None, *, timeout: float = 1.0) -> None:
        super().__init__()
        self._url = url
        self._project = project
        self._timeout = timeout
        self._client: Client | None = None
        if project is not None:
            # Nothing has to be asked first, so a server that comes later is found then.
            self._client = Client(url, project, timeout=timeout)

    def initialize(self, evaluation_context: EvaluationContext) -> None:
        if self._client is None:
            try:
                self._client = Client(self._url, timeout=self._timeout)
            except errors.CoevalError as error:
                raise ProviderNotReadyError(f"no answer from {self._url}: {error}") from error

    def shutdown(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def get_metadata(self) -> Metadata:
        return Metadata(name="coeval")

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        return self._resolve(flag_key, "boolean", default_value, evaluation_context)

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        return self._resolve(flag_key, "string", default_value, evaluation_context)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        return self._resolve(flag_key, "integer", default_value, evaluation_context)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        details = self._resolve(flag_key, "float", default_value, evaluation_context)
        # JSON writes 3.0 as 3 at times, and an integer flag may be asked as a float; the SDK wants a float.
        details.value = float(details.value)
        return details

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        return self._resolve(flag_key, "object", default_value, evaluation_context)

    # A call waits for the server, and an event loop must not.

    async def resolve_boolean_details_async(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        return await asyncio.to_thread(self.resolve_boolean_details, flag_key, default_value, evaluation_context)

    async def resolve_string_details_async(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        return await asyncio.to_thread(self.resolve_string_details, flag_key, default_value, evaluation_context)

    async def resolve_integer_details_async(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        return await asyncio.to_thread(self.resolve_integer_details, flag_key, default_value, evaluation_context)

    async def resolve_float_details_async(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        return await asyncio.to_thread(self.resolve_float_details, flag_key, default_value, evaluation_context)

    async def resolve_object_details_async(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        return await asyncio.to_thread(self.resolve_object_details, flag_key, default_value, evaluation_context)

    def _resolve(
        self, name: str, of: str, default: T, context: EvaluationContext | None
    ) -> FlagResolutionDetails[Any]:
        client = self._client
        if client is None:
            return _failed(default, ErrorCode.PROVIDER_NOT_READY, f"not connected to {self._url}")
        unit = context.targeting_key if context else None
        attributes = context.attributes if context else None
        try:
            value = client.flag(name, unit=unit, context=attributes, type=of)
        except errors.InvalidArgument as error:
            return _failed(default, ErrorCode.INVALID_CONTEXT, str(error))
        except errors.CoevalError as error:
            return _failed(default, ErrorCode.GENERAL, str(error))
        if value.error_code is not None:
            return _failed(default, _code(value.error_code), value.error_message or "")
        metadata: dict[str, bool | int | float | str] = {} if value.entry is None else {"entry": value.entry}
        return FlagResolutionDetails(
            value=value.value, reason=value.reason, variant=value.variant, flag_metadata=metadata
        )


def _code(name: str) -> ErrorCode:
    try:
        return ErrorCode(name)
    except ValueError:
        return ErrorCode.GENERAL


def _failed(default: T, code: ErrorCode, message: str) -> FlagResolutionDetails[T]:
    return FlagResolutionDetails(value=default, reason=Reason.ERROR, error_code=code, error_message=message)
