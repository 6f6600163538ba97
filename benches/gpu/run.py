"""Models on an accelerator: what `certify` says, latency and throughput beside a bare forward, and what happens when memory
runs out. Needs python3 with torch 2.11 and a `coeval` that was built with `--features torch`; no Rust, no network.

    LIBTORCH=$(python3 -c 'import torch, os; print(os.path.dirname(torch.__file__))') \
        python3 benches/gpu/run.py --coeval ./coeval --device cuda:0

With `--device cpu` it rehearses on any machine. It prints one JSON document, and exits with 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH = 64
HIDDEN = 1024
MAX_ROWS = 256
TOLERANCE = 1e-3


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Hungry(nn.Module):
    """Takes as many MiB as the first number says."""

    def forward(self, x: Tensor) -> Tensor:
        taken = torch.empty([int(x[0, 0].item()) << 20], dtype=torch.uint8, device=x.device)
        return x.sum(dim=1) + float(taken.dim() - 1)


def definitions(device: str) -> str:
    fields = ", ".join(f"{{name: f{i}, type: float64}}" for i in range(WIDTH))
    features = ", ".join(f'"ask:f{i}"' for i in range(WIDTH))
    model = """
  - name: {name}
    features: asked
    runtime: torchscript
    inputs: [{{name: x, dtype: float32, features: ["*"], missing: 0.0}}]
    outputs: [{{name: y, dtype: float32}}]
    placement: {{devices: [{device}], executors: 1, threads: 1}}
    slo: {{deadline: 10s}}
    batching: {{max_rows: {rows}, max_queue_rows: 65536}}
    fallback: none
