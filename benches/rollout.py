"""What a version in shadow costs the champion: the same requests to a server with a rollout and to one without.

Both servers run the same champion over features from Redis, asked at a fixed rate; on one of them a second version scores every
row in shadow. They are asked in alternating blocks, whoever came first in one comes last in the next, and ratios are of
blocks beside each other. A shadow that scores nothing costs nothing, so what it scored and what was shed are told, and a
shadow that scored less than half of what it was offered is an error.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import urllib.request
from contextlib import ExitStack

from inference import Gateway, median_at_most, models
from online import KEYS, Redis, generate, load
from report import Place, Report, Wrong, measured, say

# The issue's, not to be changed because a number misses them.
TARGETS = {"p50_us": 1.05, "p99_us": 1.10}
BUSY_MAX = 0.20
# Requests a second: one after the other would keep the model busy for twice as long as it is to be.
RATE = 800
BLOCKS, BLOCK_SECONDS = 40, 1.5
SCORED_MIN = 0.5

MODEL = "small"
# No criterion ends it while it is measured.
CRITERIA = "    shadow: {min_rows: 1000000000, drift: ignore, max_flip_rate: 0.99, ends_after: 14d}\n    decision: \"y > 0.5\"\n"


def definitions_with_shadow(text: str) -> str:
    """The definitions of the inference benchmark, with criteria for the one model."""
    head = f"  - name: {MODEL}\n"
    if text.count(head) != 1:
        raise Wrong(f"the definitions have no model `{MODEL}`, or several")
    return text.replace(head, head + CRITERIA)


class WithShadow(Gateway):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        file = self.folder / "definitions.yaml"
        file.write_text(definitions_with_shadow(file.read_text()))

    def begin(self) -> None:
        self.register(MODEL, f"{MODEL}-2.pt")
        self.deploy(MODEL, 2)
        self.run("rollout", "shadow", MODEL, "2", "--why", "bench", "--without-evaluation")

    def counted(self) -> tuple[float, float, float]:
        """Rows that the champion has answered, that the version in shadow has scored, and that were shed."""
        with urllib.request.urlopen(f"http://{self.http}/metrics") as answer:
            text = answer.read().decode()
        rows = [count_of(text, "coeval_model", f'version="{version}",what="rows"') for version in (1, 2)]
        return *rows, count_of(text, "coeval_shadow_shed_rows_total", "")


def count_of(metrics: str, name: str, labels: str) -> float:
    line = rf'^{name}{{model="{MODEL}",[^}}]*{re.escape(labels)}[^}}]*}} (\S+)$'
    found = re.search(line, metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def shadow(report: Report, place: Place, args: argparse.Namespace) -> None:
    work = place.data / "rollout-work"
    files = work / "models"
    models(place, files)
    data = generate(place, 0)
    asked = ["--service", "wide", "--model", MODEL, "--keys", KEYS]
    found: dict[str, list[dict]] = {"alone": [], "shadow": []}
    with ExitStack() as running:
        redis = running.enter_context(Redis(work / "redis"))
        url = f"redis://127.0.0.1:{redis.port}"
        gateways = {}
        for name in found:
            # One of them has the store's writer; the definitions and rows are the same.
            arguments = (place, work / name, data, url, files, "audit: off\n", f"rollout-{name}")
            gateways[name] = running.enter_context(WithShadow(*arguments))
            gateways[name].fill(["wide0"])
            gateways[name].register(MODEL, f"{MODEL}.pt")
            gateways[name].deploy(MODEL)
        gateways["shadow"].begin()

        def block(name: str, seconds: float) -> dict:
            project = ["--project", f"rollout-{name}"]
            return load(place, gateways[name].address, [*asked, *project], "--rate", RATE, "--seconds", seconds)

        for name in found:
            block(name, 2)
        paired = [gateways["alone"].address, "--project", "rollout-alone", *asked, "--seconds", 2]
        forward_us = measured([place.bench, "models", "paired", *paired])["forward_us"]
        before = gateways["shadow"].counted()
        for turn in range(args.blocks):
            for name in list(found) if turn % 2 == 0 else list(found)[::-1]:
                found[name].append(block(name, args.block_seconds))
        # What waits is scored when the champion rests.
        time.sleep(1)
        after = gateways["shadow"].counted()
    report.runs["shadow"] = found
    judge(report, found, forward_us, *(now - then for now, then in zip(after, before, strict=True)))


def judge(
    report: Report, found: dict[str, list[dict]], forward_us: float, offered: float, scored: float, shed: float
) -> None:
    per_second = statistics.median(run["per_second"] for run in found["alone"])
    busy = per_second * forward_us / 1e6
    report.compare("shadow: champion's model busy", busy * 100, "%", "of a core", 100, busy, f"<= {BUSY_MAX}")
    for what, at_most in TARGETS.items():
        name = what.removesuffix("_us")
        ratios = [with_it[what] / alone[what] for with_it, alone in zip(found["shadow"], found["alone"], strict=True)]
        ours, off = (statistics.median(run[what] for run in found[of]) for of in ("shadow", "alone"))
        ratio, bound = statistics.median(ratios), median_at_most(ratios)
        report.compare(f"shadow at 100 %: {name}, {len(ratios)} paired blocks", ours, "us", "no rollout", off, ratio, f"<= {at_most}")
        report.checks.append(f"shadow: {name}: median ratio {ratio:.3f}, at most {bound:.3f} with 95 % confidence")
    report.checks.append(f"shadow: {scored:.0f} of {offered:.0f} rows scored, {shed:.0f} shed ({shed / max(offered, 1):.1%})")
    if scored < SCORED_MIN * offered or offered == 0:
        raise Wrong(f"the shadow scored {scored:.0f} of {offered:.0f} rows; what it costs is not known")


def rollout(report: Report, place: Place, args: argparse.Namespace) -> None:
    if place.server is None:
        raise SystemExit("say where our server is: --server target/release/coeval")
    say(">> shadow")
    try:
        shadow(report, place, args)
    except Wrong as wrong:
        say(f"error: {wrong}")
        report.wrong.append(f"shadow: {wrong}")
