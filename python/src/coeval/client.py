"""The client: one connection for gRPC, one for Arrow Flight, both to the same port.

Messages are bounded and calls have deadlines; a call that streams (training sets, pushes) has none, because how long it
takes is the caller's choice.
"""

from __future__ import annotations

import collections
import datetime
import difflib
import io
import json
import os
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from . import environment, errors, tables
from . import flags as _flags
from ._generated import (
    control_pb2,
    control_pb2_grpc,
    flight_pb2,
    gateway_pb2,
    gateway_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    rollout_pb2,
)
from .columns import to_column
from .dataset import Dataset, Flights, SpineWriter, Stream
from .golden import Golden
from .types import (
    TIMESTAMP,
    Approval,
    Catalog,
    DatasetInfo,
    Deployed,
    Drift,
    FeatureDrift,
    Features,
    GatewayVersion,
    Materialized,
    Model,
    Predictions,
    PushResult,
    Registered,
    Rejected,
    Service,
    Source,
    Traffic,
    View,
    parse_type,
)

# Responses hold whole feature batches; requests are cut to tables.BATCH_BYTES_MAX or fail with a clear error.
RECEIVE_BYTES_MAX = 64 * 1024 * 1024
SEND_BYTES_MAX = 64 * 1024 * 1024
LABEL_ROWS = 100_000
MODEL_CHUNK_BYTES = 1024 * 1024
# As long as the server waits for its gateways, and a little longer.
DEPLOY_SECONDS_MAX = 660.0
# A window of a month over many gateways is read and judged.
DRIFT_SECONDS = 120.0
# Messages a Pusher has sent and not yet seen acknowledged.
PUSHES_OUTSTANDING_MAX = 64


def connect(url: str, project: str | None = None, *, timeout: float = 30.0) -> Client:
    """Connects to a server at `grpc://host:port` (or `grpcs://host:port`).

    Without `project` the server says which one it serves. `timeout` is the deadline of each single call in seconds.
    """
    return Client(url, project, timeout=timeout)