"""
    return (
        f"requests:\n  - {{name: ask, fields: [{fields}]}}\n"
        f"feature_services:\n  - {{name: asked, features: [{features}]}}\nmodels:"
        + model.format(name="layers", device=device, rows=MAX_ROWS)
        + model.format(name="hungry", device=device, rows=4)
    )


class Server:
    """`coeval serve` in a project of its own."""

    def __init__(self, coeval: Path, device: str, folder: Path) -> None:
        self.coeval, self.folder = coeval, folder
        (folder / "features").mkdir()
        (folder / "coeval.yaml").write_text(
            "project: gpu\nstore: ./.coeval\nonline: embedded\nlog: disk\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n"
        )
        (folder / "features" / "models.yaml").write_text(definitions(device))
        for name, module in [("layers", Layers()), ("hungry", Hungry())]:
            torch.jit.script(module.eval()).save(str(folder / f"{name}.pt"))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.coeval, *arguments], cwd=self.folder, text=True, capture_output=True, timeout=600)

    def done(self, *arguments: str) -> str:
        said = self.run(*arguments)
        if said.returncode != 0:
            raise SystemExit(f"`coeval {' '.join(arguments)}` failed: {said.stderr or said.stdout}")
        return said.stdout

    def __enter__(self) -> Server:
        self.done("apply")
        ready = self.folder / "ready.json"
        self.log = (self.folder / "server.log").open("w")
        command = [self.coeval, "serve", "--ready-file", ready]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=self.log, stderr=self.log)
        while not ready.exists():
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended: {(self.folder / 'server.log').read_text()}")
            time.sleep(0.02)
        said = json.loads(ready.read_text())
        self.grpc, self.http = said["grpc"], said["http"]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()

    def deploy(self, name: str) -> str | None:
        """The reason why not, if it is refused."""
        self.done("model", "register", name, f"{name}.pt", "--server", self.grpc)
        said = self.run("model", "deploy", name, "1", "--why", "bench", "--server", self.grpc)
        return None if said.returncode == 0 else said.stderr.strip()

    def predict(self, name: str, rows: list[list[float]]) -> tuple[int, dict]:
        columns = {f"f{i}": [row[i] for row in rows] for i in range(WIDTH)}
        request = urllib.request.Request(
            f"http://{self.http}/v1/models/{name}/predict",
            json.dumps({"rows": columns}).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, {"error": error.read().decode()}

    def resident(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024


def used_on(device: str) -> int | None:
    """Bytes in use on the device, by whomever."""
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total - free


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = lambda q: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3, 3)  # noqa: E731
    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "calls": len(ordered)}


def bare(device: str, rows: int, seconds: float) -> dict[str, float]:
    """A forward in this process, the copies to and from the device included."""
    module = torch.jit.freeze(torch.jit.script(Layers().eval())).to(device)
    inputs = torch.zeros(rows, WIDTH)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(10):
            module(inputs.to(device)).cpu()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            start = time.perf_counter()
            module(inputs.to(device)).cpu()
            times.append(time.perf_counter() - start)
    return percentiles(times) | {"rows_per_second": round(rows / statistics.median(times))}


def drive(server: Server, callers: int, rows: int, seconds: float) -> dict[str, float]:
    """Closed loop: every caller sends its next request when the last one is answered. JSON in Python is most of the time."""
    body = [[0.01 * i for i in range(WIDTH)]] * rows
    times: list[float] = []
    failed: list[str] = []
    ends = time.monotonic() + seconds

    def call() -> None:
        while time.monotonic() < ends:
            start = time.perf_counter()
            status, answer = server.predict("layers", body)
            times.append(time.perf_counter() - start)
            if status != 200:
                failed.append(str(answer)[:200])

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = percentiles(times) | {"rows_per_second": round(len(times) * rows / seconds), "failed": len(failed)}
    return result | ({"first_failure": failed[0]} if failed else {})


def values(answer: dict) -> list[float]:
    return answer["outputs"]["y"]


def right(server: Server) -> float:
    """The largest difference from the module in Python."""
    torch.manual_seed(3)
    inputs = torch.randn(MAX_ROWS, WIDTH)
    with torch.inference_mode():
        expected = Layers().eval()(inputs).flatten().tolist()
    status, answer = server.predict("layers", inputs.tolist())
    if status != 200:
        raise SystemExit(f"predict failed: {answer}")
    return max(abs(got - wanted) for got, wanted in zip(values(answer), expected, strict=True))


def out_of_memory(server: Server, device: str) -> dict[str, object]:
    """Asks for more than there is, several times, and looks at what is left."""
    harmless = [[0.0, *[1.0] * (WIDTH - 1)]]
    server.predict("hungry", harmless)
    before = used_on(device), server.resident()
    answers = []
    for _ in range(2):
        # A PiB, and again after a request that is answered.
        status, answer = server.predict("hungry", [[float(1 << 30), *[0.0] * (WIDTH - 1)]])
        answers.append({"status": status, "answer": json.dumps(answer)[:300]})
        status, answer = server.predict("hungry", harmless)
        answers.append({"status": status, "value": values(answer)[0] if status == 200 else str(answer)[:300]})
    after = used_on(device), server.resident()
    return {
        "answers": answers,
        "device_bytes_before_after": [before[0], after[0]],
        "resident_bytes_before_after": [before[1], after[1]],
        "goes_on": answers[-1].get("value") == WIDTH - 1 and server.process.poll() is None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coeval", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    on_cuda = options.device != "cpu"
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(options.device) if on_cuda else "cpu",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.coeval.resolve(), options.device, Path(folder))
        certified = server.run("--json", "model", "certify", "layers", "layers.pt")
        result["certify"] = json.loads(certified.stdout) if certified.returncode == 0 else certified.stderr.strip()
        with server:
            for name in ["layers", "hungry"]:
                refused = server.deploy(name)
                if refused:
                    raise SystemExit(f"deploying {name} was refused: {refused}")
            result["difference_max"] = right(server)
            result["predict_1_row"] = drive(server, 1, 1, options.seconds)
            result["predict_8_callers_64_rows"] = drive(server, 8, 64, options.seconds)
            result["out_of_memory"] = out_of_memory(server, options.device)
        result["log"] = [
            line.strip() for line in (Path(folder) / "server.log").read_text().splitlines() if "is loaded" in line
        ]
        # Last, so that both do not share the device.
        result["bare_1_row"] = bare(options.device, 1, options.seconds)
        result["bare_256_rows"] = bare(options.device, MAX_ROWS, options.seconds)
    json.dump(result, sys.stdout, indent=2)
    print()
    if result["difference_max"] > TOLERANCE or not result["out_of_memory"]["goes_on"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
