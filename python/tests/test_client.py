"""The client against small servers in this process: what it sends, and what it makes of answers and failures.

What the real server answers is tested in test_server.py.
"""

import concurrent.futures
import datetime as dt
import json
import threading

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

import coeval
from coeval import columns, tables
from coeval._generated import (
    control_pb2,
    control_pb2_grpc,
    flight_pb2,
    gateway_pb2,
    gateway_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
)
from coeval.client import MODEL_CHUNK_BYTES, PUSHES_OUTSTANDING_MAX
from coeval.types import NO_TIME, TIMESTAMP

NOON = dt.datetime(2013, 7, 1, 12, tzinfo=dt.timezone.utc)
NOON_US = int(NOON.timestamp() * 1_000_000)


def named(name, kind, nullable=False):
    return control_pb2.NamedType(name=name, type=kind, nullable=nullable)


class Server(gateway_pb2_grpc.GatewayServicer, ingest_pb2_grpc.IngestServicer, control_pb2_grpc.ControlServicer):
    """Answers with what it was asked, and remembers it."""

    def __init__(self):
        self.seen = []
        self.refreshes = 0
        self.answer_pushes = threading.Event()
        self.answer_pushes.set()

    def GetCatalog(self, request, context):
        self.seen.append(request)
        if request.project not in ("", "flights"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no project `{request.project}`; this server serves `flights`")
        inputs = [named("origin", "string", True), named("distance", "float64"), named("scheduled", "timestamp"),
                  named("carrier", "string", True), named("stops", "int64", True)]
        return control_pb2.GetCatalogResponse(
            project="flights",
            catalog_digest="d",
            control_head=7,
            views=[control_pb2.ViewInfo(name="weather", entity="airport", ready=True)],
            services=[control_pb2.ServiceInfo(name="delay_inputs", inputs=inputs, features=[named("weather:temp", "float64", True)])],
            sources=[
                control_pb2.SourceInfo(
                    name="departures",
                    kind="stream",
                    schema=[named("airport", "string"), named("dep_delay", "float64", True)],
                    event_time="departed_at",
                )
            ],
        )

    def GetFeatures(self, request, context):
        self.seen.append(request)
        rows = len(request.rows[0].strings.values)
        if request.service == "delay_inputs" and request.deadline_ms == 1:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the store did not answer within 1 ms")
        values = columns.to_column("weather:temp", pa.array([71.5] + [None] * (rows - 1), type=pa.float64()))
        return gateway_pb2.GetFeaturesResponse(
            features=[gateway_pb2.FeatureColumn(name="weather:temp", values=values, statuses=[1] + [3] * (rows - 1))],
            at=[NOON_US] * rows,
            views=[
                gateway_pb2.ViewProvenance(
                    view="weather",
                    alias="weather",
                    event_times=[NOON_US] + [NO_TIME] * (rows - 1),
                    positions=[{"time": NOON_US, "sequence": 0}] + [{"time": NO_TIME}] * (rows - 1),
                )
            ]
            if request.include_provenance
            else [],
            semantic_digest="s",
            rows=rows,
        )

    def Predict(self, request, context):
        self.seen.append(request)
        rows = len(request.rows[0].strings.values)
        given = []
        if request.include_features:
            values = columns.to_column("weather:temp", pa.nulls(rows, pa.float64()))
            given = [gateway_pb2.FeatureColumn(name="weather:temp", values=values, statuses=[2] * rows)]
        return gateway_pb2.PredictResponse(
            outputs=[columns.to_column("p_late", pa.array([0.25] * (rows - 1) + [None], type=pa.float32()))],
            outcomes=[
                {
                    "version": 3,
                    "arm": "champion",
                    "status": 1,
                    "wait_reason": 2,
                    "wait_us": 70,
                    "waits": {"executor_busy_us": 50, "tier_us": 20},
                    "cached": True,
                }
            ]
            * (rows - 1)
            + [{"version": 3, "arm": "champion", "status": 3, "reason": "`dense` has a null", "wait_reason": 1}],
            at=[NOON_US] * rows,
            features=given,
            request_id=request.request_id or "made-up",
            timings={"features_us": 1, "transforms_us": 2, "queue_us": 3, "forward_us": 4, "total_us": 10},
        )

    def Push(self, requests, context):
        for sequence, request in enumerate(requests, 1):
            self.seen.append(request)
            self.answer_pushes.wait(10)
            rows = len(request.rows[0].strings.values)
            rejected = [
                ingest_pb2.Rejected(row=row, reason="the key is null")
                for row, key in enumerate(request.rows[0].strings.values)
                if key == ""
            ]
            if "boom" in request.rows[0].strings.values:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the log's disk is full")
            yield ingest_pb2.PushResponse(
                accepted=rows - len(rejected), rejected=rejected, last_sequence=sequence
            )

    def Materialize(self, request, context):
        self.seen.append(request)
        yield ingest_pb2.MaterializeProgress(source="weather", view="weather_now", rows_read=5, rows_applied=4)
        yield ingest_pb2.MaterializeProgress(source="weather", view="weather_now", rows_read=9, rows_applied=8, rows_stale=1)
        yield ingest_pb2.MaterializeProgress(done=True, through=request.through)

    def Flush(self, request, context):
        return ingest_pb2.FlushResponse(events=12)

    def Refresh(self, request, context):
        self.refreshes += 1
        ready = self.refreshes >= 3
        return control_pb2.RefreshResponse(control_head=9, ready=ready, reasons=[] if ready else ["`weather` is backfilling"])

    def RegisterModel(self, requests, context):
        parts = list(requests)
        self.seen.extend(parts)
        return control_pb2.RegisterModelResponse(version=1, digest="sha256:abc")

    def DeployModel(self, request, context):
        self.seen.append(request)
        return control_pb2.DeployModelResponse(version=request.version, champion=3, notes=["slow"])

    def PromoteModel(self, request, context):
        self.seen.append(request)
        return control_pb2.TrafficResponse(champion=request.version, before=3, previous=3)

    def RollbackModel(self, request, context):
        self.seen.append(request)
        return control_pb2.TrafficResponse(champion=3, before=4)

    def RetireModel(self, request, context):
        self.seen.append(request)
        return control_pb2.RetireModelResponse(control_entry=8)

    def ApproveModel(self, request, context):
        self.seen.append(request)
        return control_pb2.ApproveModelResponse(control_entry=9)

    def ListModels(self, request, context):
        return control_pb2.ListModelsResponse(models=[control_pb2.ModelInfo(name="delay", version=3, service="delay_inputs")])

    def ListDatasets(self, request, context):
        return control_pb2.ListDatasetsResponse(datasets=[control_pb2.DatasetInfo(name="d", id="i", rows=3)])


NUMBERS = pa.record_batch(
    {
        "dense": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(400, dtype=np.float32)), 2),
        "late": pa.array([row % 3 == 0 for row in range(200)]),
        "row": pa.array(range(200)),
        "gap": pa.array([None if row == 5 else float(row) for row in range(200)]),
        "word": pa.array(["x"] * 200),
        "__refused": pa.array([row in (7, 31) for row in range(200)]),
    },
    schema=pa.schema(
        [
            pa.field("dense", pa.list_(pa.field("item", pa.float32(), nullable=False), 2), nullable=False),
            ("late", pa.bool_()),
            ("row", pa.int64()),
            ("gap", pa.float64()),
            ("word", pa.string()),
            pa.field("__refused", pa.bool_(), nullable=False),
        ]
    ),
)


