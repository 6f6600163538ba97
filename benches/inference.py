"""Inference: policies in turn, what serving adds to a forward, and what holds under too much of everything.

The policies, saturation, overload and load/unload run in one process (`bench models`, see benches/src/models.rs); what
includes gRPC runs against a `coeval serve` of its own. Everything shares the same two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from online import KEYS, Ours, Process, Redis, Watch, definitions_of_wide, generate, load
from report import PEERS, Place, Report, Wrong, measured, say

# What the issue of the research calls usual; not to be changed because a number misses it.
OVERHEAD_US = 130
FEATURES_US = 150
POLICY_US = 5
REFUSAL_MS = 5
DEADLINE_MS = 100
# Of what the model answers one by one: the load that a second model is deployed under.
DEPLOY_SHARE = 0.3
# Of Predict with and without the serving log: blocks, and how long each is.
LOGGING_BLOCKS, LOGGING_SECONDS = 40, 1.5
# A block of a workload that needs rare events to be frequent lasts so many times as long.
LONG = 3


def models(place: Place, folder: Path) -> dict:
    """Writes the models; what is said of them is of this machine, now."""
    if place.torch is None:
        raise SystemExit("say which Python has torch: --torch PYTHON")
    said = measured([place.torch, PEERS / "models.py", folder])
    one = said["slow_1_rows_ms"]
    if not 5 <= one <= 15:
        raise Wrong(f"slow.pt takes {one:.1f} ms for one row, and not 5 to 15")
    return said


def definitions(data: Path) -> str:
    lines = [definitions_of_wide(data, 1), "requests:", "  - {name: call, fields: [{name: x, type: float64}]}"]
    lines += ["feature_services:", "  - {name: wide, features: [wide0]}", '  - {name: called, features: ["call:x"]}']
    lines.append("models:")
    for name, service in {"noop": "called", "small": "wide", "slow": "wide", "other": "wide"}.items():
        lines += [
            f"  - name: {name}",
            f"    features: {service}",
            "    runtime: torchscript",
            '    inputs: [{name: x, dtype: float32, features: ["*"], missing: 0.0}]',
            "    outputs: [{name: y, dtype: float32}]",
            "    slo: {deadline: 5s}",
            "    batching: {max_rows: 32, max_queue_rows: 4096}",
        ]
    return "\n".join(lines) + "\n"


def median_at_most(values: list[float], confidence: float = 0.95) -> float:
    """With that confidence the median is no larger: an order statistic, by the binomial distribution."""
    n = len(values)
    below = 0.0
    for at, value in enumerate(sorted(values)):
        # The chance that at most `at` of them lie below the median.
        below += math.comb(n, at) / 2**n
        if below >= confidence:
            return value
    return math.inf


class Gateway(Ours):
    """Ours with models."""

    def __init__(
        self, place: Place, folder: Path, data: Path, online: str, files: Path, more: str = "", project: str = "bench"
    ) -> None:
        super().__init__(place, folder, data, online, definitions(data), more, project)
        self.files = files

    def register(self, model: str, file: str) -> None:
        self.run("model", "register", model, str(self.files / file))

    def deploy(self, model: str, version: int = 1) -> None:
        self.run("model", "deploy", model, str(version), "--why", "bench")

    def retire(self, model: str, version: int) -> None:
        self.run("model", "retire", model, str(version), "--why", "bench")

    def forget_files(self) -> None:
        """The next deploy of any model fetches and measures it as if it came to this machine for the first time."""
        for cached in self.folder.glob(".coeval/local/*/models"):
            shutil.rmtree(cached, ignore_errors=True)


def inference(report: Report, place: Place, args: argparse.Namespace) -> None:
    work = place.data / "inference-work"
    files = work / "models"
    only = set(args.only)
    blocks = ["--blocks", args.runs, "--seconds", args.seconds]
    model = ["--model", files / "slow.pt"]

    def wanted(*names: str) -> bool:
        return not only or any(name in only for name in names)

    def guarded(name: str, measure) -> None:
        if not wanted(name):
            return
        say(f">> {name}")
        try:
            measure()
        except Wrong as wrong:
            say(f"error: {wrong}")
            report.wrong.append(f"{name}: {wrong}")

    def models_of(name: str, *words: object) -> dict:
        found = measured([place.bench, "models", name, *words])
        if name != "paired":
            report.runs[name] = {"ours": [found]}
        return found

    def simulated() -> None:
        judge_policies(report, "simulated", models_of("simulated", "--seconds", args.seconds * 10)["found"])

    def policies() -> None:
        found = models_of("policies", *model, *blocks)
        rates = found["rates"]
        report.checks.append(
            f"real model: one row {found['one_row_ms'][0]:.2f} ms, 32 rows {found['full_batch_ms'][0]:.2f} ms before; "
            f"{found['one_row_ms'][1]:.2f} and {found['full_batch_ms'][1]:.2f} ms after. Rates of the simulated executor "
            f"times {rates['scale']:.2f}; full batches {rates['capacity']:.0f} rows/s"
        )
        behind = statistics.median(run["behind"]["p99"] for run in found["found"])
        report.checks.append(f"real model: requests were sent {behind:.2f} ms late (median of p99)")
        judge_policies(report, "real", found["found"])

    def steady() -> None:
        found = models_of("steady", *model, *blocks)["found"]
        for of, share in dict.fromkeys((run["of"], run["share"]) for run in found):
            runs = [run for run in found if (run["of"], run["share"]) == (of, share)]
            p50, p99 = (statistics.median(run["millis"][what] for run in runs) for what in ("p50", "p99"))
            metric = f"steady: p99 at {share * 100:.0f} % of {of}"
            report.compare(metric, p99, "ms", "its p50", p50, p99 / p50, "<= 2.2")
        raw50, raw99 = (statistics.median(run["raw"][what] for run in found) for what in ("p50", "p99"))
        report.checks.append(f"steady: raw forwards of one row have p50 {raw50:.2f} ms and p99 {raw99:.2f} ms")

    def saturated() -> None:
        found = models_of("saturated", *model, *blocks)["blocks"]
        ratio = statistics.median(run["per_second"] / run["raw_per_second"] for run in found)
        ours, raw = (statistics.median(run[what] for run in found) for what in ("per_second", "raw_per_second"))
        rows = statistics.median(run["rows_per_batch"] for run in found)
        metric = f"saturation: {rows:.1f} rows a batch"
        report.compare(metric, ours, "rows/s", "raw forward of 32", raw, ratio, ">= 0.9")

    def policy_cost() -> None:
        for found in models_of("policy-cost")["found"]:
            micros = statistics.median(found["micros"])
            what = "a lone request" if found["rows"] == 1 else f"one of {found['rows']}"
            report.compare(f"policy: {what}", micros, "us", "bound", POLICY_US, micros / POLICY_US, "<= 1")

    def overload() -> None:
        words = ["--seconds", args.overload_seconds, "--deadline-ms", DEADLINE_MS]
        found = models_of("overload", *model, *words)
        name, capacity = "overload, twice the capacity", statistics.mean(found["capacity"])
        goodput = found["goodput"]
        report.compare(f"{name}: goodput", goodput, "rows/s", "capacity", capacity, goodput / capacity, ">= 0.9")
        report.compare(f"{name}: admitted in time", found["in_time"], "", "all", 1, found["in_time"], ">= 0.99")
        refusal = found["refusal_ms"]["p99"]
        report.compare(f"{name}: refusals p99", refusal, "ms", "bound", REFUSAL_MS, refusal / REFUSAL_MS, "<= 1")
        early, late = found["resident"]
        report.compare(f"{name}: memory, second half", late, "bytes", "first half", early, late / early, "<= 1.1")
        before, after = found["capacity"]
        report.checks.append(
            f"overload: capacity {before:.0f} rows/s before and {after:.0f} after; answered by tier {found['answered']}, "
            f"refused {found['refused']}, late {found['late']} ({found['dropped']} of them dropped), failed "
            f"{found['failed']}; {found['rows_per_batch']:.1f} rows a batch; requests were sent "
            f"{found['behind_ms']['p99']:.2f} ms late (p99)"
        )

    def cycles() -> None:
        found = models_of("cycles", *model, "--cycles", args.cycles)
        early, late = found["halves"]
        metric = f"{found['cycles']} loads and unloads: memory, second half"
        report.compare(metric, late, "bytes", "first half", early, late / early, "<= 1.1")
        resident = found["resident"][found["cycles"] // 10 :]
        slope = statistics.linear_regression(range(len(resident)), resident).slope
        report.checks.append(f"cycles: {slope / 1e3:.1f} kB more with every load and unload")

    def overhead(gateway: Gateway) -> None:
        asked = ["--project", "bench", "--service", "called", "--model", "noop", "--keys", 0, "--field", "x"]
        answer = load(place, gateway.address, asked, "--seconds", 0.5)["answer_bytes"]
        with Process([place.bench, "floor-serve", "--answer-bytes", answer], stdout=subprocess.PIPE, text=True) as echo:
            address = echo.process.stdout.readline().strip()
            paired = ["paired", gateway.address, *asked, "--echo", address, "--seconds", args.seconds]
            runs = [models_of(*paired) for _ in range(args.runs)]
        report.runs["overhead"] = {"ours": runs}
        (ours, echo), (ours_99, echo_99) = (both(runs, what) for what in ("p50_us", "p99_us"))
        added = (ours - echo) / OVERHEAD_US
        report.compare(f"no-op model: p50, added of {OVERHEAD_US} us", ours, "us", "echo", echo, added, "<= 1")
        report.compare("no-op model: p99", ours_99, "us", "echo", echo_99, ours_99 / echo_99, "<= 2.5")

    def features(gateway: Gateway) -> None:
        asked = ["--project", "bench", "--service", "wide", "--model", "small", "--keys", KEYS]
        runs = [models_of("paired", gateway.address, *asked, "--seconds", args.seconds) for _ in range(args.runs)]
        report.runs["features"] = {"ours": runs}
        ours, alone = both(runs, "p50_us")
        forward = statistics.median(run["forward_us"] for run in runs)
        added = (ours - alone - forward) / FEATURES_US
        metric = f"Predict over 50 features: p50, added of {FEATURES_US} us"
        report.compare(metric, ours, "us", f"GetFeatures + forward of {forward:.0f} us", alone + forward, added, "<= 1")

    def deploying(gateway: Gateway) -> None:
        asked = ["--project", "bench", "--service", "wide", "--model", "slow", "--keys", KEYS]
        one = said["slow_1_rows_ms"]
        rate = DEPLOY_SHARE * 1e3 / one
        seconds = args.seconds * LONG
        for file in ("slow.pt", "other.pt"):
            gateway.register("other", file)
        # Its champion; what is deployed beside the load is the other version.
        gateway.deploy("other")
        found: dict[str, list[dict]] = {"quiet": [], "deploying": []}
        for turn in range(args.runs):
            for name, runs in found.items():
                deployer = Deployer(gateway) if name == "deploying" else None
                runs.append(load(place, gateway.address, asked, "--rate", rate, "--seconds", seconds))
                if deployer:
                    runs[-1]["deploys"] = deployer.stop()
                say(f"   deploy {turn + 1}/{args.runs} {name}: p99 {runs[-1]['p99_us'] / 1e3:.1f} ms")
        report.runs["deploy"] = found
        quiet, busy = (statistics.median(run["p99_us"] for run in runs) / 1e3 for runs in found.values())
        metric = f"deploying a second model: p99 of the first at {rate:.0f}/s"
        report.compare(metric, busy, "ms", "without", quiet, busy / quiet, "<= 1.3")
        deploys = sum(run["deploys"] for run in found["deploying"])
        report.checks.append(f"deploy: {deploys} deploys in {args.runs * seconds:.0f} s")

    def soak(gateway: Gateway) -> None:
        asked = ["--project", "bench", "--service", "wide", "--model", "small", "--keys", KEYS]
        # What is allocated once, with the first thousands of requests, is no leak.
        load(place, gateway.address, asked, "--callers", 4, "--seconds", min(5, args.soak_seconds))
        watch = Watch(gateway)
        found = load(place, gateway.address, asked, "--callers", 4, "--seconds", args.soak_seconds)
        early, late = watch.stop()
        report.runs["soak"] = {"ours": [found]}
        metric = f"{found['answered']} predictions: memory, second half"
        report.compare(metric, late, "bytes", "first half", early, late / early, "<= 1.1")

    def logging() -> None:
        """The same requests to servers that log and one that does not, in alternating blocks."""
        data = generate(place, 0)
        asked = ["--project", "bench", "--service", "wide", "--model", "small", "--keys", KEYS]
        contenders = {"off": "off", "as usual": "{}", "everything": "{sample: 100%}"}
        found: dict[str, list[dict]] = {name: [] for name in contenders}
        with ExitStack() as running:
            redis = running.enter_context(Redis(work / "redis"))
            url = f"redis://127.0.0.1:{redis.port}"
            gateways = {}
            for name, setting in contenders.items():
                folder = work / f"log-{name.replace(' ', '-')}"
                more = f"serving_log: {setting}\naudit: off\n"
                # One of them has the store's writer; the definitions and rows are the same.
                project = f"bench{len(gateways)}"
                gateways[name] = running.enter_context(Gateway(place, folder, data, url, files, more, project))
                gateways[name].fill(["wide0"])
                gateways[name].register("small", "small.pt")
                gateways[name].deploy("small")
                load(place, gateways[name].address, [*asked[2:], "--project", project], "--callers", 1, "--seconds", 2)
            for block in range(LOGGING_BLOCKS):
                # Whoever comes first in one block comes last in the next.
                for name in list(contenders) if block % 2 == 0 else list(contenders)[::-1]:
                    project = ["--project", f"bench{list(contenders).index(name)}"]
                    # One caller after the other: between rare requests the processor sleeps, and waking it is most of p50.
                    pace = ["--callers", 1, "--seconds", LOGGING_SECONDS]
                    found[name].append(load(place, gateways[name].address, [*asked[2:], *project], *pace))
        report.runs["logging"] = found
        for name in ("as usual", "everything"):
            for what, at_most in {"p50_us": 1.05, "p99_us": 1.10}.items():
                pairs = zip(found[name], found["off"], strict=True)
                ratios = [on[what] / off[what] for on, off in pairs]
                ours, off = (statistics.median(run[what] for run in found[of]) for of in (name, "off"))
                bound = median_at_most(ratios)
                metric = f"logging {name}: {what.removesuffix('_us')}, upper 95 % bound of {len(ratios)} paired blocks"
                report.compare(metric, ours, "us", "no log", off, bound, f"<= {at_most}")
                report.checks.append(f"logging {name}: {what.removesuffix('_us')}: median ratio {statistics.median(ratios):.3f}")

    def with_gateway() -> None:
        data = generate(place, 0)
        with Redis(work / "redis") as redis:
            url = f"redis://127.0.0.1:{redis.port}"
            with Gateway(place, work / "ours", data, url, files) as gateway:
                gateway.fill(["wide0"])
                for name in ("noop", "small", "slow"):
                    gateway.register(name, f"{name}.pt")
                    gateway.deploy(name)
                for name, measure in over_grpc.items():
                    guarded(name, lambda: measure(gateway))

    over_grpc = {"overhead": overhead, "features": features, "soak": soak, "deploy": deploying}
    guarded("simulated", simulated)
    guarded("policy-cost", policy_cost)
    said = models(place, files)
    report.checks.append(f"slow.pt: {json.dumps({name: said[name] for name in said if name.startswith('s')})}")
    for name, measure in {
        "logging": logging,
        "policies": policies,
        "steady": steady,
        "saturated": saturated,
        "overload": overload,
        "cycles": cycles,
    }.items():
        guarded(name, measure)
    if wanted(*over_grpc):
        try:
            with_gateway()
        except Wrong as wrong:
            say(f"error: {wrong}")
            report.wrong.append(f"gateway: {wrong}")


def both(runs: list[dict], what: str) -> tuple[float, float]:
    """Medians of ours and of the peer."""
    return tuple(statistics.median(run[who][what] for run in runs) for who in ("ours", "peer"))


class Deployer:
    """Deploys a version of the second model and retires it, over and over until it is stopped."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.going, self.deploys = gateway, True, 0
        self.wrong: Wrong | None = None
        self.thread = threading.Thread(target=self._deploy)
        self.thread.start()

    def _deploy(self) -> None:
        while self.going:
            try:
                self.gateway.forget_files()
                self.gateway.deploy("other", 2)
                self.gateway.retire("other", 2)
            except Wrong as wrong:
                self.wrong = wrong
                return
            self.deploys += 1
            time.sleep(0.2)

    def stop(self) -> int:
        self.going = False
        self.thread.join()
        if self.wrong:
            raise self.wrong
        if not self.deploys:
            raise Wrong("no deploy ended while the load was on")
        return self.deploys


