"""What every benchmark writes down: runs, rows of the table, and what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benches" / "peers"
CORES = 2


class Wrong(Exception):
    """Two contenders gave different answers, or one gave none."""


@dataclass
class Row:
    """One line of the table; the target is a bound on the ratio."""

    metric: str
    value: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    target: str
    met: bool


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    # Every single run, by workload and contender.
    runs: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self, metric: str, value: float, unit: str, peer: str, peer_value: float, ratio: float, bound: str):
        """`bound` is `<= 1.5` or `>= 3`."""
        sign, limit = bound.split()
        met = ratio <= float(limit) if sign == "<=" else ratio >= float(limit)
        self.rows.append(Row(metric, value, unit, peer, peer_value, ratio, bound, met))


@dataclass
class Place:
    """Where things are: our program, the peers' Python, the generated files."""

    bench: Path
    python: Path
    data: Path
    server: Path | None = None
    feast: Path | None = None
    torch: Path | None = None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measured(command: list[str | Path]) -> dict:
    """One process: what it printed last, and what the kernel says of its memory."""
    load = os.getloadavg()[0]
    environment = {**os.environ, "POLARS_MAX_THREADS": str(CORES), "OMP_NUM_THREADS": str(CORES)}
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    # A child that fills the pipe of its errors must not wait for us.
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    output = process.stdout.read()
    reader.join()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        shown = " ".join(str(part) for part in command)
        raise Wrong(f"`{shown}` ended with {process.returncode}: {''.join(errors).strip()[-2000:]}")
    said = json.loads(output.strip().splitlines()[-1])
    # Linux counts in KiB.
    return {**said, "peak_bytes": usage.ru_maxrss * 1024, "load_before": load}
