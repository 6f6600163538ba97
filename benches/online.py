"""The online path: ours, its floor, and Feast, in turn, on a Redis of their own.

The floor is a tonic handler that forwards in one pipeline the very reads that ours sent (recorded before), and answers as
many bytes; `bench floor-serve`, see benches/src/online.rs. Everything runs on the same two cores: Redis, the server and
the callers, so a caller's microseconds are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from report import PEERS, Place, Report, Wrong, measured, say

KEYS = 100_000
FEATURES = 50
VIEWS = 5
WINDOW_KEYS = 2_000
EVENTS_PER_KEY_AND_DAY = 24
MATERIALIZED_FEATURES = 10
PUSH_RATE = 5_000
DAY = 86_400_000_000


def generate(place: Place, rows: int) -> Path:
    """Features written an hour ago, and events of the last seven days: old files would fall out of the windows."""
    folder = place.data / f"online-{rows}"
    made = folder / "made.json"
    now = time.time_ns() // 1000
    if made.exists() and now - json.loads(made.read_text())["at"] < DAY / 12:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)

    def times(values: np.ndarray) -> pa.Array:
        return pa.array(values, pa.timestamp("us", "UTC"))

    hour_ago = now - DAY // 24
    for view in range(VIEWS):
        columns = {"entity": np.arange(KEYS), "at": times(np.full(KEYS, hour_ago))}
        columns |= {f"f{i}": rng.random(KEYS) for i in range(FEATURES)}
        pq.write_table(pa.table(columns), folder / f"wide{view}.parquet")
    count = WINDOW_KEYS * 7 * EVENTS_PER_KEY_AND_DAY
    events = {
        "entity": rng.integers(0, WINDOW_KEYS, count),
        "amount": rng.random(count),
        "at": times(np.sort(now - rng.integers(60_000_000, 7 * DAY, count))),
        "id": [f"h{i}" for i in range(count)],
    }
    pq.write_table(pa.table(events), folder / "events.parquet")
    with pq.ParquetWriter(folder / "many.parquet", many_schema()) as writer:
        for start in range(0, rows, 1_000_000):
            part = min(1_000_000, rows - start)
            columns = {"entity": np.arange(start, start + part), "at": times(np.full(part, hour_ago))}
            columns |= {f"f{i}": rng.random(part) for i in range(MATERIALIZED_FEATURES)}
            writer.write_table(pa.table(columns, schema=many_schema()))
    made.write_text(json.dumps({"at": now}))
    return folder


def many_schema() -> pa.Schema:
    fields = [("entity", pa.int64()), ("at", pa.timestamp("us", "UTC"))]
    return pa.schema(fields + [(f"f{i}", pa.float64()) for i in range(MATERIALIZED_FEATURES)])


def definitions_of_wide(data: Path, views: int, *sources: str) -> str:
    """So many views of 50 features; other sources belong between the first of them and the views."""
    lines = ["entities:", "  - {name: thing, keys: [{name: entity, type: int64}]}", "sources:"]
    for view in range(views):
        lines.append(f"  - {{name: wide{view}, files: {data}/wide{view}.parquet, event_time: at}}")
    lines += [*sources, "feature_views:"]
    for view in range(views):
        lines.append(f"  - name: wide{view}\n    entity: thing\n    source: wide{view}\n    features:")
        lines += [f"      - {{name: f{i}, type: float64}}" for i in range(FEATURES)]
    return "\n".join(lines)


def definitions(data: Path) -> str:
    sources = [
        f"  - {{name: many, files: {data}/many.parquet, event_time: at}}",
        "  - name: events",
        "    stream: true",
        "    schema: [{name: entity, type: int64}, {name: amount, type: float64}, {name: at, type: timestamp},"
        " {name: id, type: string}]",
        "    event_time: at",
        "    event_id: id",
        f"    history: {data}/events.parquet",
    ]
    lines = [definitions_of_wide(data, VIEWS, *sources)]
    lines.append("  - name: many\n    entity: thing\n    source: many\n    features:")
    lines += [f"      - {{name: f{i}, type: float64}}" for i in range(MATERIALIZED_FEATURES)]
    aggregates = {"events_count": "count", "amount_sum": "sum, of: amount", "amount_mean": "mean, of: amount"}
    for name, function in aggregates.items():
        lines.append(f"  - name: {name}\n    entity: thing\n    source: events\n    windows: [7d]")
        lines.append(f"    aggregates: [{{name: value, function: {function}}}]")
    lines += [
        "requests:",
        "  - {name: call, fields: [{name: x, type: float64}]}",
        "transforms:",
        "  - name: derived",
        "    inputs: [{view: wide0, keys: {entity: entity}}, call]",
        "    features:",
    ]
    half = FEATURES // 2
    lines += [f'      - {{name: a{i}, expr: "wide0.f{i} * 0.5 + call.x"}}' for i in range(half)]
    case = "CASE WHEN wide0.f{i} > 0.5 THEN wide0.f{i} ELSE call.x END"
    lines += [f'      - {{name: c{i}, expr: "{case.format(i=i)}"}}' for i in range(half, FEATURES)]
    lines += [
        "feature_services:",
        "  - {name: wide, features: [wide0]}",
        f"  - {{name: wider, features: [{', '.join(f'wide{view}' for view in range(VIEWS))}]}}",
        f"  - {{name: windows, features: [{', '.join(aggregates)}]}}",
        '  - {name: called, features: [wide0, "call:x"]}',
        '  - {name: derived, features: [wide0, "call:x", "derived:*"]}',
    ]
    return "\n".join(lines) + "\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A child that is ended with the block."""

    def __init__(self, command: list, **options) -> None:
        self.process = subprocess.Popen([str(part) for part in command], **options)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Redis(Process):
    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        command = ["redis-server", "--port", self.port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        super().__init__([*command, "--dir", folder, "--loglevel", "warning"], stdout=subprocess.DEVNULL)
        wait_for_port(self.port)

    def cli(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_for_port(port: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise Wrong(f"nothing listens on port {port} after {seconds} s")


class Ours(Process):
    """`coeval serve` over a project of its own."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        data: Path,
        online: str,
        text: str | None = None,
        more: str = "",
        project: str = "bench",
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ports = f"grpc: 127.0.0.1:{free_port()}, http: 127.0.0.1:{free_port()}"
        settings = f"project: {project}\nonline: {online}\nserve: {{{ports}}}\n{more}"
        (folder / "coeval.yaml").write_text(settings)
        (folder / "definitions.yaml").write_text(text or definitions(data))
        self.place, self.folder = place, folder
        ready = folder / "ready.json"
        self.log = (folder / "server.log").open("w")
        command = [place.server, "-C", folder, "serve", "--ready-file", ready]
        super().__init__(command, stdout=self.log, stderr=self.log)
        until = time.monotonic() + 60
        while not ready.exists():
            if time.monotonic() > until or self.process.poll() is not None:
                raise Wrong(f"the server did not start, see {folder / 'server.log'}")
            time.sleep(0.05)
        said = json.loads(ready.read_text())
        self.address, self.http = said["grpc"], said["http"]

    def run(self, *words: str) -> str:
        command = [str(self.place.server), "-C", str(self.folder), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Wrong(f"`coeval {' '.join(words)}` ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def fill(self, sources: list[str]) -> None:
        self.run("apply")
        self.run("materialize", "--through", "now", *(word for source in sources for word in ("--source", source)))

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def load(place: Place, address: str, asked: list, *pace: object) -> dict:
    found = measured([place.bench, "load", address, *asked, *pace])
    if found["failed"]:
        raise Wrong(f"{found['failed']} of {found['answered']} requests failed: {found['failure']}")
    return found


def turns(report: Report, workload: str, contenders: dict, runs: int) -> None:
    """Each contender is a function that measures once."""
    found = report.runs.setdefault(workload, {})
    for turn in range(runs):
        for name, measure in contenders.items():
            result = measure()
            found.setdefault(name, []).append(result)
            say(
                f"   {workload} {turn + 1}/{runs} {name}: p50 {result['p50_us']:.0f} us, p99 {result['p99_us']:.0f} us, "
                f"{result['per_second']:.0f}/s"
            )


def median(report: Report, workload: str, name: str, what: str) -> float:
    return statistics.median(run[what] for run in report.runs[workload][name])


def beyond(report: Report, workload: str, micros: float, peer: str = "floor") -> None:
    """p50 at most the peer's and so many microseconds: the ratio is of what is added."""
    ours, other = median(report, workload, "ours", "p50_us"), median(report, workload, peer, "p50_us")
    added = (ours - other) / micros
    report.compare(f"{workload}: p50, added of {micros:.0f} us", ours, "us", peer, other, added, "<= 1")


def times_of(report: Report, workload: str, what: str, at_most: float) -> None:
    ours, other = median(report, workload, "ours", what), median(report, workload, "floor", what)
    report.compare(f"{workload}: {what.removesuffix('_us')}", ours, "us", "floor", other, ours / other, f"<= {at_most}")


def online(report: Report, place: Place, args: argparse.Namespace) -> None:
    if place.server is None:
        raise SystemExit("say where our server is: --server target/release/coeval")
    rows = args.rows[1] // 2
    data = generate(place, rows)
    work = place.data / "online-work"
    only = set(args.only)
    pace = ["--seconds", args.seconds]

    def wanted(*names: str) -> bool:
        return not only or any(name in only for name in names)

    def asked(service: str, entities: int = 1, keys: int = KEYS, field: bool = False) -> list:
        words = ["--project", "bench", "--service", service, "--keys", keys, "--entities", entities]
        return words + (["--field", "x"] if field else [])

    def guarded(name: str, work_of) -> None:
        say(f">> {name}")
        try:
            work_of()
        except Wrong as wrong:
            say(f"error: {wrong}")
            report.wrong.append(f"{name}: {wrong}")

    def reads(redis: Redis, ours: Ours) -> None:
        def against_floor(name: str, words: list, *more: object) -> None:
            commands = work / f"{name}.json"
            measured([place.bench, "record", ours.address, f"127.0.0.1:{redis.port}", commands, *words])
            answer = load(place, ours.address, words, "--seconds", 0.5)["answer_bytes"]
            url = f"redis://127.0.0.1:{redis.port}"
            command = [place.bench, "floor-serve", "--redis", url, "--commands", commands, "--answer-bytes", answer]
            with Process(command, stdout=subprocess.PIPE, text=True) as floor:
                address = floor.process.stdout.readline().strip()
                contenders = {
                    "floor": lambda: load(place, address, words, *pace, *more),
                    "ours": lambda: load(place, ours.address, words, *pace, *more),
                }
                turns(report, name, contenders, args.runs)

        if wanted("1x50"):
            against_floor("1x50", asked("wide"))
            beyond(report, "1x50", 60)
            times_of(report, "1x50", "p99_us", 2)
        if wanted("100x50"):
            against_floor("100x50", asked("wide", 100))
            times_of(report, "100x50", "p50_us", 1.5)
        if wanted("1x250"):
            against_floor("1x250", asked("wider"))
            beyond(report, "1x250", 150)
        if wanted("windows"):
            against_floor("windows", asked("windows", keys=WINDOW_KEYS))
            beyond(report, "windows", 150)
        if wanted("saturation"):
            against_floor("saturation", asked("wide"), "--callers", 32)
            ours_rate = median(report, "saturation", "ours", "per_second")
            floor_rate = median(report, "saturation", "floor", "per_second")
            what = "saturation: 32 callers"
            report.compare(what, ours_rate, "/s", "floor", floor_rate, ours_rate / floor_rate, ">= 0.6")
        if wanted("open"):
            against_floor("open", asked("wide"), "--rate", 2_000)
            beyond(report, "open", 60)
            times_of(report, "open", "p99_us", 2)
        for entities, added in ((1, 80), (100, 500)):
            name = f"derived-{entities}"
            if wanted(name, "derived"):
                contenders = {
                    "without": lambda: load(place, ours.address, asked("called", entities, field=True), *pace),
                    "ours": lambda: load(place, ours.address, asked("derived", entities, field=True), *pace),
                }
                turns(report, name, contenders, args.runs)
                beyond(report, name, added, "without")

    def feast(redis: Redis) -> None:
        if place.feast is None:
            report.checks.append("Feast was not measured: no --feast")
            return
        folder = work / "feast"
        peer = [place.feast, PEERS / "feast_store.py", folder, data, f"127.0.0.1:{redis.port}"]
        subprocess.run([str(part) for part in [*peer, "fill"]], check=True)
        # The key of an entity in Feast ends with its project.
        bytes_of_entities(report, redis, {"Feast's hash of one entity, the same 50 features": "*bench"})
        port = free_port()
        command = [place.feast.parent / "feast", "-c", folder, "serve", "--port", port, "--no-access-log"]
        with Process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            wait_for_port(port)
            http = [place.bench, "load-http", f"127.0.0.1:{port}", "wide", KEYS, "--callers", 8, *pace]
            server = [measured(http) for _ in range(args.runs)]
        sdk = [measured([*peer, "read", args.seconds]) for _ in range(args.runs)]
        report.runs["feast"] = {"server": server, "sdk": sdk}
        if "saturation" not in report.runs:
            return
        ours = median(report, "saturation", "ours", "per_second")
        for name, at_least in (("server", 100), ("sdk", 20)):
            other = median(report, "feast", name, "per_second")
            peer_name = f"Feast's {'Python server' if name == 'server' else 'SDK'}"
            report.compare("saturation: 1x50", ours, "/s", peer_name, other, ours / other, f">= {at_least}")

    def with_redis() -> None:
        with Redis(work / "redis") as redis, Ours(place, work / "ours", data, f"redis://127.0.0.1:{redis.port}") as ours:
            ours.fill([f"wide{view}" for view in range(VIEWS)])
            wait_until_ready(ours)
            ours_of = {f"{view} of one entity": f"c1:*{view}@*" for view in ("wide0", "events_count")}
            bytes_of_entities(report, redis, ours_of)
            reads(redis, ours)
            if wanted("feast", "saturation"):
                guarded("feast", lambda: feast(redis))
            if wanted("push"):
                found = measured([place.bench, "push", ours.address, "bench", "events", WINDOW_KEYS, PUSH_RATE, 60])
                report.runs["push"] = {"ours": [found]}
                lost = found["sent"] - found["accepted"]
                if lost or found["rejected"]:
                    raise Wrong(f"push: {lost} of {found['sent']} events were not accepted")
                what = f"push to visible, {PUSH_RATE}/s for 60 s: p99"
                report.compare(what, found["p99_ms"], "ms", "bound", 50, found["p99_ms"] / 50, "<= 1")

    def materialize() -> None:
        with Redis(work / "redis") as redis, Ours(place, work / "ours", data, f"redis://127.0.0.1:{redis.port}") as ours:
            ours.run("apply")
            functions = redis.cli("FUNCTION", "LIST")
            function = re.search(r"coeval\d+_row", functions)[0]
            raw, our_runs, peaks = [], [], []
            for _ in range(args.runs):
                redis.cli("FLUSHDB")
                blob = 51 + 2 + 8 * MATERIALIZED_FEATURES
                url = f"redis://127.0.0.1:{redis.port}"
                raw.append(measured([place.bench, "raw-writes", url, function, rows, blob]))
                redis.cli("FLUSHDB")
                with Ours(place, work / "ours-again", data, url) as again:
                    again.run("apply")
                    watch = Watch(again)
                    started = time.monotonic()
                    again.run("materialize", "--through", "now", "--source", "many")
                    seconds = time.monotonic() - started
                    our_runs.append({"seconds": seconds, "per_second": rows / seconds})
                    peaks.append(watch.stop())
                say(f"   materialize: raw {raw[-1]['per_second']:.0f}/s, ours {our_runs[-1]['per_second']:.0f}/s")
            report.runs["materialize"] = {"raw": raw, "ours": our_runs}
            ours_rate = median(report, "materialize", "ours", "per_second")
            raw_rate = median(report, "materialize", "raw", "per_second")
            what = f"materialize {rows} x {MATERIALIZED_FEATURES}"
            report.compare(what, ours_rate, "rows/s", "raw pipeline", raw_rate, ours_rate / raw_rate, ">= 0.6")
            early, late = (statistics.median(pair) for pair in zip(*peaks))
            report.compare("materialize: memory, second half", late, "bytes", "first half", early, late / early, "<= 1.1")

    def embedded() -> None:
        with Ours(place, work / "ours", data, "embedded") as ours:
            ours.fill(["wide0"])
            wait_until_ready(ours, "wide")
            words = asked("wide")
            answer = load(place, ours.address, words, "--seconds", 0.5)["answer_bytes"]
            command = [place.bench, "floor-serve", "--answer-bytes", answer]
            with Process(command, stdout=subprocess.PIPE, text=True) as floor:
                address = floor.process.stdout.readline().strip()
                contenders = {
                    "no-op": lambda: load(place, address, words, *pace),
                    "ours": lambda: load(place, ours.address, words, *pace),
                }
                turns(report, "embedded-1x50", contenders, args.runs)
            beyond(report, "embedded-1x50", 40, "no-op")

    redis_reads = ["1x50", "100x50", "1x250", "windows", "saturation", "open", "derived", "derived-1", "derived-100"]
    if wanted(*redis_reads, "feast", "push"):
        guarded("redis", with_redis)
    if wanted("embedded"):
        guarded("embedded", embedded)
    if wanted("materialize"):
        guarded("materialize", materialize)


class Watch:
    """The memory of a server while something runs."""

    def __init__(self, server: Ours) -> None:
        self.samples: list[tuple[float, int]] = []
        self.server, self.watching = server, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while self.watching:
            self.samples.append((time.monotonic(), self.server.resident_bytes()))
            time.sleep(0.05)

    def stop(self) -> tuple[int, int]:
        """The most in each half."""
        self.watching = False
        self.thread.join()
        middle = (self.samples[0][0] + self.samples[-1][0]) / 2
        return (
            max(size for at, size in self.samples if at <= middle),
            max(size for at, size in self.samples if at > middle),
        )


def wait_until_ready(ours: Ours, service: str = "windows") -> None:
    """Until views over streams are built from history."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if "UNAVAILABLE" not in ours.run("--json", "features", "get", service, "--row", "entity=1").upper():
            return
        time.sleep(0.5)
    raise Wrong("the views over the stream are not built after 300 s")


# Keys hold bytes that are no text, so Redis itself adds up.
SIZES = """
local sizes, cursor = {}, '0'
repeat
  local found = redis.call('SCAN', cursor, 'MATCH', ARGV[1], 'COUNT', 1000)
  cursor = found[1]
  for _, key in ipairs(found[2]) do
    sizes[#sizes + 1] = redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0)
  end
until cursor == '0' or #sizes >= 500
return sizes
"""


def bytes_of_entities(report: Report, redis: Redis, patterns: dict[str, str]) -> None:
    """What one entity takes, as Redis counts it."""
    for what, pattern in patterns.items():
        sizes = [int(size) for size in redis.cli("EVAL", SIZES, "0", pattern).split()]
        if sizes:
            report.checks.append(f"{what}: {statistics.median(sizes):.0f} bytes in Redis (median of {len(sizes)} keys)")
