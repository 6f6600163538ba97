"""The client against the real server: definitions to predictions in a small shop.

Runs when COEVAL_SERVER_BIN names a `coeval` binary; `make test` sets it.
"""

import datetime as dt
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import coeval
from coeval import Status

SERVER = os.environ.get("COEVAL_SERVER_BIN")
pytestmark = pytest.mark.skipif(not SERVER, reason="COEVAL_SERVER_BIN is not set: the tests against a real server did not run")

UTC = dt.timezone.utc
# Whole minutes in the past: the server's clock is later, whatever it does.
DAY = dt.datetime(2024, 3, 10, tzinfo=UTC)


def at(hours: float) -> dt.datetime:
    return DAY + dt.timedelta(hours=hours)


SETTINGS = """
project: shop
store: ./.coeval
online: embedded
serve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0, request_time: allowed}
serving_log: {sample: 100%, flush: 1s}
"""

DEFINITIONS = """
entities:
  - {name: customer, keys: [{name: customer, type: string}]}
  - {name: pair, keys: [{name: customer, type: string}, {name: shop, type: string}]}

sources:
  - {name: prices, files: data/prices.parquet, event_time: seen_at, delay: 10m, every: 1h}
  - {name: people, files: data/people.parquet, static: true}
  - name: orders
    stream: true
    schema:
      - {name: customer, type: string, nullable: true}
      - {name: shop, type: string, nullable: true}
      - {name: amount, type: float64, nullable: true}
      - {name: gone, type: bool}
      - {name: id, type: string}
    event_time: ordered_at
    event_id: id
    deleted: gone
    history: data/orders/*.parquet

feature_views:
  - name: price
    entity: customer
    source: prices
    ttl: 3h
    features: [{name: price, type: float64, default: 9.5}, {name: level, type: int64}]
  - name: person
    entity: customer
    source: people
    features: [{name: city, type: string}, {name: born, type: date}]
  - name: last_order
    entity: customer
    source: orders
    features: [{name: amount, type: float64}, {name: shop, type: string}]
  - name: spending
    entity: customer
    source: orders
    windows: [1h, 24h]
    aggregates:
      - {name: orders, function: count}
      - {name: amount_sum, function: sum, of: amount}
      - {name: amount_mean, function: mean, of: amount, default: 0.0}
  - name: pair_spending
    entity: pair
    source: orders
    windows: [24h]
    aggregates: [{name: amount_max, function: max, of: amount}]

requests:
  - {name: basket, fields: [{name: total, type: float64}, {name: coupon, type: string, nullable: true}]}

vocabularies:
  - {name: coupons, values: [TEN, TWENTY]}

transforms:
  - name: context
    inputs: [spending, basket]
    features:
      - {name: ratio, expr: "basket.total / (spending.amount_mean_24h + 1.0)"}
      - {name: coupon_id, expr: "vocab(basket.coupon, 'coupons')", type: int64}

feature_services:
  - {name: buying, features: [price, person, last_order, spending, pair_spending, "context:*", "basket:*"]}
  - {name: small, features: ["spending:orders_24h", "context:ratio"]}

models:
  - name: buys
    features: small
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["*"], missing: 0.0}]
    outputs: [{name: p_buys, dtype: float32}]
    decision: "p_buys > 0.9"
    label: {name: bought, type: bool, within: 24h}
"""