class Client:
    """A connection to a Coeval server. Safe to share between threads; close it, or use it in a `with`."""

    def __init__(self, url: str, project: str | None = None, *, timeout: float = 30.0) -> None:
        scheme, address = _address(url)
        self._timeout = timeout
        options = [
            ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
            ("grpc.max_send_message_length", SEND_BYTES_MAX),
        ]
        if scheme == "grpcs":
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._flight_location = f"{'grpc+tls' if scheme == 'grpcs' else 'grpc+tcp'}://{address}"
        self._flight_client: Any = None
        self._gateway = gateway_pb2_grpc.GatewayStub(self._channel)
        self._ingest = ingest_pb2_grpc.IngestStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._catalog: Catalog | None = None
        self._model_services: dict[str, str] = {}
        self._project = project
        if project is None:
            try:
                self._project = self.catalog().project
            except BaseException:
                self.close()
                raise

    @property
    def project(self) -> str:
        """The project every call is about."""
        return self._project or ""

    def close(self) -> None:
        """Closes both connections."""
        self._channel.close()
        if self._flight_client is not None:
            self._flight_client.close()
            self._flight_client = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is there.

    def catalog(self, refresh: bool = False) -> Catalog:
        """Views, services and sources as the server serves them; asked once and kept unless `refresh`."""
        if self._catalog is None or refresh:
            request = control_pb2.GetCatalogRequest(project=self.project)
            self._catalog = _catalog(self._call(self._control.GetCatalog, request))
        return self._catalog

    def models(self) -> list[Model]:
        """Every registered version of every model."""
        request = control_pb2.ListModelsRequest(project=self.project)
        models = [_model(info) for info in self._call(self._control.ListModels, request).models]
        self._model_services = {model.name: model.service for model in models}
        return models

    def datasets(self) -> list[DatasetInfo]:
        """The training sets the server keeps."""
        request = control_pb2.ListDatasetsRequest(project=self.project)
        return [
            DatasetInfo(d.name, d.id, d.service, d.service_digest, d.rows, d.location, d.created_at)
            for d in self._call(self._control.ListDatasets, request).datasets
        ]

    def refresh(self, wait_ready: bool = True, timeout: float = 600.0, *, at_least: int = 0) -> int:
        """Makes the server read its control log now; with `wait_ready`, waits until every view answers.

        Returns the entry served. Raises `DeadlineExceeded` with the server's reasons when it is not ready in time.
        """
        ends = time.monotonic() + timeout
        pause = 0.05
        while True:
            left = ends - time.monotonic()
            request = control_pb2.RefreshRequest(project=self.project, at_least=at_least)
            response = self._call(self._control.Refresh, request, timeout=max(0.001, min(self._timeout, left)))
            if response.ready or not wait_ready:
                self._catalog = None
                return response.control_head
            if left <= pause:
                reasons = "; ".join(response.reasons) or "no reason given"
                raise errors.DeadlineExceeded(f"not ready after {timeout:g} s: {reasons}")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    # Training.

    def training_set(
        self,
        service: str,
        spine: Any,
        name: str | None = None,
        *,
        statuses: bool = False,
        visibility: str = "known",
        order: str = "spine",
        seed: int = 0,
    ) -> Dataset:
        """The features of `service` as they were known at each row's `event_timestamp`.

        `spine` is a DataFrame, an Arrow table, batch or `RecordBatchReader`, or a dict of columns: entity keys, request
        fields, `event_timestamp` and any other columns. Every row comes back, in order, its own columns first. With `name`
        the server keeps the result as a dataset; with `statuses` each feature is followed by `<feature>__status`.
        `visibility` is `known`, `event_time` or `ingested`. With `order="any"` rows come as they are ready, each with its
        place in the spine in the column `__ordinal`; what the server keeps is in the spine's order either way. The same
        inputs under the same name are one dataset: where the server has it, nothing is computed (`Dataset.existed`).

        Nothing is sent before the result is read.
        """
        if visibility not in ("known", "event_time", "ingested"):
            raise errors.InvalidArgument(f"visibility `{visibility}`: known, event_time or ingested")
        if order not in ("spine", "any"):
            raise errors.InvalidArgument(f"order `{order}`: spine or any")
        types = {**self._input_types(service), "event_timestamp": TIMESTAMP}
        schema, batches = tables.to_batches(spine, types)
        if "event_timestamp" not in schema.names:
            raise errors.InvalidArgument(
                f"the spine has no column `event_timestamp`; it has {', '.join(f'`{n}`' for n in schema.names)}"
            )
        command = flight_pb2.TrainingSetCommand(
            project=self.project,
            service=service,
            dataset=name or "",
            statuses=statuses,
            visibility=visibility,
            seed=seed,
            order=order,
        )

        def compute(encode_for: str) -> Stream:
            command.encode_for = encode_for
            descriptor = flight.FlightDescriptor.for_command(command.SerializeToString())
            try:
                writer, reader = self._flight().do_exchange(descriptor)
            except (flight.FlightError, pa.ArrowException) as error:
                raise errors.from_flight(error) from error
            spine_writer = SpineWriter(writer, schema, batches, reader.cancel)
            spine_writer.start()
            return Stream(reader, spine_writer)

        return Dataset(Flights(self.project, self._flight), name, compute=compute)

    def dataset(self, name: str, id: str | None = None) -> Dataset:
        """A dataset the server keeps; the newest of that name unless `id` says which."""
        return Dataset(Flights(self.project, self._flight), name, id or "")

    # Serving.

    def features(
        self,
        what: str | Sequence[str],
        rows: Any,
        *,
        at: Any = None,
        provenance: bool = False,
        deadline_ms: int = 0,
    ) -> Features:
        """Features of a service (by name) or a list of features (`view:feature`, `view:*`) for rows of keys.

        `rows` is a dict of columns, a DataFrame or an Arrow table. `at`, one time or one per row, is refused unless the
        server allows request time. `provenance` adds `views`: event times and positions.
        """
        if isinstance(what, str):
            table = self._request_rows(self._service(what), rows)
            request = gateway_pb2.GetFeaturesRequest(service=what)
            types = {f.name: f.type for f in self._service(what).features}
        else:
            table = tables.to_table(rows)
            request = gateway_pb2.GetFeaturesRequest(features=gateway_pb2.FeatureList(names=list(what)))
            types = {}
        request.project = self.project
        request.rows.extend(_columns(table))
        if at is not None:
            request.at.extend(tables.to_microseconds(at, table.num_rows))
        request.include_provenance = provenance
        request.deadline_ms = deadline_ms
        answer = self._call(self._gateway.GetFeatures, request)
        return Features(
            answer.features,
            answer.at,
            answer.views,
            rows=answer.rows,
            semantic_digest=answer.semantic_digest,
            stale=answer.stale,
            types=types,
        )

    def predict(
        self,
        model: str,
        rows: Any,
        *,
        at: Any = None,
        include_features: bool = False,
        provenance: bool = False,
        version: int = 0,
        deadline_ms: int = 0,
        request_id: str = "",
        tier: str = "",
    ) -> Predictions:
        """What `model` says about rows of keys and request fields. `version` 0 is the champion; without a
        `tier`, the rows are of the first that the model declares."""
        service = self._service_of_model(model)
        table = self._request_rows(service, rows, service.units) if service else tables.to_table(rows)
        request = gateway_pb2.PredictRequest(
            project=self.project,
            model=model,
            rows=_columns(table),
            deadline_ms=deadline_ms,
            include_features=include_features,
            include_provenance=provenance,
            version=version,
            request_id=request_id,
            tier=tier,
        )
        if at is not None:
            request.at.extend(tables.to_microseconds(at, table.num_rows))
        types = {f.name: f.type for f in service.features} if service else None
        return Predictions(self._call(self._gateway.Predict, request), types)

    def flag(
        self,
        name: str,
        *,
        unit: str | None = None,
        context: Mapping[str, Any] | None = None,
        type: str | None = None,
        expose: bool = True,
    ) -> _flags.FlagValue:
        """What a flag is for one unit. With a `type`, a flag of another one is an error; `expose=False` asks without
        writing down that the unit was given a variant."""
        request = _flags.request(self.project, {name: type}, unit, context, expose)
        return _flags.read(self._call(self._gateway.EvaluateFlags, request).flags[0])

    def flags(
        self,
        names: Mapping[str, str | None] | Iterable[str] = (),
        *,
        unit: str | None = None,
        context: Mapping[str, Any] | None = None,
        expose: bool | None = None,
    ) -> dict[str, _flags.FlagValue]:
        """What some flags, or all, are for one unit, in one call. Without `expose`, only of flags that are named is it
        written down what the unit was given."""
        if isinstance(names, str):
            names = [names]
        names = dict(names) if isinstance(names, Mapping) else list(names)
        # Nobody uses all flags at once.
        expose = bool(names) if expose is None else expose
        request = _flags.request(self.project, names, unit, context, expose)
        answer = self._call(self._gateway.EvaluateFlags, request)
        return {value.name: _flags.read(value) for value in answer.flags}

    # Events and data.

    def push(self, source: str, rows: Any, *, wait_visible: bool = False) -> PushResult:
        """Pushes events; returns once they are durable and, with `wait_visible`, those that are due answer online."""
        with self.pusher(source, wait_visible=wait_visible) as pusher:
            return pusher.push(rows)

    def pusher(self, source: str, *, wait_visible: bool = False) -> Pusher:
        """One open stream for many pushes to one source."""
        return Pusher(self, source, wait_visible)

    def materialize(
        self, sources: str | Sequence[str] | None = None, *, through: Any, dry_run: bool = False
    ) -> list[Materialized]:
        """Makes rows of file sources (all, unless named) that are known by `through` visible online."""
        if isinstance(sources, str):
            sources = [sources]
        request = ingest_pb2.MaterializeRequest(
            project=self.project,
            sources=sources or [],
            through=tables.to_microseconds(through, 1)[0],
            dry_run=dry_run,
        )
        # Progress is reported as it goes on: the last word on each (source, view) is the sum.
        last: dict[tuple[str, str], Materialized] = {}
        try:
            for p in self._ingest.Materialize(request):
                if p.source:
                    last[p.source, p.view] = Materialized(p.source, p.view, p.rows_read, p.rows_applied, p.rows_stale)
        except grpc.RpcError as error:
            raise self._failure(error) from error
        return list(last.values())

    def flush(self) -> int:
        """Writes what streams have applied to history, so that training sets see it; returns the events written."""
        # As long as the data is large: no deadline.
        return self._call(self._ingest.Flush, ingest_pb2.FlushRequest(project=self.project), timeout=None).events

    # What became of predictions.

    def add_labels(self, model: str, labels: Any, *, metric: str = "") -> int:
        """Adds what became of logged predictions of `model`; returns how many values.

        `labels` is a table, data frame or mapping of columns. It names predictions by `request_id` and `row`, or by columns of
        the request and `time`: then a value belongs to predictions that were made at most the label's `within` before. The
        value is in the column named like the model's label, or like `metric`: any other number to compare versions by.
        Added again, the later value counts; null takes it back. They are kept when this returns.
        """
        table = tables.to_table(labels)
        if "row" in table.schema.names:
            index = table.schema.get_field_index("row")
            table = table.set_column(index, "row", table.column(index).cast(pa.int64()))
        if "time" in table.schema.names:
            index = table.schema.get_field_index("time")
            table = table.set_column(index, "time", table.column(index).cast(pa.timestamp("us", "UTC")))
        rows = 0
        for start in range(0, table.num_rows, LABEL_ROWS):
            request = control_pb2.AddLabelsRequest(
                project=self.project, model=model, metric=metric, columns=_columns(table.slice(start, LABEL_ROWS))
            )
            rows += self._call(self._control.AddLabels, request, timeout=None).rows
        return rows

    def quality(
        self, model: str, *, start: Any = None, end: Any = None, every_days: float = 0, output: str = ""
    ) -> dict[str, Any]:
        """How good each version and arm of `model` was, by logged predictions that were made for times from `start` up to `end`
        (the last 30 days without them), and their labels: AUC, log-loss, calibration, errors, other metrics, and how diverse
        what it decided for was. With `every_days`, each such stretch of time by itself."""
        if (start is None) != (end is None):
            raise ValueError("give both `start` and `end`, or neither")
        window = [0, 0] if start is None else [int(t) for t in tables.to_microseconds([start, end], 2)]
        request = control_pb2.GetQualityRequest(
            project=self.project,
            model=model,
            to=window[1],
            every=round(every_days * 86_400_000_000),
            output=output,
            **{"from": window[0]},
        )
        report: dict[str, Any] = json.loads(self._call(self._control.GetQuality, request, timeout=None).report)
        return report

    # Models.

    def register_model(
        self,
        model: str,
        file: str | os.PathLike[str] | bytes | Any,
        *,
        dataset: str | Dataset | None = None,
        metrics: Mapping[str, float] | None = None,
        seed: int | None = None,
        author: str | None = None,
        commit: str | None = None,
        hardware: str | None = None,
        libraries: Mapping[str, str] | None = None,
        environment_digest: str | None = None,
        golden: Golden | None = None,
        importances: Mapping[str, float] | None = None,
    ) -> Registered:
        """Registers a model file as a new version; traffic does not move.

        `file` is a path, the file's bytes, or a TorchScript module. What is not said about the environment is found out;
        `environment_digest` may be that of a lock file or an image. `metrics` are those of held-out rows. With `golden` rows
        every gateway that loads the version compares its outputs with those of the training process. `importances` say how much
        the model leans on features (gain, mean |SHAP|, in any unit): drift is summed up by them.
        """
        content = _model_bytes(file)
        golden_content = golden.to_bytes() if golden is not None else b""
        if isinstance(dataset, Dataset):
            dataset = dataset.id or dataset.name
        header = control_pb2.ModelHeader(
            project=self.project,
            model=model,
            author=author if author is not None else _user(),
            commit=commit if commit is not None else environment.commit(),
            environment_digest=environment_digest if environment_digest is not None else environment.digest(),
            seed=seed,
            hardware=hardware if hardware is not None else environment.hardware(),
            libraries=dict(libraries) if libraries is not None else environment.libraries(),
            dataset=dataset or "",
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            importances={name: float(value) for name, value in (importances or {}).items()},
        )

        def parts() -> Iterator[control_pb2.RegisterModelRequest]:
            yield control_pb2.RegisterModelRequest(header=header)
            for start in range(0, len(content), MODEL_CHUNK_BYTES):
                yield control_pb2.RegisterModelRequest(chunk=content[start : start + MODEL_CHUNK_BYTES])
            for start in range(0, len(golden_content), MODEL_CHUNK_BYTES):
                yield control_pb2.RegisterModelRequest(golden_chunk=golden_content[start : start + MODEL_CHUNK_BYTES])

        # A large file takes a while to send; the server loads it when it is deployed.
        answer = self._call(self._control.RegisterModel, parts(), timeout=max(self._timeout, 300.0))
        return Registered(answer.version, answer.digest, answer.existed)

    def deploy_model(self, model: str, version: int, why: str | None = None, *, who: str | None = None) -> Deployed:
        """Has every gateway load, measure and check a registered version, so that it answers requests that name it.

        Traffic does not move, unless the model has none yet: `promote` moves it. Raises `Conflict` with the reasons when a
        gateway cannot serve it.
        """
        request = control_pb2.DeployModelRequest(
            project=self.project, model=model, version=version, who=who or _user(), why=why or ""
        )
        answer = self._call(self._control.DeployModel, request, timeout=max(self._timeout, DEPLOY_SECONDS_MAX))
        return Deployed(answer.version, answer.champion, answer.existed, list(answer.notes))

    def promote(self, model: str, version: int, why: str | None = None, *, who: str | None = None) -> Traffic:
        """Makes an active version the champion: requests that name no version go to it."""
        request = control_pb2.PromoteModelRequest(
            project=self.project, model=model, version=version, who=who or _user(), why=why or ""
        )
        answer = self._call(self._control.PromoteModel, request)
        return Traffic(answer.champion, answer.before, answer.previous)

    def rollback(self, model: str, why: str | None = None, *, who: str | None = None) -> Traffic:
        """Ends the rollout that runs; without one, makes the champion before the champion again. At once."""
        request = control_pb2.RollbackModelRequest(project=self.project, model=model, who=who or _user(), why=why or "")
        answer = self._call(self._control.RollbackModel, request)
        return Traffic(answer.champion, answer.before, answer.previous)

    def begin_rollout(
        self,
        model: str,
        version: int,
        why: str | None = None,
        *,
        dataset: str | Dataset | None = None,
        stage: str = "",
        skip_shadow: bool = False,
        layer: str = "",
        buckets: tuple[int, int] | None = None,
        who: str | None = None,
    ) -> dict[str, Any]:
        """Brings an active version to users step by step, each judged by the criteria that the definitions declare; they are pinned
        now. With `dataset`, both versions score it first, and a version that is shown to be worse is refused. Returns what
        `rollout` does."""
        name = dataset.id if isinstance(dataset, Dataset) else dataset
        first, last = buckets or (0, 0)
        request = rollout_pb2.BeginRolloutRequest(
            project=self.project,
            model=model,
            version=version,
            stage=stage,
            dataset=name or "",
            skip_evaluation=name is None,
            skip_shadow=skip_shadow,
            layer=layer,
            from_bucket=first,
            to_bucket=last,
            who=who or _user(),
            why=why or "",
        )
        answer = self._call(self._control.BeginRollout, request, timeout=max(self._timeout, DEPLOY_SECONDS_MAX))
        report: dict[str, Any] = json.loads(answer.report)
        return report

    def rollout(self, model: str) -> dict[str, Any]:
        """Who has the traffic, what is being tried and how it stands by each criterion, and what happened before."""
        request = rollout_pb2.GetRolloutRequest(project=self.project, model=model)
        report: dict[str, Any] = json.loads(self._call(self._control.GetRollout, request).report)
        return report

    def plan_rollout(self, model: str, version: int) -> dict[str, Any]:
        """How many rows, units and days the declared criteria need at the traffic there is."""
        request = rollout_pb2.PlanRolloutRequest(project=self.project, model=model, version=version)
        answer = self._call(self._control.PlanRollout, request, timeout=max(self._timeout, DEPLOY_SECONDS_MAX))
        report: dict[str, Any] = json.loads(answer.report)
        return report

    def change_rollout(
        self,
        model: str,
        change: Literal["hold", "resume", "acknowledge", "end", "off", "on", "advance"],
        why: str | None = None,
        *,
        features: Sequence[str] = (),
        who: str | None = None,
    ) -> dict[str, Any]:
        """Holds a rollout, lets it go on, acknowledges the drift of `features` (`*` for all), ends it, judges it now, or turns the
        model off and on. Returns what `rollout` does."""
        request = rollout_pb2.ChangeRolloutRequest(
            project=self.project,
            model=model,
            change=rollout_pb2.ChangeRolloutRequest.Change.Value(change.upper()),
            features=features,
            who=who or _user(),
            why=why or "",
        )
        report: dict[str, Any] = json.loads(self._call(self._control.ChangeRollout, request).report)
        return report

    def retire(
        self, model: str, version: int, why: str | None = None, *, force: bool = False, who: str | None = None
    ) -> None:
        """Takes an active version off the gateways; not the champion, and the one before it only with `force`."""
        request = control_pb2.RetireModelRequest(
            project=self.project, model=model, version=version, force=force, who=who or _user(), why=why or ""
        )
        self._call(self._control.RetireModel, request)

    def approve(self, model: str, version: int, why: str | None = None, *, who: str | None = None) -> None:
        """Records that somebody approves of a version."""
        request = control_pb2.ApproveModelRequest(
            project=self.project, model=model, version=version, who=who or _user(), why=why or ""
        )
        self._call(self._control.ApproveModel, request)

    def drift(
        self,
        model: str,
        version: int | None = None,
        *,
        arm: str | None = None,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        features: Sequence[str] = (),
        histograms: bool = False,
    ) -> Drift:
        """Whether what a version was served looks like what it was trained on, feature by feature and output by output.

        Without a version, the champion; without times, the last 24 hours. Whole hours are judged. `arm` is why the version
        was asked, as the outcomes of predictions say; `champion` where it is not given. A drift is a difference and not a
        fault: seasons drift. Raises `Refused` where the version names no dataset that it was trained on.
        """
        request = control_pb2.GetDriftRequest(
            project=self.project,
            model=model,
            version=version or 0,
            arm=arm or "",
            to=tables.to_microseconds(until, 1)[0] if until is not None else 0,
            features=list(features),
            histograms=histograms,
        )
        # `from` is a word of the language.
        setattr(request, "from", tables.to_microseconds(since, 1)[0] if since is not None else 0)
        answer = self._call(self._control.GetDrift, request, timeout=max(self._timeout, DRIFT_SECONDS))
        return Drift(
            version=answer.version,
            arm=answer.arm,
            verdict=answer.verdict,
            since=_datetime(getattr(answer, "from")),
            until=_datetime(answer.to),
            rows=answer.rows,
            uncounted_rows=answer.uncounted_rows,
            features=[FeatureDrift(f.name, f.verdict, f.effect, list(f.reasons)) for f in answer.features],
            report=json.loads(answer.report),
        )

    # Inside.

    def _call(self, method: Any, request: Any, timeout: float | None = -1.0) -> Any:
        try:
            return method(request, timeout=self._timeout if timeout == -1.0 else timeout)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _failure(self, error: grpc.RpcError) -> errors.CoevalError:
        failure = errors.from_grpc(error)
        if isinstance(failure, (errors.InvalidArgument, errors.NotFound)):
            # The definitions may have changed since they were asked for.
            self._catalog = None
            self._model_services = {}
        return failure

    def _flight(self) -> Any:
        if self._flight_client is None:
            options = [("grpc.max_receive_message_length", RECEIVE_BYTES_MAX)]
            self._flight_client = flight.FlightClient(self._flight_location, generic_options=options)
        return self._flight_client

    def _service(self, name: str) -> Service:
        service = self.catalog().services.get(name) or self.catalog(refresh=True).services.get(name)
        if service is None:
            raise errors.NotFound(_unknown("service", name, self.catalog().services))
        return service

    def _source(self, name: str) -> Source:
        source = self.catalog().sources.get(name) or self.catalog(refresh=True).sources.get(name)
        if source is None:
            raise errors.NotFound(_unknown("source", name, self.catalog().sources))
        return source

    def _service_of_model(self, model: str) -> Service | None:
        """The service a registered model reads, or None when the server is to say what is wrong with the name."""
        if model not in self._model_services:
            self.models()
        name = self._model_services.get(model)
        return self.catalog().services.get(name) if name else None

    def _input_types(self, service: str) -> dict[str, pa.DataType]:
        return {f.name: f.type for f in self._service(service).inputs}

    def _request_rows(self, service: Service, rows: Any, units: Iterable[pa.Field] = ()) -> pa.Table:
        """The columns a service asks for, with its types. Others stay here: a DataFrame often holds more."""
        wanted = {f.name: f.type for f in [*service.inputs, *units]}
        if isinstance(rows, Mapping):
            rows = {name: values for name, values in rows.items() if name in wanted}
            given = set(rows)
        else:
            given = set(rows.schema.names) if hasattr(rows, "schema") else set(map(str, rows.columns))
            rows = rows.select([n for n in rows.schema.names if n in wanted]) if isinstance(rows, pa.Table) else rows
        absent = [f.name for f in service.inputs if f.name not in given and not f.nullable]
        if absent:
            listed = ", ".join(f"`{name}`" for name in absent)
            raise errors.InvalidArgument(f"service `{service.name}` needs {listed}, which the rows do not have")
        table = tables.to_table(rows, wanted)
        return table.select([name for name in table.schema.names if name in wanted])


