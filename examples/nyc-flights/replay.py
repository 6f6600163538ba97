#!/usr/bin/env python3
"""Replays the first two weeks of July as they happened, and audits every value that was served.

For each moment at which some flight is an hour from its scheduled departure, in order: push the departures and landings
that have happened by then, make the weather visible that is known by then, ask for features and for predictions *at* that
moment. A departure in that very minute has been pushed, too, and must not count.

Afterwards the offline engine is asked for the same rows. Every served value, request fields included, has to equal the
offline value bit for bit: same bits, same nulls, same status. And the model has to be as good online as offline.

    python replay.py --url grpc://127.0.0.1:7400 --report target/demo/report.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import coeval
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import train as training

HERE = Path(__file__).resolve().parent
BEGIN, END = dt.date(2013, 7, 1), dt.date(2013, 7, 15)
HOUR_US = 3_600_000_000
# The demo measures latency; it does not want a busy laptop to turn an audit into a test of patience.
DEADLINE_MS = 10_000
COMPARED_MIN = 200_000
AUC_DIFFERENCE_MAX = 0.001
EXAMPLES_MAX = 10


@dataclass
class Replay:
    """What the replay saw."""

    features: pa.Table
    predict_features: pa.Table
    p_late: np.ndarray
    outcomes: dict[str, int]
    # Of every row: the request that it was part of, and its place there.
    requests: list[tuple[str, int]]
    features_us: np.ndarray
    predict_us: np.ndarray
    pushed: int
    seconds: float


@dataclass
class Audit:
    """The comparison of served values with the offline engine's."""

    compared: int = 0
    mismatched: int = 0
    nulls: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Late:
    """Some events arrive later than they happen."""

    one_in: int
    by_us: int


class Events:
    """The events of one source, in time order, and how far they have been pushed."""

    def __init__(self, client: coeval.Client, source: str, path: Path, time_column: str, late: Late | None = None) -> None:
        self.table = pq.read_table(path).combine_chunks()
        self.times = self.table.column(time_column).cast(pa.int64()).to_numpy()
        assert (np.diff(self.times) >= 0).all(), f"{path} is not in time order"
        if late is not None:
            # Pushed in the order in which they arrive; what happened is not changed.
            self.times = self.times + np.where(np.arange(len(self.times)) % late.one_in == 0, late.by_us, 0)
            order = np.argsort(self.times, kind="stable")
            self.table, self.times = self.table.take(pa.array(order)), self.times[order]
        self.next = 0
        self.pusher = client.pusher(source, wait_visible=True)

    def push_until(self, time_us: int) -> int:
        """Pushes what has happened up to and including this time; returns how many events were accepted."""
        end = int(np.searchsorted(self.times, time_us, side="right"))
        if end == self.next:
            return 0
        result = self.pusher.push(self.table.slice(self.next, end - self.next))
        if result.accepted != end - self.next:
            raise SystemExit(f"pushed {end - self.next} events and {result.accepted} were accepted: {result}")
        self.next = end
        return result.accepted


def replay(client: coeval.Client, rows: pa.Table, data: Path, late: Late | None = None) -> Replay:
    """Serves every row at its own time, having told the server what had happened by then and nothing else.

    With `late`, some departures are told later than they happened.
    """
    at = rows.column("event_timestamp").cast(pa.int64()).to_numpy()
    starts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
    ends = np.concatenate((starts[1:], [len(at)]))
    rows = rows.combine_chunks()
    answers: list[pa.Table] = []
    predicted: list[pa.Table] = []
    p_late: list[np.ndarray] = []
    outcomes: dict[str, int] = {}
    requests: list[tuple[str, int]] = []
    features_us, predict_us = [], []
    pushed, weather_through = 0, int(at[0]) // HOUR_US
    show = Progress(len(at))
    began = time.monotonic()
    departures = Events(client, "departures", data / "replay" / "departures.parquet", "departed_at", late)
    arrivals = Events(client, "arrivals", data / "replay" / "arrivals.parquet", "landed_at")
    # What files know by the beginning; from then on only the weather changes.
    client.materialize(through=int(at[0]))
    with departures.pusher, arrivals.pusher:
        for start, end in zip(starts, ends, strict=True):
            now = int(at[start])
            pushed += departures.push_until(now) + arrivals.push_until(now)
            # Weather appears on the hour: between two hours there is nothing new to make visible.
            if weather_through != now // HOUR_US:
                client.materialize("weather", through=now)
                weather_through = now // HOUR_US
            asked = rows.slice(start, end - start)
            times = [now] * (end - start)

            clock = time.perf_counter_ns()
            answer = client.features(training.SERVICE, asked, at=times, deadline_ms=DEADLINE_MS)
            features_us.append((time.perf_counter_ns() - clock) / 1000)

            clock = time.perf_counter_ns()
            prediction = client.predict(training.MODEL, asked, at=times, include_features=True, deadline_ms=DEADLINE_MS)
            predict_us.append((time.perf_counter_ns() - clock) / 1000)

            if answer.at.cast(pa.int64()).to_pylist() != times:
                raise SystemExit(f"asked at {now}, answered at {answer.at}")
            answers.append(answer.to_arrow(statuses=True))
            given = prediction.features
            if given is None:
                raise SystemExit("the prediction came without the features it was made of")
            predicted.append(given.to_arrow(statuses=True))
            p_late.append(prediction["p_late"])
            requests.extend((prediction.request_id, row) for row in range(end - start))
            for outcome in prediction.outcomes:
                key = outcome.status.name if not outcome.reason else f"{outcome.status.name} ({outcome.reason})"
                outcomes[key] = outcomes.get(key, 0) + 1
            show.at(end, now)
    show.done()
    return Replay(
        features=pa.concat_tables(answers),
        predict_features=pa.concat_tables(predicted),
        p_late=np.concatenate(p_late),
        outcomes=outcomes,
        requests=requests,
        features_us=np.array(features_us),
        predict_us=np.array(predict_us),
        pushed=pushed,
        seconds=time.monotonic() - began,
    )