class FlightServer(flight.FlightServerBase):
    """Sends the spine back with one feature, batch by batch, while it is still coming."""

    def __init__(self):
        super().__init__("grpc://127.0.0.1:0")
        self.commands = []
        self.tickets = []
        self.breaks = []

    def do_exchange(self, context, descriptor, reader, writer):
        command = flight_pb2.TrainingSetCommand.FromString(descriptor.command)
        self.commands.append(command)
        schema = reader.schema
        if command.service == "broken":
            raise pa.ArrowInvalid("the spine has no key column `tailnum`")
        writer.begin(schema.append(pa.field("weather:temp", pa.float64())))
        rows = 0
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                break
            if chunk.data is None:
                continue
            batch = chunk.data
            rows += batch.num_rows
            values = pa.array(np.arange(batch.num_rows, dtype=np.float64))
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, values], names=[*batch.schema.names, "weather:temp"]))
        said = {"dataset": command.dataset, "id": "id-1", "location": "mem", "rows": rows} if command.dataset else {"rows": rows}
        writer.write_metadata(pa.py_buffer(json.dumps(said).encode()))

    def do_get(self, context, ticket):
        asked = flight_pb2.DatasetTicket.FromString(ticket.ticket)
        self.tickets.append(asked)
        if asked.name == "numbers":
            return flight.GeneratorStream(NUMBERS.schema, self.numbers(asked))
        if asked.name != "kept":
            raise KeyError(f"no dataset `{asked.name}`")
        return flight.RecordBatchStream(pa.table({"id": [asked.id]}))

    def numbers(self, asked):
        """The rows that a ticket asks for, in batches of 10; breaks off where it is told to."""
        end = min(NUMBERS.num_rows, asked.offset + asked.limit) if asked.HasField("limit") else NUMBERS.num_rows
        for start in range(asked.offset, end, 10):
            if start in self.breaks:
                self.breaks.remove(start)
                raise flight.FlightUnavailableError("the server is draining")
            yield NUMBERS.slice(start, min(10, end - start))

    def get_flight_info(self, context, descriptor):
        asked = flight_pb2.DatasetTicket.FromString(descriptor.command)
        endpoints = []
        for start in range(0, NUMBERS.num_rows, 30):
            ticket = flight_pb2.DatasetTicket()
            ticket.CopyFrom(asked)
            ticket.offset, ticket.limit = start, 30
            endpoints.append(flight.FlightEndpoint(ticket.SerializeToString(), []))
        return flight.FlightInfo(NUMBERS.schema, descriptor, endpoints, NUMBERS.num_rows, -1)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def flights():
    with FlightServer() as flights:
        yield flights


