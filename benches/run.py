"""Runs our workloads and the peers in turn on the same files, and says what came of it.

    run.py pit|windows|flight|online|inference|rollout [--runs N] [--rows SPINE VIEW] [--only NAME...]

Started by scripts/bench.sh, which builds the program and installs the peers. Every measured run is a process of its own
on two cores; the contenders take turns, and medians are compared. Wrong or differing answers are an error; a missed
target is reported. The table goes to standard output, and all numbers to target/bench/<name>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from inference import inference
from online import online
from report import CORES, PEERS, ROOT, Place, Report, Row, Wrong, measured, say
from rollout import BLOCK_SECONDS, BLOCKS, rollout

KEYS = 100_000
# Small tables have fewer keys, but rows so seldom that some are older than 7 days when they are asked for.
ROWS_PER_KEY_MIN = 10
# What the engine calls its way through managed tables.
MERGE = "sorted storage"
# What sums of the same numbers in another order may differ by.
CHECKSUM_TOLERANCE = 1e-9


def in_turn(report: Report, workload: str, contenders: dict[str, list], runs: int) -> None:
    """Runs all contenders once, then again: a slow minute of the machine hits all of them."""
    found = report.runs.setdefault(workload, {})
    for turn in range(runs):
        for name, command in contenders.items():
            result = measured(command)
            found.setdefault(name, []).append(result)
            peak = f"{result['peak_bytes'] / 1e6:.0f} MB"
            say(f"   {workload} {turn + 1}/{runs} {name}: {result['seconds']:.2f} s, {peak}")


def median(report: Report, workload: str, name: str, what: str = "seconds") -> float:
    return statistics.median(run[what] for run in report.runs[workload][name])


def best(report: Report, workload: str, names: list[str], what: str = "seconds") -> tuple[str, float]:
    """The fastest, or the leanest."""
    return min(((name, median(report, workload, name, what)) for name in names), key=lambda pair: pair[1])


def agree(report: Report, workload: str, names: list[str], exactly: list[str], nearly: list[str]) -> None:
    """All runs of these contenders gave the same."""
    first = report.runs[workload][names[0]][0]
    for name in names:
        for run in report.runs[workload][name]:
            for what in exactly + nearly:
                found, expected = run[what], first[what]
                same = found == expected
                if what in nearly:
                    same = abs(found - expected) <= CHECKSUM_TOLERANCE * max(abs(expected), 1.0)
                if not same:
                    raise Wrong(f"{workload}: {what} of {name} is {found}, of {names[0]} {expected}")
    report.checks.append(f"{workload}: {', '.join(exactly + nearly)} agree between {', '.join(names)}")


def generate(place: Place, spine: int, view: int, views: int, variant: str = "plain") -> Path:
    keys = max(1, min(KEYS, view // ROWS_PER_KEY_MIN))
    folder = place.data / f"{spine}x{view}x{views}-{variant}"
    command = [place.python, PEERS / "generate.py", spine, view, keys, views, folder, "--variant", variant]
    subprocess.run([str(part) for part in command], check=True)
    return folder


def compare_cells(report: Report, place: Place, folder: Path, whats: dict[str, list[str]]) -> None:
    """Every cell against DuckDB's; `whats` holds the arguments of our program by check."""
    for what, arguments in whats.items():
        answer = place.data / f"{what}.parquet"
        measured([place.bench, "run", folder, *arguments, "--out", answer])
        checked = subprocess.run(
            [str(place.python), str(PEERS / "check.py"), what, str(folder), str(answer)], capture_output=True, text=True
        )
        answer.unlink()
        if checked.returncode != 0:
            raise Wrong(checked.stderr.strip())
        say(f"   {checked.stdout.strip()}")
        report.checks.append(checked.stdout.strip())