class Shop:
    """A project in a folder and the server that serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "data" / "orders").mkdir(parents=True)
        (folder / "coeval.yaml").write_text(SETTINGS)
        (folder / "shop.yaml").write_text(DEFINITIONS)
        timestamp = pa.timestamp("us", tz="UTC")
        prices = {
            "customer": pa.array(["ann", "ann", "bob"]),
            "seen_at": pa.array([at(1), at(2), at(2)], type=timestamp),
            "price": pa.array([1.5, 2.5, None], type=pa.float64()),
            "level": pa.array([1, 2, 3], type=pa.int64()),
        }
        pq.write_table(pa.table(prices), folder / "data" / "prices.parquet")
        people = {"customer": ["ann", "bob"], "city": ["Oslo", None], "born": [dt.date(1990, 1, 2), dt.date(1950, 3, 4)]}
        pq.write_table(pa.table(people), folder / "data" / "people.parquet")
        history = {
            "customer": ["ann", "ann", "bob", None],
            "shop": ["x", "y", "x", "x"],
            "amount": pa.array([10.0, 0.1, 5.0, 7.0]),
            "gone": [False] * 4,
            "id": ["h1", "h2", "h3", "h4"],
            "ordered_at": pa.array([at(0), at(0.5), at(0.75), at(0.8)], type=timestamp),
        }
        pq.write_table(pa.table(history), folder / "data" / "orders" / "1.parquet")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        assert SERVER
        return subprocess.run([SERVER, "-C", str(self.folder), *arguments], capture_output=True, text=True, timeout=120)

    def start(self) -> str:
        assert SERVER
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [SERVER, "-C", str(self.folder), "serve", "--ready-file", str(ready)], stdout=log, stderr=log
        )
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                return f"grpc://{json.loads(ready.read_text())['grpc']}"
            except (OSError, ValueError):
                time.sleep(0.05)
        raise AssertionError(f"not ready: {(self.folder / 'server.log').read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("shop"))
    for command in ("validate", "plan", "apply"):
        done = shop.command(command)
        assert done.returncode == 0, done.stdout + done.stderr
    yield shop
    if shop.process is not None and shop.process.poll() is None:
        shop.process.kill()
        shop.process.wait()


@pytest.fixture(scope="module")
def client(shop):
    with coeval.connect(shop.start()) as client:
        client.refresh(timeout=60)
        client.materialize(through=at(3))
        yield client


def rows(**columns):
    """Requests for ann, bob, somebody unknown and nobody."""
    return {
        "customer": ["ann", "bob", "zoe", None],
        "shop": ["x", "x", "x", "x"],
        "total": [3.0, float("nan"), 0.0, 1.0],
        "coupon": ["TEN", None, "other", "TWENTY"],
        **columns,
    }


def test_the_catalog(client):
    catalog = client.catalog()
    assert client.project == "shop"
    assert set(catalog.views) == {"price", "person", "last_order", "spending", "pair_spending"}
    assert all(view.ready for view in catalog.views.values())
    assert catalog.sources["orders"].event_time == "ordered_at"
    assert {f.name for f in catalog.services["buying"].inputs} >= {"customer", "shop", "total", "coupon"}
    assert catalog.services["buying"].features.field("person:born").type == pa.date32()


def test_values_and_statuses(client):
    answer = client.features("buying", rows(), at=at(3), provenance=True)
    assert answer["price:price"].to_pylist() == [2.5, 9.5, 9.5, 9.5]
    assert answer.statuses["price:price"].tolist() == [
        Status.PRESENT, Status.NULL_VALUE, Status.NOT_FOUND, Status.NOT_FOUND
    ]
    assert answer["price:level"].to_pylist() == [2, 3, None, None]
    assert answer["person:city"].to_pylist() == ["Oslo", None, None, None]
    assert answer["person:born"].to_pylist() == [dt.date(1990, 1, 2), dt.date(1950, 3, 4), None, None]
    assert answer["last_order:shop"].to_pylist() == ["y", "x", None, None]
    assert answer["spending:orders_24h"].to_pylist() == [2, 1, 0, 0]
    assert answer["spending:amount_sum_24h"].to_pylist() == [10.1, 5.0, None, None]
    assert answer["pair_spending:amount_max_24h"].to_pylist() == [10.0, 5.0, None, None]
    assert answer["context:coupon_id"].to_pylist() == [1, 0, 0, 2]
    assert answer["context:ratio"].to_pylist()[0] == 3.0 / (5.05 + 1.0)
    assert np.isnan(answer["basket:total"].to_pylist()[1])
    assert answer["basket:coupon"].to_pylist() == ["TEN", None, "other", "TWENTY"]
    assert answer.at.to_pylist() == [at(3)] * 4
    assert {view.view for view in answer.views} >= {"price", "spending"}


def test_serving_and_training_agree(client):
    asked = rows(event_timestamp=[at(3)] * 4, row=[0, 1, 2, 3])
    offline = client.training_set("buying", asked, statuses=True).to_arrow()
    online = client.features("buying", asked, at=at(3)).to_arrow(statuses=True)
    assert offline.schema.names[: len(asked)] == list(asked)
    assert offline.column("row").to_pylist() == [0, 1, 2, 3]
    for name in online.schema.names:
        assert repr(offline.column(name).to_pylist()) == repr(online.column(name).to_pylist()), name


def test_every_row_of_a_large_spine_comes_back_in_order(client):
    count = 50_000
    asked = {
        "event_timestamp": [at(3)] * count,
        "customer": ["ann", "bob", None, "zoe"] * (count // 4),
        "total": np.arange(count, dtype=np.float64),
        "coupon": [None] * count,
        "row": np.arange(count),
    }
    table = client.training_set("small", asked).to_arrow()
    assert table.column("row").to_pylist() == list(range(count))
    assert table.column("spending:orders_24h").to_pylist()[:4] == [2, 1, 0, 0]


def test_datasets_are_kept(client):
    spine = {"event_timestamp": [at(3), at(0.6)], "customer": ["ann", "ann"], "total": [1.0, 2.0], "coupon": [None, "TEN"]}
    dataset = client.training_set("small", spine, name="two", seed=5)
    table = dataset.to_arrow()
    assert dataset.id and dataset.rows == 2
    assert client.dataset("two").to_arrow().equals(table)
    assert client.dataset("two", dataset.id).to_arrow().equals(table)
    assert [(d.name, d.id, d.rows) for d in client.datasets() if d.name == "two"] == [("two", dataset.id, 2)]


def test_the_same_inputs_are_one_dataset(client):
    spine = {"event_timestamp": [at(3), at(0.6)], "customer": ["ann", "ann"], "total": [1.0, 2.0], "coupon": [None, "TEN"]}
    first = client.dataset("two")
    again = client.training_set("small", spine, name="two", seed=5, order="any")
    table = again.to_arrow()
    assert again.existed and again.rows == 2
    assert table.column("__ordinal").to_pylist() == [0, 1]
    assert table.drop_columns(["__ordinal"]).equals(first.to_arrow())
    assert [report.source for report in first.known_at] == [report.source for report in again.known_at]
    profile = first.profile
    assert (profile["rows"], profile["exact"]) == (2, True)
    orders = profile["features"]["spending:orders_24h"]
    assert orders["rows"] == 2 and sum(bin["rows"] for bin in orders["parts"][0]["bins"]) + orders["nulls"] + orders["defaults"] == 2
    described = first.describe()
    assert described["id"] == again.id and described["profile"]["spending:orders_24h"]["rows"] == 2


def test_readers_share_shuffle_and_resume(client):
    count = 10_000
    spine = {
        "event_timestamp": [at(3)] * count,
        "customer": ["ann", "bob", None, "zoe"] * (count // 4),
        "total": np.arange(count, dtype=np.float64),
        "coupon": [None] * count,
        "row": np.arange(count),
    }
    dataset = client.training_set("small", spine, name="shared").drain()

    def read(**options):
        return [row for batch in dataset.batches(columns=["row"], **options) for row in batch.column("row").to_pylist()]

    assert read() == list(range(count)) == read(parallel=3) == read(compression="zstd")
    shuffled = read(seed=1)
    assert shuffled != read() and sorted(shuffled) == read()
    shares = [read(rank=rank, world_size=3, seed=1) for rank in range(3)]
    assert [row for share in shares for row in share] == shuffled
    assert read(rank=2, world_size=3, seed=1, resume=1_000, batch_rows=100) == shares[2][1_000:]
    assert read(seed=2) != shuffled
    with pytest.raises(coeval.InvalidArgument, match="rank 3"):
        read(rank=3, world_size=3)
    with pytest.raises(coeval.InvalidArgument, match="`rwo`"):
        list(dataset.batches(columns=["rwo"]))
    assert dataset.to_arrow(parallel=2).num_rows == count


def test_tensors_are_what_serving_feeds_the_model(client):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    spine = {
        "event_timestamp": [at(3)] * 3,
        "customer": ["ann", "bob", "zoe"],
        "total": [3.0, 1.0, 0.0],
        "coupon": [None] * 3,
        "late": [True, False, True],
    }
    kept = client.training_set("small", spine, name="tensors")
    streamed = client.training_set("small", spine)
    served = client.features("small", spine, at=at(3))
    expected = torch.tensor(
        [served["spending:orders_24h"].to_pylist(), served["context:ratio"].to_pylist()], dtype=torch.float64
    ).T.to(torch.float32)
    expected = torch.nan_to_num(expected, nan=0.0)
    for dataset in (kept, streamed):
        batches = list(dataset.torch_batches("buys", 2, labels=["late"]))
        assert [list(batch["late"]) for batch in batches] == [[True, False], [True]]
        assert torch.equal(torch.cat([batch["dense"] for batch in batches]), expected)
    with pytest.raises(coeval.NotFound, match="bought"):
        kept.torch_batches("bought", 2).__next__()
    unlike = client.training_set("buying", rows(event_timestamp=[at(3)] * 4), name="unlike")
    with pytest.raises(coeval.CoevalError, match="reads feature service `small`"):
        list(unlike.torch_batches("buys", 2))


def test_the_command_line_tells_of_datasets(shop, client):
    server = ("--server", client._flight_location.partition("//")[2])
    shown = shop.command("--json", "dataset", "show", "two", *server)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["rows"] == 2 and len(facts["parts"]) == 1 and isinstance(facts["known_at"], list)
    assert "parts" in shop.command("dataset", "show", "two", *server).stdout
    pq.write_table(
        pa.table({"event_timestamp": pa.array([at(3)]), "customer": ["ann"], "total": [1.0], "coupon": ["TEN"]}),
        shop.folder / "spine.parquet",
    )
    create = ("--json", "dataset", "create", "cli", "--service", "small", "--spine", str(shop.folder / "spine.parquet"), *server)
    for existed in (False, True):
        created = shop.command(*create)
        assert created.returncode == 0, created.stdout + created.stderr
        assert json.loads(created.stdout)["existed"] is existed


def test_datasets_are_held_against_each_other(shop, client):
    whole = {
        "event_timestamp": [at(3)] * 4_000,
        "customer": ["ann", "bob", None, "zoe"] * 1_000,
        "shop": ["x"] * 4_000,
        "coupon": [None] * 4_000,
    }
    numbers = np.random.default_rng(1).normal(size=8_000)
    client.training_set("buying", {**whole, "total": numbers[:4_000]}, name="spring").drain()
    client.training_set("buying", {**whole, "total": numbers[4_000:] + 1.0}, name="july").drain()
    both = ("--dataset", "july", "--against", "spring")
    shown = shop.command("--json", "drift", "show", *both)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    verdicts = {feature["name"]: feature["verdict"] for feature in json.loads(shown.stdout)["report"]["features"]}
    assert verdicts["basket:total"] == "DRIFT", verdicts
    # Four customers at one moment are four blocks: of their own features nothing can be said.
    assert verdicts["spending:orders_24h"] == "INSUFFICIENT_DATA", verdicts
    checked = shop.command("drift", "show", "--check", *both)
    assert checked.returncode == 1 and "basket:total: DRIFT" in checked.stdout, checked.stdout + checked.stderr
    drawing = shop.folder / "total.svg"
    plotted = shop.command("drift", "plot", *both, "--feature", "basket:total", "--svg", str(drawing))
    assert plotted.returncode == 0, plotted.stdout + plotted.stderr
    assert "█" in plotted.stdout and drawing.read_text().startswith("<svg")
    wrong = shop.command("drift", "plot", *both, "--feature", "basket:totl")
    assert wrong.returncode == 1 and "basket:total" in wrong.stderr, wrong.stderr


def test_pushed_events_count(client):
    now = dt.datetime.now(UTC).replace(microsecond=0) - dt.timedelta(minutes=2)
    events = {
        "customer": ["eve", "eve", None],
        "shop": ["x", "x", "x"],
        "amount": [1.0, None, 2.0],
        "gone": [False] * 3,
        "id": ["p1", "p2", "p3"],
        "ordered_at": [now, now + dt.timedelta(seconds=1), now],
    }
    first = client.push("orders", events, wait_visible=True)
    assert first.accepted + len(first.rejected) == 3
    again = client.push("orders", events)
    assert again.accepted == 0 and again.duplicates == first.accepted
    answer = client.features("small", {"customer": ["eve"], "total": [0.0], "coupon": [None]})
    assert answer["spending:orders_24h"].to_pylist() == [2]
    early = client.push("orders", {**events, "id": ["f1", "f2", "f3"], "ordered_at": [now + dt.timedelta(days=1)] * 3})
    assert early.early >= 2
    client.flush()
    spine = {"event_timestamp": [dt.datetime.now(UTC)], "customer": ["eve"], "total": [0.0], "coupon": [None]}
    assert client.training_set("small", spine).to_arrow().column("spending:orders_24h").to_pylist() == [2]


def scripted(width):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width, 1))

        def forward(self, dense: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(dense @ self.weight)[:, 0]

    return torch.jit.script(Model().eval())


def test_a_model_from_registration_to_prediction(client):
    registered = client.register_model("buys", scripted(2), metrics={"auc": 0.5}, seed=1)
    assert registered.version >= 1
    client.deploy_model("buys", registered.version, why="test")
    client.refresh(timeout=60)
    request = {"customer": ["ann", "zoe"], "total": [3.0, 0.0], "coupon": [None, None]}
    answer = client.predict("buys", request, at=at(3), include_features=True, deadline_ms=10_000)
    assert [outcome.status for outcome in answer.outcomes] == [coeval.RowStatus.OK] * 2
    assert [outcome.version for outcome in answer.outcomes] == [registered.version] * 2
    ratio = np.float32(3.0 / 6.05)
    expected = 1 / (1 + np.exp(-np.array([2.0 + ratio, 0.0])))
    assert np.allclose(answer["p_buys"], expected, atol=1e-6)
    assert answer.features["spending:orders_24h"].to_pylist() == [2, 0]
    record = next(model for model in client.models() if model.version == registered.version)
    assert record.state == "champion" and record.seed == 1 and record.metrics == {"auc": 0.5}
    assert [(gateway.state, gateway.max_rows) for gateway in record.gateways] == [("ready", 256)]
    assert record.gateways[0].memory_bytes > 0
    assert record.environment_digest.startswith("sha256:") and "torch" in record.libraries
    again = client.register_model("buys", scripted(2))
    assert again.version == registered.version or not again.existed


def test_labels_are_joined_to_what_was_predicted(client):
    registered = client.register_model("buys", weighted([1.0, 2.0]), importances={"context:ratio": 2.0})
    client.deploy_model("buys", registered.version, why="test")
    client.promote("buys", registered.version, why="test")
    client.refresh(timeout=60)
    # A day of its own, which no other test asks about.
    day = at(24 * 40)
    request = {"customer": ["ann", "bob", "zoe"], "total": [9.0, 1.0, 0.0], "coupon": [None] * 3}
    answer = client.predict("buys", request, at=day, request_id="labelled")
    assert answer.request_id == "labelled"
    assert client.add_labels("buys", {"request_id": ["labelled"] * 3, "row": [0, 1, 2], "bought": [True, False, False]}) == 3
    # What happened next to an entity says the same without a request id, and is another metric.
    spent = {"customer": ["ann"], "time": [day + dt.timedelta(hours=2)], "spent": [12.5]}
    assert client.add_labels("buys", spent, metric="spent") == 1
    window = {"start": day - dt.timedelta(hours=1), "end": day + dt.timedelta(hours=1)}
    until = time.monotonic() + 60
    while not (report := client.quality("buys", **window))["parts"] and time.monotonic() < until:
        time.sleep(0.2)
    (part,) = report["parts"]
    assert (part["version"], part["arm"], part["rows"], part["labelled"]) == (registered.version, "champion", 3, 3)
    assert part["classes"]["auc"] == 1.0 and part["classes"]["positives"] == 1
    assert part["metrics"] == {"spent": {"rows": 1, "mean": 12.5, "sum": 12.5}}
    assert part["shown"]["customer"]["asked"] == 3
    assert client.add_labels("buys", {"request_id": ["labelled"], "row": [0], "bought": pa.array([None], pa.bool_())}) == 1
    assert client.quality("buys", **window)["parts"][0]["labelled"] == 2
    with pytest.raises(coeval.CoevalError, match="no column `bought`"):
        client.add_labels("buys", {"request_id": ["labelled"]})
    with pytest.raises(coeval.CoevalError, match="Did you mean|did you mean|nobody|`buys`"):
        client.add_labels("bys", {"request_id": ["labelled"], "bought": [True]})


def test_a_model_is_turned_off_and_on_and_rolled_out_by_criteria_only(client):
    registered = client.register_model("buys", weighted([3.0, 1.0]))
    client.deploy_model("buys", registered.version, why="test")
    client.promote("buys", registered.version, why="test")
    request = {"customer": ["ann"], "total": [3.0], "coupon": [None]}
    assert client.change_rollout("buys", "off", why="it is not well")["off"]["why"] == "it is not well"
    (outcome,) = client.predict("buys", request, at=at(3), deadline_ms=10_000).outcomes
    assert outcome.arm == "off" and outcome.status != coeval.RowStatus.OK and "it is not well" in outcome.reason
    story = client.change_rollout("buys", "on", why="it is again")
    assert story["off"] is None and story == client.rollout("buys") | {"control_log": story["control_log"]}
    assert [line["kind"] for line in story["history"]][-2:] == ["model_off", "model_on"]
    (outcome,) = client.predict("buys", request, at=at(3), deadline_ms=10_000).outcomes
    assert outcome.arm == "champion" and outcome.version == registered.version

    other = client.register_model("buys", weighted([3.0, 1.1]))
    client.deploy_model("buys", other.version, why="test")
    with pytest.raises(coeval.CoevalError, match="a rollout without criteria is refused"):
        client.begin_rollout("buys", other.version, why="on a feeling")
    with pytest.raises(coeval.CoevalError, match="no rollout of model `buys` runs"):
        client.change_rollout("buys", "hold")
    client.retire("buys", other.version, why="test")


def weighted(weights):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.tensor(weights)[:, None])

        def forward(self, dense: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(dense @ self.weights)[:, 0]

    return torch.jit.script(Weighted().eval())


def mixing():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Mixing(torch.nn.Module):
        def forward(self, dense: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid((dense - dense.mean(0)).sum(1))

    return torch.jit.script(Mixing().eval())


def test_golden_rows_decide_whether_a_version_is_served(client):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dense = torch.linspace(-2, 2, 32).view(16, 2)
    good = weighted([0.5, -1.5])
    registered = client.register_model("buys", good, golden=coeval.Golden.of(good, {"dense": dense}, ["p_buys"]))
    champion = client.deploy_model("buys", registered.version, why="golden rows hold").champion
    client.promote("buys", registered.version, why="it is the newest")
    assert client.deploy_model("buys", registered.version).existed
    record = next(model for model in client.models() if model.version == registered.version)
    assert record.state == "champion" and record.golden_digest and record.gateways[0].notes == []

    # Trained to something else than what was exported.
    other = weighted([0.5, -1.4])
    wrong = client.register_model("buys", other, golden=coeval.Golden.of(good, {"dense": dense}, ["p_buys"]))
    with pytest.raises(coeval.Conflict, match=r"output `p_buys` of row 0 is .*, expected .* \(rtol 0.0001, atol 0.00001 for"):
        client.deploy_model("buys", wrong.version)
    loose = coeval.Golden.of(good, {"dense": dense}, ["p_buys"], atol=0.2)
    assert not client.register_model("buys", other, golden=loose).existed
    with pytest.raises(coeval.InvalidArgument, match="`input:dense` has"):
        client.register_model("buys", good, golden=coeval.Golden({"dense": torch.zeros(2, 3)}, {"p_buys": torch.zeros(2)}))

    if champion != registered.version:
        assert client.rollback("buys", why="that was a test").champion == champion
        client.retire("buys", registered.version, why="that was a test")


def test_a_model_whose_rows_influence_each_other_is_served_one_row_at_a_time(client):
    registered = client.register_model("buys", mixing())
    deployed = client.deploy_model("buys", registered.version, why="a batch normalised by itself")
    assert "rows influence each other" in deployed.notes[0]
    request = {"customer": ["ann", "zoe"], "total": [3.0, 0.0], "coupon": [None, None]}
    answer = client.predict("buys", request, at=at(3), version=registered.version, deadline_ms=10_000)
    assert np.allclose(answer["p_buys"], 0.5), "each row is its own mean"
    record = next(model for model in client.models() if model.version == registered.version)
    assert record.gateways[0].max_rows == 1
    if record.state == "active":
        client.retire("buys", registered.version, why="that was a test")


def test_a_model_that_does_not_fit(client):
    with pytest.raises(coeval.CoevalError, match="dense"):
        registered = client.register_model("buys", scripted(5))
        client.deploy_model("buys", registered.version)
    with pytest.raises(coeval.CoevalError, match="buys"):
        registered = client.register_model("buys", b"no model at all")
        client.deploy_model("buys", registered.version)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda c: c.predict("buyz", rows()), coeval.NotFound, "buyz"),
        (lambda c: c.features(["spendin:orders_24h"], {"customer": ["ann"]}), coeval.CoevalError, "spendin"),
        (lambda c: c.features(["spending:orders_24h"], {"customer": [1]}), coeval.InvalidArgument, "customer"),
        (lambda c: c.features(["spending:orders_24h"], {"custmer": ["ann"]}), coeval.InvalidArgument, "customer"),
        (
            lambda c: c.training_set("small", {"event_timestamp": [at(3)], "total": [1.0], "coupon": [None]}).to_arrow(),
            coeval.InvalidArgument,
            "customer",
        ),
        (lambda c: c.dataset("nothing").to_arrow(), coeval.NotFound, "nothing"),
        (lambda c: c.deploy_model("buys", 4711), coeval.CoevalError, "4711"),
        (lambda c: coeval.Client(f"grpc://{c._flight_location.partition('//')[2]}", "other").catalog(), coeval.NotFound, "other"),
    ],
    ids=["model", "view", "key-type", "key", "spine", "dataset", "version", "project"],
)
def test_wrong_input_is_answered_well(client, call, kind, text):
    with pytest.raises(kind, match=text):
        call(client)


def test_a_drained_server_ends_well_and_keeps_everything(shop, client):
    before = client.features("small", {"customer": ["ann"], "total": [0.0], "coupon": [None]}, at=at(3))
    assert shop.stop() == 0
    with coeval.connect(shop.start()) as again:
        again.refresh(timeout=60)
        after = again.features("small", {"customer": ["ann"], "total": [0.0], "coupon": [None]}, at=at(3))
        assert after.to_arrow(statuses=True).equals(before.to_arrow(statuses=True))
        assert {"two", "shared"} <= {d.name for d in again.datasets()}
        # Killed in the middle: nothing acknowledged is lost.
        now = dt.datetime.now(UTC) - dt.timedelta(minutes=1)
        with again.pusher("orders") as pusher:
            for number in range(50):
                result = pusher.push(
                    {"customer": ["kim"], "shop": ["x"], "amount": [1.0], "gone": [False], "id": [f"k{number}"], "ordered_at": [now]}
                )
                assert result.accepted == 1
    shop.stop(signal.SIGKILL)
    with coeval.connect(shop.start()) as again:
        again.refresh(timeout=60)
        ends = time.monotonic() + 10
        while True:
            answer = again.features("small", {"customer": ["kim"], "total": [0.0], "coupon": [None]})
            if answer["spending:orders_24h"].to_pylist() == [50] or time.monotonic() > ends:
                break
        assert answer["spending:orders_24h"].to_pylist() == [50]
    assert shop.stop() == 0