@pytest.fixture
def client(server, flights):
    rpc = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    gateway_pb2_grpc.add_GatewayServicer_to_server(server, rpc)
    ingest_pb2_grpc.add_IngestServicer_to_server(server, rpc)
    control_pb2_grpc.add_ControlServicer_to_server(server, rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    with coeval.connect(f"grpc://127.0.0.1:{port}") as client:
        client._flight_location = f"grpc+tcp://127.0.0.1:{flights.port}"
        yield client
    rpc.stop(None)


ROWS = {
    "origin": ["JFK", float("nan")],
    "distance": [1089, 1400.0],
    "scheduled": [NOON, NOON.replace(tzinfo=None)],
    "carrier": ["AA", None],
    "stops": [1.0, float("nan")],
    "unrelated": [object(), object()],
}


def test_the_server_says_which_project(client):
    assert client.project == "flights"
    service = client.catalog().services["delay_inputs"]
    assert service.inputs.field("scheduled").type == TIMESTAMP


def test_an_unknown_project(client):
    with coeval.connect("grpc://" + client._flight_location.removeprefix("grpc+tcp://"), "flights"):
        pass  # With a project nothing is asked before the first call.
    client._project = "other"
    with pytest.raises(coeval.NotFound, match="^no project `other`; this server serves `flights`$"):
        client.catalog(refresh=True)


@pytest.mark.parametrize("url", ["127.0.0.1:7400", "http://127.0.0.1:7400", "grpc://127.0.0.1", "grpc://h:x", "grpc://h:1/p"])
def test_addresses(url):
    with pytest.raises(coeval.InvalidArgument, match="expected grpc://host:port"):
        coeval.connect(url)


def test_nobody_there():
    with pytest.raises(coeval.Unavailable) as failed:
        coeval.connect("grpc://127.0.0.1:1")
    assert failed.value.retryable


def test_features(client, server):
    answer = client.features("delay_inputs", ROWS, at=NOON, provenance=True)
    request = server.seen[-1]
    assert [column.name for column in request.rows] == ["origin", "distance", "scheduled", "carrier", "stops"]
    assert [column.WhichOneof("values") for column in request.rows] == ["strings", "doubles", "timestamps", "strings", "int64s"]
    assert [column.validity for column in request.rows] == [b"\x01", b"", b"", b"\x01", b"\x01"]
    assert list(request.rows[2].timestamps.microseconds) == [NOON_US, NOON_US]
    assert list(request.at) == [NOON_US, NOON_US]
    assert len(answer) == 2
    assert answer["weather:temp"].to_pylist() == [71.5, None]
    assert answer.statuses["weather:temp"].tolist() == [coeval.Status.PRESENT, coeval.Status.NOT_FOUND]
    assert answer.to_arrow(statuses=True).schema.names == ["weather:temp", "weather:temp__status"]
    assert answer.at.to_pylist() == [NOON, NOON]
    assert answer.views[0].event_times.to_pylist() == [NOON, None]
    assert answer.views[0].positions == [coeval.Position(NOON_US, 0), coeval.Position(None, 0)]


def test_features_by_name(client, server):
    client.features(["weather:temp"], {"origin": ["JFK"]})
    assert list(server.seen[-1].features.names) == ["weather:temp"]


def test_requests_that_never_leave(client):
    with pytest.raises(coeval.NotFound, match="no service `delay_input`; did you mean `delay_inputs`?"):
        client.features("delay_input", ROWS)
    with pytest.raises(coeval.InvalidArgument, match="service `delay_inputs` needs `distance`, `scheduled`"):
        client.features("delay_inputs", {"origin": ["JFK"]})
    with pytest.raises(coeval.InvalidArgument, match="column `origin`"):
        client.features("delay_inputs", {**ROWS, "origin": [1, 2]})
    with pytest.raises(coeval.NotFound, match="no source `departure`; did you mean `departures`"):
        client.push("departure", {})


def test_the_servers_own_words(client):
    with pytest.raises(coeval.DeadlineExceeded, match="^the store did not answer within 1 ms$"):
        client.features("delay_inputs", ROWS, deadline_ms=1)


def test_predict(client, server):
    answer = client.predict("delay", ROWS, include_features=True, request_id="r")
    assert server.seen[-1].rows[4].WhichOneof("values") == "int64s"
    assert answer.outputs["p_late"].to_pylist() == [0.25, None]
    assert answer["p_late"][0] == 0.25 and np.isnan(answer["p_late"][1])
    assert [outcome.status for outcome in answer.outcomes] == [coeval.RowStatus.OK, coeval.RowStatus.FAILED]
    assert answer.outcomes[1].reason == "`dense` has a null"
    first = answer.outcomes[0]
    assert (first.wait_reason, first.wait_us) == ("EXECUTOR_BUSY", 70)
    assert first.waits == {"executor_busy": 50, "tier": 20}
    assert [outcome.cached for outcome in answer.outcomes] == [True, False]
    assert answer.features["weather:temp"].type == pa.float64()
    assert answer.timings.total_us == 10
    assert answer.request_id == "r"
    assert client.predict("delay", ROWS).features is None


def test_push(client, server):
    result = client.push("departures", {"airport": ["JFK", None], "dep_delay": [1, None], "departed_at": [NOON, NOON]})
    assert (result.accepted, result.last_sequence) == (1, 1)
    assert result.rejected == [coeval.Rejected(1, "the key is null")]
    request = server.seen[-1]
    assert not request.wait_visible
    assert [column.WhichOneof("values") for column in request.rows] == ["strings", "doubles", "timestamps"]


def test_one_stream_for_many_pushes(client, server):
    with client.pusher("departures", wait_visible=True) as pusher:
        for number in range(1, 4):
            result = pusher.push({"airport": ["JFK"] * number})
            assert (result.accepted, result.last_sequence) == (number, number)
        pusher.send({"airport": ["JFK"]})
        pusher.send({"airport": ["LGA", None]})
        settled = pusher.settle()
        assert (settled.accepted, settled.last_sequence) == (2, 5)
        assert pusher.settle() == coeval.PushResult()
    assert all(request.wait_visible for request in server.seen if isinstance(request, ingest_pb2.PushRequest))
    with pytest.raises(coeval.CoevalError, match="closed"):
        pusher.send({"airport": ["JFK"]})


def test_a_large_push_is_cut_and_rejections_keep_their_rows(client):
    rows = tables.BATCH_ROWS_MAX + 10
    result = client.push("departures", {"airport": ["JFK"] * (rows - 1) + [None]})
    assert result.accepted == rows - 1
    assert result.rejected == [coeval.Rejected(rows - 1, "the key is null")]


def test_sends_are_bounded(client, server):
    server.answer_pushes.clear()
    with client.pusher("departures") as pusher:
        sender = threading.Thread(target=lambda: [pusher.send({"airport": ["JFK"]}) for _ in range(PUSHES_OUTSTANDING_MAX + 5)])
        sender.start()
        sender.join(0.3)
        assert sender.is_alive()
        server.answer_pushes.set()
        sender.join(10)
        assert not sender.is_alive()
        assert pusher.settle().accepted == PUSHES_OUTSTANDING_MAX + 5


def test_a_push_that_breaks(client):
    before = threading.active_count()
    with pytest.raises(coeval.Unavailable, match="the log's disk is full"), client.pusher("departures") as pusher:
        pusher.push({"airport": ["JFK"]})
        pusher.push({"airport": ["boom"]})
    with client.pusher("departures") as pusher:
        assert pusher.push({"airport": ["JFK"]}).accepted == 1
    assert threading.active_count() <= before + 4


def test_materialize_and_flush(client, server):
    done = client.materialize("weather", through=NOON)
    assert [(m.view, m.rows_read, m.rows_applied, m.rows_stale) for m in done] == [("weather_now", 9, 8, 1)]
    assert server.seen[-1].through == NOON_US
    assert client.flush() == 12


def test_refresh_waits(client, server):
    assert client.refresh(timeout=5) == 9
    assert server.refreshes == 3
    server.refreshes = -1000
    with pytest.raises(coeval.DeadlineExceeded, match="not ready after 0.2 s: `weather` is backfilling"):
        client.refresh(timeout=0.2)
    assert client.refresh(wait_ready=False) == 9


def test_models(client, server, tmp_path):
    content = bytes(range(256)) * 8192
    (tmp_path / "model.pt").write_bytes(content)
    registered = client.register_model("delay", tmp_path / "model.pt", metrics={"auc": 0.7}, seed=4, dataset="d", commit="c")
    assert (registered.version, registered.existed) == (1, False)
    header, *chunks = server.seen[-1 - -(-len(content) // MODEL_CHUNK_BYTES) :]
    assert b"".join(part.chunk for part in chunks) == content
    assert all(len(part.chunk) <= MODEL_CHUNK_BYTES for part in chunks)
    header = header.header
    assert (header.model, header.dataset, header.seed, header.commit) == ("delay", "d", 4, "c")
    assert header.metrics["auc"] == 0.7
    assert header.libraries["python"] and header.hardware
    assert header.environment_digest.startswith("sha256:") and len(header.environment_digest) == 71
    assert client.deploy_model("delay", 1, why="first") == coeval.Deployed(1, 3, False, ["slow"])
    assert server.seen[-1].why == "first"
    assert client.promote("delay", 4, why="better") == coeval.Traffic(4, 3, 3)
    assert (server.seen[-1].version, server.seen[-1].why) == (4, "better")
    assert client.rollback("delay", why="worse", who="ann").champion == 3
    assert (server.seen[-1].who, server.seen[-1].why) == ("ann", "worse")
    client.retire("delay", 4, force=True)
    assert server.seen[-1].force
    client.approve("delay", 4, why="reviewed", who="eve")
    assert (server.seen[-1].who, server.seen[-1].why) == ("eve", "reviewed")
    assert [(m.name, m.version) for m in client.models()] == [("delay", 3)]
    assert [d.id for d in client.datasets()] == ["i"]
    with pytest.raises(coeval.NotFound, match="model file .*missing.pt"):
        client.register_model("delay", tmp_path / "missing.pt")


def test_golden_rows_travel_beside_the_file(client, server):
    golden = coeval.Golden(
        {"dense": np.arange(6, dtype=np.float32).reshape(3, 2), "carrier": [1, 2, 3]},
        {"p_late": np.array([0.1, 0.2, 0.3], dtype=np.float32)},
        rtol={"float32": 0.01},
    )
    assert golden.rows == 3
    client.register_model("delay", b"model", golden=golden)
    header, chunk, rows = server.seen[-3:]
    assert chunk.chunk == b"model" and not header.header.HasField("seed")
    table = pa.ipc.open_file(rows.golden_chunk).read_all()
    assert table.schema.names == ["input:dense", "input:carrier", "output:p_late"]
    assert table.schema.field("input:dense").type == pa.list_(pa.field("item", pa.float32(), nullable=False), 2)
    assert table.column("input:carrier").to_pylist() == [[1], [2], [3]]
    said = json.loads(table.schema.metadata[b"coeval.tolerance"])
    assert said == {"float32": {"rtol": 0.01, "atol": 1e-5}}


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        ({"dense": [[1.0], [2.0]]}, {"p": [0.5]}, "same number of rows"),
        ({"dense": ["x"]}, {"p": [0.5]}, "`dense` is str"),
        ({"dense": np.zeros((300, 1))}, {"p": np.zeros(300)}, "300 golden rows"),
        ({}, {"p": [0.5]}, "inputs and outputs"),
    ],
)
def test_golden_rows_that_are_none(inputs, outputs, text):
    with pytest.raises(coeval.InvalidArgument, match=text):
        coeval.Golden(inputs, outputs)


def test_a_scripted_module(client, server):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    client.register_model("delay", torch.jit.script(torch.nn.Linear(1, 1)))
    assert server.seen[-1].chunk[:2] == b"PK"
    with pytest.raises(coeval.InvalidArgument, match="TorchScript module"):
        client.register_model("delay", torch.nn.Linear(1, 1))


def test_training_set(client, flights):
    spine = {"event_timestamp": [NOON, NOON.replace(tzinfo=None)], "origin": ["JFK", None], "label": [True, None]}
    dataset = client.training_set("delay_inputs", spine, name="kept", statuses=True, seed=3)
    assert flights.commands == []
    table = dataset.to_arrow()
    assert table.schema.names == ["event_timestamp", "origin", "label", "weather:temp"]
    assert table.column("event_timestamp").type == TIMESTAMP
    assert table.column("event_timestamp").to_pylist() == [NOON, NOON]
    assert table.column("label").to_pylist() == [True, None]
    command = flights.commands[0]
    assert (command.project, command.service, command.dataset, command.statuses, command.seed, command.visibility) == (
        "flights", "delay_inputs", "kept", True, 3, "known"
    )
    assert (dataset.name, dataset.id, dataset.location, dataset.rows) == ("kept", "id-1", "mem", 2)
    assert dataset.to_pandas().shape == (2, 4)
    assert len(flights.commands) == 1


def test_a_spine_larger_than_any_buffer_streams_both_ways(client):
    rows = 1_000_000
    spine = pa.table(
        {
            "event_timestamp": pa.array(np.arange(rows), type=pa.int64()).cast(TIMESTAMP),
            "origin": pa.array(["JFK"]).take(pa.array(np.zeros(rows, dtype=np.int64))),
            "text": pa.array(["x" * 40]).take(pa.array(np.zeros(rows, dtype=np.int64))),
        }
    )
    seen = 0
    for batch in client.training_set("delay_inputs", spine).batches():
        assert batch.column(0)[0].value == seen
        seen += batch.num_rows
    assert seen == rows


def test_a_dataset_that_is_not_kept_streams_once(client):
    dataset = client.training_set("delay_inputs", {"event_timestamp": [NOON]})
    assert sum(batch.num_rows for batch in dataset.batches()) == 1
    with pytest.raises(coeval.CoevalError, match="give it a name"):
        list(dataset.batches())
    kept = client.training_set("delay_inputs", {"event_timestamp": [NOON]}, name="kept").drain()
    assert kept.to_arrow().column("id").to_pylist() == ["id-1"]


def test_leaving_a_stream_early_leaves_no_thread(client):
    spine = pa.table({"event_timestamp": pa.array(np.arange(500_000), type=pa.int64()).cast(TIMESTAMP)})
    batches = client.training_set("delay_inputs", spine).batches()
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "coeval-spine"]


