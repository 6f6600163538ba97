#!/usr/bin/env python3
"""A new model reaches users step by step, a bad one does not, and what was done is undone in a second: on real flights.

July is replayed at its own time, so a day of a rollout takes seconds.

  * the champion learnt from January to March. A second version learnt from January to May as well: both are held against June,
    which neither has seen, and then the second goes through shadow and canary to champion by the criteria of
    `features/flight.yaml`. July is hotter than spring, which is drift: somebody has to take it upon themselves, on record;
  * a third version learnt from a weather archive that had been moved to Celsius. Online the temperatures still come in Fahrenheit.
    Nothing is wrong with how it answers; but what is served is not what replay gives, and in shadow that stops it, with the
    feature and the first bad minute;
  * a rollback: the first version answers again, at once.

`make demo-rollout` runs it with the binary it built.

    python demo_rollout.py --server target/release/coeval [--out target/demo]
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from demo import Failed, Steps

HERE = Path(__file__).resolve().parent
STEPS = 8
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
BEGIN, END = dt.date(2013, 7, 1), dt.date(2013, 7, 29)
# The champion alone, so that there is traffic to plan by.
ALONE_US = DAY_US
# When a flight has landed for sure: an hour to its departure, and the longest ones take eleven.
OUTCOME_KNOWN_US = 18 * HOUR_US
LABELS_EVERY_US = 6 * HOUR_US
# Somebody looks, and asks for the rollout to go on if it may: replayed days are too short to wait for the gateways' own looks.
LOOK_EVERY_US = 12 * HOUR_US
FIRST_LEARNT_UNTIL = dt.date(2013, 4, 1)
HELD_OUT = "june"
# The archive is moved to Celsius: these months as a whole, and July's rows so long after the third version has begun.
CELSIUS_MONTHS = (5, 6)
CELSIUS_AFTER_US = 8 * HOUR_US
FAULTY = {"weather_now:temp", "weather_now:wind_chill"}
UNDONE_SECONDS = 1.0
CALLERS = 3


def when(time_us: int) -> str:
    return dt.datetime.fromtimestamp(time_us / 1e6, dt.timezone.utc).strftime("%d %b %H:%M")


@dataclass
class Tool:
    """The `coeval` command, asked for JSON."""

    program: Path
    project: Path
    server: str
    environment: dict[str, str]

    def ask(self, *arguments: str, show: bool = True) -> dict[str, Any]:
        command = [str(self.program), "-C", str(self.project), *arguments, "--server", self.server, "--json"]
        if show:
            print(f"$ coeval {' '.join(arguments)}", flush=True)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not done.stdout.strip():
            raise Failed(f"`coeval {' '.join(arguments)}` ended with status {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def tell(self, *arguments: str) -> None:
        """In front of the user."""
        demo.run([str(self.program), "-C", str(self.project), *arguments, "--server", self.server], self.environment)

    def advance(self) -> str:
        """Has the rollout judged, so that it goes on if it may; why it does not."""
        command = ["rollout", "advance", "delay", "--why", "twice a day"]
        whole = [str(self.program), "-C", str(self.project), *command, "--server", self.server]
        done = subprocess.run(whole, env=self.environment, capture_output=True, text=True, check=False)
        # It may have ended by itself a moment before; what it did is told by its story.
        said = done.stderr.strip().removeprefix("error: ").split(" (the server at ")[0]
        return "" if done.returncode == 0 else said.split("; ")[0]

    def rollout(self) -> dict[str, Any]:
        return self.ask("rollout", "show", "delay", show=False)


class Archive:
    """The weather files of the project, which somebody moves to Celsius behind our back."""

    def __init__(self, project: Path) -> None:
        self.folder = project / "data" / "weather"
        self.july = self.folder / "2013-07.parquet"
        self.true = pq.read_table(self.july)
        self.observed = self.true.column("observed_at").cast(pa.int64())
        # Rows observed from then on are rewritten.
        self.since: int | None = None

    @staticmethod
    def in_celsius(table: pa.Table, rows: pa.ChunkedArray | None = None) -> pa.Table:
        temp = table.column("temp")
        celsius = pc.multiply(pc.subtract(temp, 32.0), 5.0 / 9.0)
        changed = celsius if rows is None else pc.if_else(rows, celsius, temp)
        return table.set_column(table.schema.get_field_index("temp"), "temp", changed)

    def move_months(self) -> None:
        for month in CELSIUS_MONTHS:
            path = self.folder / f"2013-{month:02}.parquet"
            self.write(self.in_celsius(pq.read_table(path)), path)

    def publish(self, until: int) -> None:
        """What was observed before `until` is rewritten, what is newer is still as it was measured."""
        if self.since is None:
            return
        rows = pc.and_(pc.greater_equal(self.observed, self.since), pc.less(self.observed, until))
        self.write(self.in_celsius(self.true, rows), self.july)

    @staticmethod
    def write(table: pa.Table, path: Path) -> None:
        beside = path.with_suffix(".part")
        pq.write_table(table, beside)
        beside.replace(path)


@dataclass
class July:
    """The month as it happens: events, weather, requests, and what became of the flights."""

    client: Any
    tool: Tool
    archive: Archive
    rows: pa.Table
    departures: Any
    arrivals: Any
    at: np.ndarray = field(init=False)
    next: int = 0
    weather_through: int = 0
    labelled: int = 0
    labels_at: int = 0
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    versions: Counter[int] = field(default_factory=Counter)
    failed: int = 0

    def __post_init__(self) -> None:
        self.at = self.rows.column("event_timestamp").cast(pa.int64()).to_numpy()
        self.late = self.rows.column("late").combine_chunks()
        self.weather_through = int(self.at[0]) // HOUR_US
        self.labels_at = int(self.at[0]) + OUTCOME_KNOWN_US
        self.client.materialize(through=int(self.at[0]))

    @property
    def now(self) -> int:
        return int(self.at[min(self.next, len(self.at) - 1)])

    def run(self, ends: Callable[[], bool]) -> None:
        """Goes on until `ends` says so, which is asked twice a day, or July is over."""
        looked = self.now
        while self.next < len(self.at):
            self.moment()
            if self.now - looked >= LOOK_EVERY_US:
                if ends():
                    return
                looked = self.now

    def moment(self) -> None:
        """Everything that happens at the next time at which somebody asks."""
        import train

        start, now = self.next, self.now
        end = int(np.searchsorted(self.at, now, side="right"))
        self.departures.push_until(now)
        self.arrivals.push_until(now)
        if self.weather_through != now // HOUR_US:
            self.weather_through = now // HOUR_US
            self.archive.publish((self.weather_through - 1) * HOUR_US)
            self.client.materialize("weather", through=now)
            # And as soon as it was read, it is rewritten.
            self.archive.publish(self.weather_through * HOUR_US)
        asked = self.rows.slice(start, end - start)
        answer = self.client.predict(train.MODEL, asked, at=[now] * (end - start), deadline_ms=10_000)
        self.requests.extend((answer.request_id, row, now) for row in range(end - start))
        for outcome in answer.outcomes:
            self.versions[outcome.version] += 1
            self.failed += outcome.status.name != "OK"
        self.next = end
        if now >= self.labels_at:
            self.tell_outcomes(now)

    def tell_outcomes(self, now: int) -> None:
        """What is known by now of flights that were asked about, and was not told yet."""
        import train

        self.labels_at = now + LABELS_EVERY_US
        end = self.labelled
        while end < len(self.requests) and self.requests[end][2] + OUTCOME_KNOWN_US <= now:
            end += 1
        known = range(self.labelled, end)
        table = pa.table({
            "request_id": pa.array([self.requests[i][0] for i in known], pa.string()),
            "row": pa.array([self.requests[i][1] for i in known], pa.int64()),
            "late": self.late.slice(self.labelled, end - self.labelled),
        })
        self.labelled = end
        table = table.filter(pc.is_valid(table.column("late")))
        if table.num_rows:
            self.client.add_labels(train.MODEL, table)


@dataclass
class Follow:
    """Tells a rollout as it goes on, and takes drift upon itself where that is what it waits for."""

    tool: Tool
    july: July
    version: int
    acknowledge: bool
    told: set[int] = field(default_factory=set)
    transitions: list[dict[str, Any]] = field(default_factory=list)
    acknowledged: bool = False

    def look(self) -> bool:
        """Whether the rollout is over."""
        why = self.tool.advance()
        story = self.tool.rollout()
        self.tell(story)
        if story.get("running") and why:
            print(f"   {when(self.july.now)}  {why}", flush=True)
        running = story.get("running")
        if not running or running["version"] != self.version:
            return True
        criteria = {one["name"]: one for one in ((running.get("judged") or {}).get("judgement") or {}).get("criteria") or []}
        met = {name for name, one in criteria.items() if one["verdict"] == "met"}
        # Somebody looks once there is something to see, and only drift is in the way.
        if self.acknowledge and not self.acknowledged and {"min_rows", "skew"} <= met and "drift" not in met:
            self.acknowledged = True
            print(f"   {when(self.july.now)}  {criteria['drift']['text']}")
            why = "summer is hotter than what they learnt from, for both versions"
            self.tool.ask("rollout", "acknowledge", "delay", "*", "--why", why)
        return False

    def tell(self, story: dict[str, Any]) -> None:
        for entry in story["history"]:
            if entry["entry"] in self.told or entry.get("version") not in (self.version, None):
                continue
            self.told.add(entry["entry"])
            if not entry["kind"].startswith(("rollout_", "model_promote")):
                continue
            numbers = entry.get("numbers") or {}
            at = numbers.get("now_us") or self.july.now
            to = entry.get("to") or entry.get("ending") or ""
            self.transitions.append({
                "entry": entry["entry"], "kind": entry["kind"], "version": self.version, "to": to, "at": when(at),
                "who": entry["who"], "reasons": entry.get("reasons") or [],
            })
            print(f"   {when(at)}  entry {entry['entry']}: {entry['kind']} {json.dumps(to) if to else ''} by {entry['who']}")
            for reason in (entry.get("reasons") or [])[:4]:
                print(f"                 {reason}")


def rolled_back(july: July, tool: Tool, client: Any, new: int, old: int) -> tuple[float, int, int]:
    """How long a rollback took in ms, and how many requests met the new version that came later than a second after it was
    said; of how many."""
    import train

    now, asked = july.now, july.rows.slice(july.next - 1, 1)
    answers: list[list[tuple[float, int]]] = [[] for _ in range(CALLERS)]
    ends = threading.Event()

    def go_on(mine: list[tuple[float, int]]) -> None:
        while not ends.is_set():
            sent = time.monotonic()
            answer = client.predict(train.MODEL, asked, at=[now], deadline_ms=10_000)
            mine.append((sent, answer.outcomes[0].version))

    callers = [threading.Thread(target=go_on, args=(mine,), daemon=True) for mine in answers]
    for caller in callers:
        caller.start()
    try:
        time.sleep(0.5)
        said = time.monotonic()
        done = tool.ask("rollout", "rollback", "delay", "--why", "the demonstration is over")
        took = time.monotonic() - said
        time.sleep(2.0)
    finally:
        ends.set()
        for caller in callers:
            caller.join(timeout=30)
    if done["champion"] != old:
        raise Failed(f"the rollback went to version {done['champion']}, not to {old}")
    flat = [answer for mine in answers for answer in mine]
    if not any(version == new for sent, version in flat if sent < said):
        raise Failed("nobody met the new version before the rollback")
    after = [(sent, version) for sent, version in flat if sent > said + UNDONE_SECONDS]
    wrong = sum(version != old for _, version in after)
    return took * 1000, wrong, len(after)


def demonstrate(server: Path, out: Path) -> bool:
    """All steps; True when everything held."""
    steps = Steps(STEPS)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "rollout.json"
    report_file.unlink(missing_ok=True)
    project = out / "project"
    numbers: dict[str, Any] = {}
    failures: list[str] = []
    with contextlib.ExitStack() as running:
        with steps.step("The data, and a fresh project that logs every served row"):
            demo.prepare()
            demo.copy_project(project)
            environment = {
                **os.environ,
                "COEVAL_GRPC": "127.0.0.1:0",
                "COEVAL_HTTP": "127.0.0.1:0",
                "COEVAL_REQUEST_TIME": "allowed",
                "COEVAL_LOG_SAMPLE": "100%",
                "COEVAL_LOG_FLUSH": "1s",
            }
            for command in ("validate", "apply"):
                demo.run([str(server), "-C", str(project), command], environment)
        import coeval
        import replay
        import train

        with steps.step("Two versions: January to March, and January to May; June is held out"):
            url = running.enter_context(demo.served(server, project, environment, out))
            client = running.enter_context(coeval.connect(url))
            client.refresh(timeout=demo.READY_SECONDS_MAX)
            dataset, table = train.training_set(client, HERE / "data")
            june = train.spine(HERE / "data", train.TRAIN_UNTIL, train.DATASET_UNTIL)
            client.training_set(train.SERVICE, june, name=HELD_OUT, seed=train.SEED).to_arrow()
            first = train.register(client, dataset, table, FIRST_LEARNT_UNTIL)
            train.deploy(client, first.version, why="the first version")
            second = train.register(client, dataset, table)
            train.deploy(client, second.version, why="two more months")
        tool = Tool(server, project, url.removeprefix("grpc://"), environment)
        archive = Archive(project)
        rows = train.spine(HERE / "data", BEGIN, END).combine_chunks()
        departures = replay.Events(client, "departures", HERE / "data" / "replay" / "departures.parquet", "departed_at")
        arrivals = replay.Events(client, "arrivals", HERE / "data" / "replay" / "arrivals.parquet", "landed_at")
        running.enter_context(departures.pusher)
        running.enter_context(arrivals.pusher)
        july = July(client, tool, archive, rows, departures, arrivals)
        with steps.step("1 July: the champion alone, and what the criteria will need at this traffic"):
            alone_until = july.now + ALONE_US
            while july.now < alone_until:
                july.moment()
            tool.tell("rollout", "plan", "delay", str(second.version))
        with steps.step(f"Version {second.version} against June, in shadow, in canary: by its criteria"):
            why = "two more months to learn from"
            tool.ask("rollout", "shadow", "delay", str(second.version), "--dataset", HELD_OUT, "--why", why)
            follow = Follow(tool, july, second.version, acknowledge=True)
            july.run(follow.look)
            follow.look()
            numbers["transitions"] = follow.transitions
            champion = tool.rollout()["champion"]["version"]
            print(f"   {when(july.now)}: the champion is version {champion}; rows by version: "
                  + ", ".join(f"{version}: {count:,}" for version, count in sorted(july.versions.items())))
            if champion != second.version:
                failures.append(f"version {second.version} did not become the champion within July")
        with steps.step("A third version, which learnt from an archive in Celsius"):
            archive.move_months()
            third = train.register(client, *train.training_set(client, HERE / "data", name="january-to-june-again"))
            train.deploy(client, third.version, why="the archive was tidied up")
            archive.since = -(-(july.now + CELSIUS_AFTER_US) // HOUR_US) * HOUR_US
            print(f"   what is observed from {when(archive.since)} on is rewritten once it was read")
            tool.ask("rollout", "shadow", "delay", str(third.version), "--dataset", HELD_OUT, "--why", "a tidier archive")
            follow = Follow(tool, july, third.version, acknowledge=False)
            july.run(follow.look)
            follow.look()
            numbers["transitions"] += follow.transitions
            judge_third(tool, july, archive, third.version, numbers, failures)
        with steps.step("A rollback"):
            took, wrong, asked = rolled_back(july, tool, client, second.version, first.version)
            numbers["rollback_ms"], numbers["wrong_version_after_1s"] = round(took, 1), wrong
            print(f"   {took:.0f} ms; of {asked:,} requests that came later than a second after, {wrong} met the new version")
            if wrong or not asked:
                failures.append(f"{wrong} of {asked} requests met the version that was rolled back")
            tool.tell("rollout", "show", "delay")
        with steps.step("Stopping"):
            running.close()
    with steps.step("What came of it"):
        if july.failed:
            failures.append(f"{july.failed} rows were not answered by a model")
        numbers["seconds"] = round(time.monotonic() - began, 1)
        report_file.write_text(json.dumps(numbers, indent=2) + "\n")
        for failure in failures:
            print(f"FAILED: {failure}")
        print(f"\n{'FAILED' if failures else 'OK'} after {numbers['seconds']:.0f} s; {report_file}")
    return not failures


def judge_third(
    tool: Tool, july: July, archive: Archive, version: int, numbers: dict[str, Any], failures: list[str]
) -> None:
    """Whether the third version was stopped in shadow for what is wrong with it."""
    story = tool.rollout()
    ended = [one for one in story["ended"] if one["version"] == version]
    if not ended:
        failures.append(f"version {version} was not stopped")
        numbers["stopped"], numbers["reason"] = False, None
        return
    last = ended[-1]
    numbers["stopped"] = last["ending"] == "stopped" and last["stage"] == "shadow"
    numbers["reason"] = "; ".join(last["reasons"])
    # A row observed on the hour is known ten minutes later, and visible with the next hour.
    since = (archive.since or 0) + HOUR_US
    bad = int(july.at[np.searchsorted(july.at, since)])
    minute = dt.datetime.fromtimestamp(bad / 1e6, dt.timezone.utc).strftime("%Y-%m-%dT%H:%M")
    print(f"   the first row that was served with what is no longer in the archive: {minute}")
    if not numbers["stopped"]:
        failures.append(f"version {version} ended as {last['ending']} in {last['stage']}, not stopped in shadow")
    if not any(feature in numbers["reason"] for feature in FAULTY) or minute not in numbers["reason"]:
        failures.append(f"the reason does not name the feature and the minute {minute}: {numbers['reason']}")
    if story["champion"]["version"] == version:
        failures.append("the version with the fault has the traffic")


def main() -> None:
    arguments_parser = demo.arguments_of(__doc__)
    arguments = arguments_parser.parse_args()
    server = demo.program(arguments_parser, arguments.server)
    demo.conduct(lambda: demonstrate(server, arguments.out.resolve()))


if __name__ == "__main__":
    main()