def write_labels(online: Replay, rows: pa.Table, path: Path) -> None:
    """What became of the flights, by the requests that predicted it."""
    known = rows.column("late").is_valid()
    ids = pa.array([request for request, _ in online.requests])
    numbers = pa.array([row for _, row in online.requests], pa.uint32())
    table = pa.table({"request_id": ids, "row": numbers, "late": rows.column("late")})
    pq.write_table(table.filter(known), path)


def auc_online(online: Replay, rows: pa.Table) -> float:
    """How good the served predictions were."""
    known = np.asarray(rows.column("late").is_valid().combine_chunks())
    late = np.asarray(pc.fill_null(rows.column("late"), False).combine_chunks())
    return training.auc(online.p_late.astype(np.float32)[known], late[known])


def audit(served: pa.Table, offline: pa.Table, rows: pa.Table, what: str) -> Audit:
    """Compares every value and every status of `served` with the offline column of the same name."""
    result = Audit()
    for name in served.schema.names:
        if name.endswith("__status"):
            continue
        if name not in offline.schema.names:
            raise SystemExit(f"{what}: `{name}` was served and the offline engine does not know it")
        online_column, offline_column = served.column(name), offline.column(name)
        status = f"{name}__status"
        online_status = served.column(status).to_numpy()
        offline_status = offline.column(status).cast(pa.int8()).to_numpy()
        result.compared += len(online_column)
        result.nulls += online_column.null_count
        if online_column.type != offline_column.type:
            result.mismatched += len(online_column)
            result.examples.append(f"{what} {name}: {online_column.type} served, {offline_column.type} offline")
            continue
        different = differing(online_column, offline_column) | (online_status != offline_status)
        result.mismatched += int(different.sum())
        for row in np.flatnonzero(different)[: max(0, EXAMPLES_MAX - len(result.examples))]:
            key = {c: str(rows.column(c)[row]) for c in ("event_timestamp", "origin", "dest", "tailnum", "carrier", "flight")}
            result.examples.append(
                f"{what} {name}: served {online_column[row].as_py()!r} (status {online_status[row]}), "
                f"offline {offline_column[row].as_py()!r} (status {offline_status[row]}) for {key}"
            )
    return result