def test_stored_datasets(client):
    assert client.dataset("kept", "id-9").to_arrow().column("id").to_pylist() == ["id-9"]
    with pytest.raises(coeval.NotFound, match="no dataset `lost`"):
        client.dataset("lost").to_arrow()


def rows_of(batches):
    return [row for batch in batches for row in batch.column("row").to_pylist()]


def test_a_stream_that_breaks_off_is_taken_up_again(client, flights, monkeypatch):
    monkeypatch.setattr("coeval.dataset.RESUME_PAUSE", 0.0)
    flights.breaks = [0, 40, 40, 190]
    assert rows_of(client.dataset("numbers").batches()) == list(range(200))
    assert [ticket.offset for ticket in flights.tickets] == [0, 0, 40, 40, 190]
    flights.breaks = [20] * 10
    with pytest.raises(coeval.Unavailable, match="draining"):
        rows_of(client.dataset("numbers").batches())


def test_what_a_reader_asks_for(client, flights):
    batches = client.dataset("numbers", "i").batches(
        rank=1, world_size=4, seed=0, columns=["row"], resume=120, compression="lz4", batch_rows=9
    )
    assert rows_of(batches) == list(range(120, 200))
    asked = flights.tickets[0]
    assert (asked.name, asked.id, asked.rank, asked.world_size, asked.shuffle_seed) == ("numbers", "i", 1, 4, 0)
    assert (list(asked.columns), asked.offset, asked.compression, asked.batch_rows) == (["row"], 120, "lz4", 9)
    assert asked.HasField("shuffle_seed")