class Pusher:
    """One open stream of pushes. Each `push` is acknowledged in order; `send` does not wait for it.

    At most `PUSHES_OUTSTANDING_MAX` messages are unacknowledged: beyond that `send` waits for the oldest. Not safe to share
    between threads.
    """

    def __init__(self, client: Client, source: str, wait_visible: bool = False) -> None:
        self._client = client
        self._source = source
        self._wait_visible = wait_visible
        described = client._source(source)
        self._types = {f.name: f.type for f in described.schema}
        self._times = {described.event_time, described.created_time} - {""}
        self._types.update({name: TIMESTAMP for name in self._times})
        self._queue: queue.Queue[ingest_pb2.PushRequest | None] = queue.Queue(PUSHES_OUTSTANDING_MAX + 1)
        self._answers = client._ingest.Push(iter(self._queue.get, None))
        # Rows of each message still to be acknowledged, and how many rows came before each in its push.
        self._outstanding: collections.deque[int] = collections.deque()
        self._settled: PushResult | None = None
        self._closed = False

    def push(self, rows: Any, *, wait_visible: bool | None = None) -> PushResult:
        """Sends rows and waits until they, and everything sent before, are acknowledged."""
        earlier = self.settle()
        self.send(rows, wait_visible=wait_visible)
        result = self.settle()
        # What earlier sends came to belongs to whoever settles them; a push answers for its own rows.
        self._settled = earlier if earlier != PushResult() else None
        return result

    def send(self, rows: Any, *, wait_visible: bool | None = None) -> None:
        """Sends rows without waiting for the acknowledgement."""
        if self._closed:
            raise errors.CoevalError(f"the stream of pushes to `{self._source}` is closed")
        wait = self._wait_visible if wait_visible is None else wait_visible
        first = 0
        _, batches = tables.to_batches(rows, self._types)
        for batch in batches:
            while len(self._outstanding) >= PUSHES_OUTSTANDING_MAX:
                self._note(self._next_answer())
            self._queue.put(
                ingest_pb2.PushRequest(
                    project=self._client.project,
                    source=self._source,
                    rows=[to_column(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)],
                    wait_visible=wait,
                )
            )
            self._outstanding.append(first)
            first += batch.num_rows

    def settle(self) -> PushResult:
        """Waits for every acknowledgement; returns what became of the rows sent since the last call."""
        while self._outstanding:
            self._note(self._next_answer())
        result, self._settled = self._settled or PushResult(), None
        return result

    def close(self) -> None:
        """Waits for what is outstanding and ends the stream."""
        if self._closed:
            return
        self._closed = True
        try:
            while self._outstanding:
                self._note(self._next_answer())
            self._queue.put(None)
            for _ in self._answers:
                pass
        except grpc.RpcError as error:
            raise self._client._failure(error) from error
        finally:
            self._answers.cancel()
            self._release()

    def __enter__(self) -> Pusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # The error under way is the news; what the stream still has to say is not.
        self._closed = True
        self._answers.cancel()
        self._release()

    def _release(self) -> None:
        """Lets the thread that feeds the call go, also when the call ended before the queue did."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass

    def _next_answer(self) -> PushResult:
        try:
            answer = next(self._answers)
        except StopIteration:
            self._closed = True
            self._release()
            raise errors.Unavailable(f"the server ended the stream of pushes to `{self._source}`") from None
        except grpc.RpcError as error:
            self._closed = True
            self._outstanding.clear()
            self._release()
            raise self._client._failure(error) from error
        first = self._outstanding.popleft()
        rejected = [Rejected(first + r.row, r.reason) for r in answer.rejected]
        return PushResult(answer.accepted, answer.duplicates, answer.early, rejected, answer.last_sequence)

    def _note(self, result: PushResult) -> None:
        self._settled = result if self._settled is None else self._settled + result


def _address(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or port is None or parts.path not in ("", "/"):
        raise errors.InvalidArgument(f"`{url}` is not a server's address: expected grpc://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, f"{host}:{port}"


def _columns(table: pa.Table) -> list[Any]:
    return [to_column(name, column) for name, column in zip(table.schema.names, table.columns, strict=True)]


def _schema(named: Iterable[control_pb2.NamedType]) -> pa.Schema:
    return pa.schema([pa.field(n.name, parse_type(n.type), nullable=n.nullable) for n in named])


def _catalog(answer: control_pb2.GetCatalogResponse) -> Catalog:
    return Catalog(
        project=answer.project,
        digest=answer.catalog_digest,
        control_head=answer.control_head,
        views={
            v.name: View(v.name, v.entity, v.storage_digest, v.semantic_digest, v.ready) for v in answer.views
        },
        services={
            s.name: Service(s.name, s.semantic_digest, _schema(s.inputs), _schema(s.features), _schema(s.units))
            for s in answer.services
        },
        sources={
            s.name: Source(s.name, s.kind, _schema(s.schema), s.event_time, s.created_time) for s in answer.sources
        },
    )


def _model(info: control_pb2.ModelInfo) -> Model:
    return Model(
        name=info.name,
        version=info.version,
        digest=info.digest,
        service=info.service,
        service_digest=info.service_digest,
        state=info.state,
        author=info.author,
        commit=info.commit,
        environment_digest=info.environment_digest,
        seed=info.seed if info.HasField("seed") else None,
        hardware=info.hardware,
        libraries=dict(info.libraries),
        dataset=info.dataset,
        metrics=dict(info.metrics),
        registered_at=info.registered_at,
        approvals=[Approval(a.who, a.why, a.at) for a in info.approvals],
        golden_digest=info.golden_digest,
        given_up=info.given_up,
        gateways=[
            GatewayVersion(g.gateway, g.address, g.state, g.reason, list(g.notes), g.memory_bytes, g.max_rows)
            for g in info.gateways
        ],
    )


def _model_bytes(file: Any) -> bytes:
    if isinstance(file, (bytes, bytearray, memoryview)):
        return bytes(file)
    if isinstance(file, (str, os.PathLike)):
        try:
            return Path(file).read_bytes()
        except OSError as error:
            raise errors.NotFound(f"model file `{os.fspath(file)}`: {error.strerror or error}") from error
    # A TorchScript module; only someone who has torch can hold one.
    try:
        import torch
    except ImportError:
        errors.missing("torch", "register_model with a module")
    if not isinstance(file, torch.jit.ScriptModule):
        raise errors.InvalidArgument(
            f"a model is a path, bytes or a TorchScript module, found `{type(file).__name__}`: see torch.jit.script"
        )
    buffer = io.BytesIO()
    torch.jit.save(file, buffer)
    return buffer.getvalue()


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; there is {', '.join(f'`{k}`' for k in known) or 'none'}"
    return f"no {kind} `{name}`{hint}"


def _datetime(micros: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc) + datetime.timedelta(microseconds=micros)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