def differing(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    """True where two columns of one type differ: in being null, or in a bit of the value."""
    left_present, right_present = (np.asarray(column.is_valid().combine_chunks()) for column in (left, right))
    if pa.types.is_floating(left.type):
        integer = np.uint64 if left.type == pa.float64() else np.uint32
        # -0.0 and 0.0 are equal numbers, NaN no number at all: only the bits tell them apart.
        left_bits, right_bits = (
            pc.fill_null(column, 0.0).to_numpy().view(integer) for column in (left, right)
        )
        unequal = left_bits != right_bits
    else:
        unequal = ~np.asarray(pc.fill_null(pc.equal(left, right), True).combine_chunks())
    return (left_present != right_present) | (left_present & right_present & unequal)


class Progress:
    """One line on a terminal; nothing where there is none."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.began = time.monotonic()
        self.shown = 0.0
        self.enabled = sys.stderr.isatty()

    def at(self, done: int, now_us: int) -> None:
        clock = time.monotonic()
        if not self.enabled or clock - self.shown < 0.2:
            return
        self.shown = clock
        when = dt.datetime.fromtimestamp(now_us / 1e6, dt.timezone.utc).strftime("%d %b %H:%M")
        rate = done / max(clock - self.began, 1e-9)
        print(f"\r  {when} UTC  {done:,} of {self.total:,} flights, {rate:,.0f}/s ", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        if self.enabled:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)


def run(client: coeval.Client, data: Path, trained: training.Trained, began: float, report: Path) -> bool:
    """Replay, audit, table and report; True when everything held."""
    rows = training.spine(data, BEGIN, END)
    online = replay(client, rows, data)
    print(f"replayed {rows.num_rows:,} flights and {online.pushed:,} events at {len(online.predict_us):,} moments "
          f"in {online.seconds:.1f} s; rows answered: "
          + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(online.outcomes.items())))

    clock = time.monotonic()
    client.flush()
    offline = client.training_set(training.SERVICE, rows, statuses=True).to_arrow()
    print(f"offline values of the same {offline.num_rows:,} rows in {time.monotonic() - clock:.1f} s")
    if offline.num_rows != rows.num_rows or online.features.num_rows != rows.num_rows:
        raise SystemExit(f"{rows.num_rows} rows asked, {online.features.num_rows} served, {offline.num_rows} offline")

    audits = [
        audit(online.features, offline, rows, "GetFeatures"),
        audit(online.predict_features, offline, rows, "Predict"),
    ]
    compared = sum(a.compared for a in audits)
    mismatched = sum(a.mismatched for a in audits)
    absent = set(client.catalog().services[training.SERVICE].features.names) - set(online.features.schema.names)
    if absent:
        raise SystemExit(f"features of the service that were never served: {sorted(absent)}")

    labelled = np.asarray(rows.column("late").is_valid().combine_chunks())
    late = np.asarray(pc.fill_null(rows.column("late"), False).combine_chunks())[labelled]
    p_offline = training.predict(trained.module, offline, trained.dense)
    p_online = online.p_late.astype(np.float32)
    auc_offline = training.auc(p_offline[labelled], late)
    auc_online = training.auc(p_online[labelled], late)
    furthest = float(np.nanmax(np.abs(p_offline - p_online)))
    features_p50, features_p99 = np.percentile(online.features_us, [50, 99])
    predict_p50, predict_p99 = np.percentile(online.predict_us, [50, 99])

    numbers = {
        "training_rows": trained.rows,
        "replayed_flights": rows.num_rows,
        "compared_values": compared,
        "mismatched_values": mismatched,
        "auc_offline": round(auc_offline, 6),
        "auc_online": round(auc_online, 6),
        "get_features_p50_us": round(float(features_p50)),
        "get_features_p99_us": round(float(features_p99)),
        "predict_p50_us": round(float(predict_p50)),
        "predict_p99_us": round(float(predict_p99)),
        "seconds": round(time.monotonic() - began, 1),
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(numbers, indent=2) + "\n")

    verdict = "every one equal, bit for bit" if mismatched == 0 else "NOT EQUAL"
    nulls = sum(a.nulls for a in audits)
    print(f"""
  training rows            {trained.rows:>12,}
  replayed flights         {rows.num_rows:>12,}   in order, at their own time
  AUC offline              {auc_offline:>12.4f}   the model on the offline engine's values
  AUC online               {auc_online:>12.4f}   what was served; furthest from offline by {furthest:.1e}
  GetFeatures              {features_p50:>9,.0f} µs   p50, {features_p99:,.0f} µs p99, as the client sees it
  Predict                  {predict_p50:>9,.0f} µs   p50, {predict_p99:,.0f} µs p99, features included
  served values compared   {compared:>12,}   {nulls:,} of them null
  mismatched               {mismatched:>12,}   {verdict}
""")
    for example in [example for a in audits for example in a.examples][:EXAMPLES_MAX]:
        print(f"  {example}")

    failures = []
    if mismatched:
        failures.append(f"{mismatched:,} served values differ from the offline engine's")
    if not abs(auc_online - auc_offline) <= AUC_DIFFERENCE_MAX:
        failures.append(f"AUC online {auc_online:.4f} and offline {auc_offline:.4f} differ by more than {AUC_DIFFERENCE_MAX}")
    if compared < COMPARED_MIN:
        failures.append(f"only {compared:,} values were compared, of {COMPARED_MIN:,} at least")
    for failure in failures:
        print(f"FAILED: {failure}")
    return not failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="grpc://127.0.0.1:7400")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--report", type=Path, default=Path("target/demo/report.json"))
    arguments = parser.parse_args()
    began = time.monotonic()
    with coeval.connect(arguments.url) as client:
        trained = training.train(client, arguments.data)
        sys.exit(0 if run(client, arguments.data, trained, began, arguments.report) else 1)


if __name__ == "__main__":
    main()