@pytest.mark.parametrize("parallel", [2, 3, 20])
def test_parallel_streams_come_in_order(client, flights, parallel):
    assert rows_of(client.dataset("numbers").batches(parallel=parallel)) == list(range(200))
    assert sorted(ticket.offset for ticket in flights.tickets) == list(range(0, 200, 30))
    # Leaving early ends the threads; what goes wrong in one of them is the caller's to hear.
    batches = client.dataset("numbers").batches(parallel=parallel)
    next(batches)
    batches.close()
    flights.breaks = [70] * 10
    with pytest.raises(coeval.Unavailable):
        rows_of(client.dataset("numbers").batches(parallel=parallel))
    assert not [t for t in threading.enumerate() if t.name == "coeval-endpoint"]


def test_torch_batches(client, flights):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dataset = client.dataset("numbers")
    batches = dataset.torch_batches("delay", 16, labels=["late", "row", "gap"], refused="skip")
    seen = list(batches)
    assert [len(batch["row"]) for batch in seen] == [16] * 12 + [6]
    assert (batches.rows, batches.refused) == (200, 2)
    together = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
    kept = [row for row in range(200) if row not in (7, 31)]
    assert set(together) == {"dense", "late", "row", "gap"}
    assert together["row"].tolist() == kept
    assert together["dense"].dtype == torch.float32 and together["dense"].tolist() == [[2.0 * r, 2.0 * r + 1] for r in kept]
    assert together["late"].dtype == torch.bool and together["late"].tolist() == [row % 3 == 0 for row in kept]
    assert together["gap"].isnan().tolist() == [row == 5 for row in kept]
    asked = flights.tickets[0]
    assert (asked.encode_for, list(asked.columns), asked.inputs_only) == ("delay", ["late", "row", "gap"], False)