def pit(report: Report, place: Place, args: argparse.Namespace) -> None:
    spine, view = args.rows
    wanted = Workloads(report, args.only)

    def as_of(views: int, peers: list[str]):
        def run() -> None:
            name = f"as-of-{views}"
            folder = generate(place, spine, view, 5)
            ours = [place.bench, "run", folder, views]
            contenders = {
                "floor": [place.bench, "floor", folder, views],
                "ours": ours,
                "ours, answer kept": [*ours, "--keep"],
                **{peer: [place.python, PEERS / "asof.py", peer, folder, views] for peer in peers},
            }
            # Everybody reads from memory: the first reader is not measured.
            measured(contenders["floor"])
            in_turn(report, name, contenders, args.runs)
            agree(report, name, ["ours", "ours, answer kept", *peers], ["rows"], ["checksum"])
            against(report, name, peers, at_least=2.5 if views == 1 else 3)
            peak = median(report, name, "ours", "peak_bytes")
            if views == 1:
                leanest, least = best(report, name, peers, "peak_bytes")
                report.compare(f"{name}: peak memory", peak, "bytes", leanest, least, peak / least, "<= 0.5")
            else:
                against_floor(report, name, "ours", at_most=1.5)
                report.compare(f"{name}: peak memory", peak, "bytes", "1 GB", 1e9, peak / 1e9, "<= 1")

        return run

    def managed() -> None:
        folder = generate(place, spine, view, 5)
        store = place.data / f"{folder.name}-tables"
        made_by = store / "made-by"
        program = digest_of(place.bench)
        if not made_by.exists() or made_by.read_text() != program:
            shutil.rmtree(store, ignore_errors=True)
            imported = measured([place.bench, "import", folder, 5, "--store", store])
            say(f"   imported {imported['rows']} rows in {imported['seconds']:.1f} s")
            made_by.write_text(program)
        plain = [place.bench, "run", folder, 5]
        contenders = {
            "floor": [place.bench, "floor", folder, 5],
            "ours, plain files": plain,
            "ours": [*plain, "--store", store],
        }
        for file in store.rglob("*.parquet"):
            file.read_bytes()
        measured(contenders["floor"])
        in_turn(report, "managed", contenders, args.runs)
        agree(report, "managed", ["ours, plain files", "ours"], ["rows"], ["checksum"])
        if MERGE not in report.runs["managed"]["ours"][0]["explain"]:
            raise Wrong(f"the managed tables were not read as such: the engine does not say `{MERGE}`")
        against_floor(report, "managed", "ours", at_most=1.2)

    def late() -> None:
        folder = generate(place, spine, view, 5, "late")
        without = [place.bench, "run", folder, 5]
        measured([place.bench, "floor", folder, 5, "--created"])
        in_turn(report, "late", {"without created": without, "ours": [*without, "--created"]}, args.runs)
        agree(report, "late", ["without created", "ours"], ["rows"], [])
        seconds, other = median(report, "late", "ours"), median(report, "late", "without created")
        what = "as-of-5 with `created`, 10 % known late"
        report.compare(what, seconds, "s", "ours without", other, seconds / other, "<= 1.3")

    def hot() -> None:
        uniform, skewed = generate(place, spine, view, 5), generate(place, spine, view, 5, "hot")
        measured([place.bench, "floor", uniform, 5])
        measured([place.bench, "floor", skewed, 5])
        contenders = {"uniform": [place.bench, "run", uniform, 5], "ours": [place.bench, "run", skewed, 5]}
        in_turn(report, "hot", contenders, args.runs)
        agree(report, "hot", ["uniform", "ours"], ["rows"], [])
        seconds, other = median(report, "hot", "ours"), median(report, "hot", "uniform")
        what = "as-of-5 with 30 % of rows on one key"
        report.compare(what, seconds, "s", "ours, uniform", other, seconds / other, "<= 1.5")

    def large() -> None:
        folder = generate(place, 5 * spine, 5 * view, 1)
        ours = [place.bench, "run", folder, 1, "--digest", "--memory-mib"]
        contenders = {"unbounded": [*ours, 1 << 20], "ours": [*ours, 1024]}
        in_turn(report, "large", contenders, 1)
        agree(report, "large", ["unbounded", "ours"], ["rows", "digest"], ["checksum"])
        seconds, other = median(report, "large", "ours"), median(report, "large", "unbounded")
        # That it completes, with the same digest, is the target; by how much it is slower is information.
        what = "5x the rows, offline.memory 1 GiB"
        report.compare(what, seconds, "s", "ours, unbounded", other, seconds / other, ">= 0")
        peak, unbounded = (median(report, "large", name, "peak_bytes") for name in ("ours", "unbounded"))
        report.compare(f"{what}: peak memory", peak, "bytes", "1 GiB", 1 << 30, peak / (1 << 30), ">= 0")
        report.checks.append(f"large: without a bound, {unbounded / 1e6:.0f} MB at the peak")

    def cells() -> None:
        small = {"as-of": [1], "as-of-created": [1, "--created"]}
        compare_cells(report, place, generate(place, 20_000, 200_000, 1, "late"), small)

    wanted.run("cells", cells)
    wanted.run("as-of-1", as_of(1, ["duckdb", "polars", "pandas"]))
    # pandas takes a minute and the memory of a small machine here, and is the slowest at one view.
    wanted.run("as-of-5", as_of(5, ["duckdb", "polars"]))
    wanted.run("managed", managed)
    wanted.run("late", late)
    wanted.run("hot", hot)
    wanted.run("large", large)