def judge_policies(report: Report, of: str, found: list[dict]) -> None:
    """Ours beside the policies it is measured by, in medians over seeds or blocks."""

    def median(workload: str, contender: str, what: str) -> float:
        runs = [run for run in found if (run["workload"], run["contender"]) == (workload, contender)]
        values = [run["millis"].get(what, run.get(what)) for run in runs]
        # What answered nobody in a block was not fast.
        return statistics.median(float("inf") if value is None else value for value in values)

    def best(workload: str, peers: list[str], what: str) -> tuple[float, str]:
        pick = max if what == "per_second" else min
        return pick((median(workload, peer, what), peer) for peer in peers)

    def compare(workload: str, peers: list[str], what: str, bound: str) -> None:
        (other, peer), ours = best(workload, peers, what), median(workload, "ours", what)
        unit = "/s" if what == "per_second" else "ms"
        name = "throughput" if what == "per_second" else what
        report.compare(f"{of} {workload}: {name}", ours, unit, peer, other, ours / other, bound)

    windows = ["window 5 ms", "window 10 ms", "window 200 ms"]
    everybody = ["zero delay", "no batching", *windows]
    workloads = dict.fromkeys(run["workload"] for run in found)
    for workload in workloads:
        if workload.startswith("poisson"):
            for what in ("p50", "p95", "p99"):
                compare(workload, ["no batching", "zero delay"], what, "<= 1.05")
            # Information: the failure that all of this is about.
            compare(workload, ["window 200 ms"], "p50", ">= 0")
        elif workload.startswith("saturation"):
            compare(workload, windows, "per_second", ">= 0.95")
            compare(workload, windows, "p99", "<= 1.05")
        else:
            compare(workload, everybody, "p99", "<= 1.05")
            compare(workload, everybody, "p50", "<= 1")
            compare(workload, ["window 200 ms"], "p99", ">= 0")