def test_torch_batches_go_on_where_they_were(client, flights):
    pytest.importorskip("torch", reason="torch is not installed")
    dataset = client.dataset("numbers")
    batches = dataset.torch_batches("delay", 16, labels=["row"], refused="skip")
    before = [row for _ in range(3) for row in next(batches)["row"].tolist()]
    resume = batches.rows
    batches.close()
    after = dataset.torch_batches("delay", 16, labels=["row"], refused="skip", resume=resume, drop_last=True)
    after = [row for batch in after for row in batch["row"].tolist()]
    assert before + after == [row for row in range(200) if row not in (7, 31)][: 16 * 12]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "refuse 1 of these rows .the first is row 7 "),
        ({"refused": "maybe"}, "refused `maybe`"),
        ({"refused": "skip", "labels": ["word"]}, "label `word` is string"),
        ({"refused": "skip", "labels": ["lable"]}, "no column `lable`"),
    ],
)
def test_what_cannot_be_a_tensor(client, options, text):
    pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(coeval.InvalidArgument, match=text):
        list(client.dataset("numbers").torch_batches("delay", 16, **options))


def test_options_of_what_is_not_kept(client):
    unnamed = client.training_set("delay_inputs", {"event_timestamp": [NOON]})
    with pytest.raises(coeval.InvalidArgument, match="has no name: give it one"):
        unnamed.batches(seed=1)
    with pytest.raises(coeval.InvalidArgument, match="order `up`"):
        client.training_set("delay_inputs", {"event_timestamp": [NOON]}, order="up")