def windows(report: Report, place: Place, args: argparse.Namespace) -> None:
    wanted = Workloads(report, args.only)
    peers = ["duckdb-join", "duckdb-window", "polars"]

    def run() -> None:
        folder = generate(place, *args.rows, 5)
        contenders = {
            "floor": [place.bench, "floor", folder, "windows"],
            "ours, exact tails": [place.bench, "run", folder, "windows"],
            "ours, default hops": [place.bench, "run", folder, "windows-hops"],
            **{peer: [place.python, PEERS / "windows.py", peer, folder] for peer in peers},
        }
        measured(contenders["floor"])
        in_turn(report, "windows", contenders, args.runs)
        agree(report, "windows", ["ours, exact tails", *peers], ["rows", "count"], ["checksum", "largest"])
        for ours in ("ours, exact tails", "ours, default hops"):
            against(report, "windows", peers, at_least=6, ours=ours)

    def cells() -> None:
        small = {"windows": ["windows"], "windows-hops": ["windows-hops"]}
        compare_cells(report, place, generate(place, 20_000, 200_000, 1, "late"), small)

    wanted.run("cells", cells)
    wanted.run("windows", run)


def flight(report: Report, place: Place, args: argparse.Namespace) -> None:
    views = 4
    spine, view = args.rows
    tables = generate(place, spine, view, 5)
    rows = generate(place, 5 * spine, 5 * view, 1) / "spine.parquet"
    dataset = "stored"
    # What the program writes may change with it.
    program = digest_of(place.bench)
    store = place.data / f"flight-{5 * spine}"
    made_by = store / "made-by"
    serve: list[str | Path] = [place.bench, "serve", tables, str(views), "--store", store]
    client: list[str | Path] = [place.python, PEERS / "flight_client.py"]

    def run() -> None:
        if not made_by.exists() or made_by.read_text() != program:
            shutil.rmtree(store, ignore_errors=True)
            store.mkdir(parents=True)
            say(f"   making a dataset of {5 * spine} rows x {5 * views} features")
            with Server(serve) as server:
                measured_client([*client, "create", server.address, dataset, rows])
            made_by.write_text(program)
        files = sorted(store.rglob("*.parquet"), key=by_number)
        if not files:
            raise Wrong(f"no Parquet file in {store}")
        server_of = [place.python, PEERS / "flight_server.py"]
        peers = {f"pyarrow, {how}": [*server_of, how, *files] for how in ("batches", "scanner")}
        servers = {"ours": serve, **peers}
        found = report.runs.setdefault("flight", {})
        for file in files:
            file.read_bytes()
        for turn in range(args.runs):
            for name, command in servers.items():
                with Server(command) as server:
                    result = measured_client([*client, "read", server.address, dataset])
                    server.stop()
                result |= server.memory(result["began"], result["seconds"])
                found.setdefault(name, []).append(result)
                say(
                    f"   flight {turn + 1}/{args.runs} {name}: {result['seconds']:.2f} s, first batch after "
                    f"{result['first_batch_seconds']:.3f} s, server {result['server_peak_bytes'] / 1e6:.0f} MB"
                )
        agree(report, "flight", list(servers), ["rows", "columns"], ["checksum"])
        seconds, (fastest, other) = median(report, "flight", "ours"), best(report, "flight", list(peers))
        report.compare("flight: throughput", seconds, "s", fastest, other, other / seconds, ">= 0.8")
        first = statistics.median(run["first_batch_seconds"] / run["seconds"] for run in found["ours"])
        value = median(report, "flight", "ours", "first_batch_seconds")
        report.compare("flight: first batch", value, "s", "our total", seconds, first, "<= 0.05")
        early, late = (median(report, "flight", "ours", f"server_{half}_bytes") for half in ("early", "late"))
        report.compare("flight: server memory, second half", late, "bytes", "first half", early, late / early, "<= 1.1")

    Workloads(report, args.only).run("flight", run)


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def by_number(path: Path) -> list:
    """`part-10` after `part-9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def measured_client(command: list[str | Path]) -> dict:
    result = measured(command)
    return {"client_peak_bytes": result.pop("peak_bytes"), **result}


class Server:
    """A server of its own process, whose memory is watched while it serves."""

    def __init__(self, command: list[str | Path]) -> None:
        self.command = [str(part) for part in command]
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise Wrong(f"`{' '.join(self.command)}` did not start")
        self.watching = True
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while self.watching:
            try:
                status = Path(f"/proc/{self.process.pid}/status").read_text()
            except FileNotFoundError:
                return
            # Without the pages of files that are merely mapped.
            anonymous = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
            if anonymous:
                self.samples.append((time.monotonic(), int(anonymous[1]) * 1024))
            time.sleep(0.01)

    def stop(self) -> None:
        self.watching = False
        self.watch.join()

    def memory(self, began: float, seconds: float) -> dict:
        """The most that was held in each half of a transfer."""
        during = [(at - began, size) for at, size in self.samples if began <= at <= began + seconds]
        if len(during) < 4:
            raise Wrong(f"{seconds:.3f} s is too short to watch the server's memory; ask for more rows")
        early = max(size for at, size in during if at <= seconds / 2)
        late = max(size for at, size in during if at >= seconds / 2)
        return {"server_peak_bytes": max(early, late), "server_early_bytes": early, "server_late_bytes": late}

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Workloads:
    """Those that were asked for; what goes wrong in one is kept, and the others still run."""

    def __init__(self, report: Report, only: list[str]) -> None:
        self.report = report
        self.only = only

    def run(self, name: str, workload) -> None:
        if self.only and name not in self.only:
            return
        say(f">> {name}")
        try:
            workload()
        except Wrong as wrong:
            say(f"error: {wrong}")
            self.report.wrong.append(f"{name}: {wrong}")


def against(report: Report, workload: str, peers: list[str], at_least: float, ours: str = "ours") -> None:
    seconds = median(report, workload, ours)
    fastest, other = best(report, workload, peers)
    what = f"{workload}: time" if ours == "ours" else f"{workload}: time, {ours.removeprefix('ours, ')}"
    report.compare(what, seconds, "s", fastest, other, other / seconds, f">= {at_least}")


def against_floor(report: Report, workload: str, ours: str, at_most: float) -> None:
    seconds, floor = median(report, workload, ours), median(report, workload, "floor")
    report.compare(f"{workload}: time over the floor", seconds, "s", "floor", floor, seconds / floor, f"<= {at_most}")


def machine() -> dict:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load_at_start": os.getloadavg()[0],
    }


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = " (changed)" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "HEAD") or "unknown") + changed


def shown(value: float, unit: str) -> str:
    return f"{value / 1e6:.0f} MB" if unit == "bytes" else f"{value:.2f} {unit}"


def print_table(rows: list[Row]) -> None:
    lines = [["", "ours", "against", "", "ratio", "target", "met"]]
    for row in rows:
        met = "" if row.target == ">= 0" else "yes" if row.met else "NO"
        target = "" if row.target == ">= 0" else row.target
        ours, other = shown(row.value, row.unit), shown(row.peer_value, row.unit)
        lines.append([row.metric, ours, row.peer, other, f"{row.ratio:.2f}", target, met])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = {"pit": pit, "windows": windows, "flight": flight, "online": online, "inference": inference, "rollout": rollout}
    parser.add_argument("name", choices=benchmarks)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs=2, default=(1_000_000, 10_000_000), metavar=("SPINE", "VIEW"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the workloads")
    parser.add_argument("--bench", type=Path, required=True, help="our program")
    parser.add_argument("--server", type=Path, help="our server, for `online`, `inference` and `rollout`")
    parser.add_argument("--feast", type=Path, help="the Python that has Feast, for `online`")
    parser.add_argument("--torch", type=Path, help="the Python that has torch, for `inference` and `rollout`")
    parser.add_argument("--seconds", type=float, help="of each measurement of `online` (5) and of each block of `inference` (10)")
    parser.add_argument("--overload-seconds", type=float, default=60.0, help="of twice the capacity")
    parser.add_argument("--soak-seconds", type=float, default=60.0, help="of predictions with the memory watched")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of `rollout`, with and without it")
    parser.add_argument("--block-seconds", type=float, default=BLOCK_SECONDS, help="of `rollout`")
    parser.add_argument("--cycles", type=int, default=200, help="loads and unloads of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the generated files")
    args = parser.parse_args()
    if args.seconds is None:
        args.seconds = 10.0 if args.name == "inference" else 5.0
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    place = Place(args.bench, Path(sys.executable), args.data, args.server, args.feast, args.torch)
    said = {"machine": machine(), "commit": commit(), "at": datetime.datetime.now(datetime.UTC).isoformat()}
    report = Report()
    benchmarks[args.name](report, place, args)
    # What covers only a part does not pass for the whole.
    out = ROOT / "target" / "bench" / ("-".join([args.name, *args.only]) + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**said, **asdict(report)}, indent=1) + "\n")
    print_table(report.rows)
    for check in report.checks:
        print(f"checked: {check}")
    for wrong in report.wrong:
        print(f"WRONG: {wrong}")
    say(f"all runs: {out}")
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