def test_spines_that_are_wrong(client):
    with pytest.raises(coeval.InvalidArgument, match="no column `event_timestamp`; it has `origin`"):
        client.training_set("delay_inputs", {"origin": ["JFK"]})
    with pytest.raises(coeval.InvalidArgument, match="visibility `all`"):
        client.training_set("delay_inputs", {"event_timestamp": [NOON]}, visibility="all")
    with pytest.raises(coeval.NotFound, match="no service `x`"):
        client.training_set("x", {"event_timestamp": [NOON]})


def test_what_the_server_says_of_a_spine(client, monkeypatch):
    catalog = client.catalog()
    catalog.services["broken"] = catalog.services["delay_inputs"]
    with pytest.raises(coeval.InvalidArgument, match="the spine has no key column `tailnum`"):
        client.training_set("broken", {"event_timestamp": [NOON]}).to_arrow()


def test_a_spine_that_breaks_off(client):
    def source():
        yield pa.record_batch({"event_timestamp": pa.array([0], type=TIMESTAMP)})
        raise OSError("the disk is gone")

    reader = pa.RecordBatchReader.from_batches(pa.schema([("event_timestamp", TIMESTAMP)]), source())
    with pytest.raises(coeval.InvalidArgument, match="the spine could not be read: .*the disk is gone"):
        client.training_set("delay_inputs", reader).to_arrow()
