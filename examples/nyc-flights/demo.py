#!/usr/bin/env python3
"""The whole path, once: definitions to served predictions, with an audit of every value.

`make demo` runs this with the binary it built. It works in `target/demo`, on a fresh copy of this project, and leaves
nothing running: not when a step fails, not on ctrl-C, not when it is killed.

    python demo.py --server target/release/coeval [--online redis] [--out target/demo]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
READY_SECONDS_MAX = 300
DRAIN_SECONDS_MAX = 60


class Failed(Exception):
    """A step that did not work; the text is what to tell the user."""


class Steps:
    """Says what happens now, and how long it took."""

    def __init__(self, total: int) -> None:
        self.number = 0
        self.total = total

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.number += 1
        print(f"\n== {self.number}/{self.total} {what}", flush=True)
        began = time.monotonic()
        yield
        print(f"   {time.monotonic() - began:.1f} s", flush=True)


def die_with_parent() -> None:
    """Asks Linux to end the child with us, should we be killed before we can; elsewhere `finally` has to do."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process of its own session, so that ctrl-C reaches us alone and we end it in order."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def end(process: subprocess.Popen[bytes], seconds: float) -> int:
    """SIGTERM, and SIGKILL when that does not help; returns the exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log, indented."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (nothing)"


def run(command: list[str], environment: dict[str, str]) -> None:
    """Runs a command in front of the user."""
    print(f"$ {' '.join(command)}", flush=True)
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        raise Failed(f"`{' '.join(command[-1:])}` ended with status {status}")


def prepare() -> None:
    """Makes the data, where it is not there yet."""
    if (HERE / "data" / "spine.parquet").exists():
        print(f"already there: {HERE / 'data'}")
    else:
        run([sys.executable, str(HERE / "prepare.py")], dict(os.environ))


def copy_project(project: Path) -> None:
    """A fresh copy of the definitions and of what they read, with an empty store."""
    if project.exists():
        shutil.rmtree(project)
    project.mkdir(parents=True)
    shutil.copy(HERE / "coeval.yaml", project)
    shutil.copytree(HERE / "features", project / "features")
    # What is replayed and what is asked is not part of the project: the server must hear of it event by event.
    shutil.copytree(HERE / "data", project / "data", ignore=shutil.ignore_patterns("replay", "spine.parquet"))


@contextlib.contextmanager
def redis(out: Path) -> Iterator[str]:
    """A Redis of our own on a free port, gone with its data afterwards."""
    program = shutil.which("redis-server")
    if program is None:
        raise Failed("no redis-server on the PATH: install Redis 7 (`apt-get install redis-server`), or run without ONLINE=redis")
    with tempfile.TemporaryDirectory(prefix="coeval-redis-") as folder:
        log = out / "redis.log"
        # A port can be taken between asking for it and using it: then ask again.
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
            process = start([program, *options], dict(os.environ), log)
            try:
                if answers_ping(process, port):
                    yield f"redis://127.0.0.1:{port}"
                    return
            finally:
                end(process, 10)
        raise Failed(f"redis-server did not come up; its log ends:\n{tail(log)}")


def answers_ping(process: subprocess.Popen[bytes], port: int) -> bool:
    """Waits until Redis answers; False when it ended or did not answer in time."""
    ends = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < ends:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return True
        except OSError:
            pass
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def served(server: Path, project: Path, environment: dict[str, str], out: Path) -> Iterator[str]:
    """The server, from start to drained; yields its address."""
    ready_file, log = out / "ready.json", out / "server.log"
    ready_file.unlink(missing_ok=True)
    command = [str(server), "-C", str(project), "serve", "--ready-file", str(ready_file)]
    print(f"$ {' '.join(command)}", flush=True)
    process = start(command, environment, log)
    try:
        yield f"grpc://{address(process, ready_file, log)}"
        status = end(process, DRAIN_SECONDS_MAX)
        if status != 0:
            raise Failed(f"the server ended with status {status} after SIGTERM; its log ends:\n{tail(log)}")
        print("server drained and gone, status 0", flush=True)
    except BaseException as error:
        if process.poll() not in (None, 0) and not isinstance(error, Failed):
            print(f"the server is gone (status {process.returncode}); its log ends:\n{tail(log)}", file=sys.stderr)
        raise
    finally:
        end(process, 10)


def address(process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> str:
    """Waits for the file in which the server says where it listens."""
    ends = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise Failed(f"the server ended with status {process.returncode} before it was ready; its log ends:\n{tail(log)}")
        try:
            said = json.loads(ready_file.read_text())
        except (OSError, ValueError):
            time.sleep(0.05)
            continue
        return str(said["grpc"])
    raise Failed(f"the server was not ready after {READY_SECONDS_MAX} s; its log ends:\n{tail(log)}")


def demo(server: Path, online: str, out: Path, began: float) -> bool:
    """All steps; True when the audit held."""
    steps = Steps(7)
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.json"
    report.unlink(missing_ok=True)
    project = out / "project"
    with contextlib.ExitStack() as running:
        with steps.step("The data: flights, weather and planes of New York, 2013, with honest clocks"):
            prepare()
        with steps.step("A fresh project with an empty store" + (", and a Redis" if online == "redis" else "")):
            copy_project(project)
            environment = {
                **os.environ,
                "COEVAL_ONLINE": running.enter_context(redis(out)) if online == "redis" else "embedded",
                "COEVAL_GRPC": "127.0.0.1:0",
                "COEVAL_HTTP": "127.0.0.1:0",
                "COEVAL_REQUEST_TIME": "allowed",
            }
            print(f"{project}; online store: {environment['COEVAL_ONLINE']}")
        with steps.step("The definitions: validate, plan, apply"):
            for command in ("validate", "plan", "apply"):
                run([str(server), "-C", str(project), command], environment)
        # Imported late: torch takes seconds, and a step above may already have something to say.
        import coeval
        import replay
        import train

        with steps.step("The server: history becomes visible online"):
            url = running.enter_context(served(server, project, environment, out))
            client = running.enter_context(coeval.connect(url))
            client.refresh(timeout=READY_SECONDS_MAX)
            ready = [view.name for view in client.catalog(refresh=True).views.values() if view.ready]
            print(f"{url} answers for {len(ready)} views: {', '.join(ready)}")
        with steps.step("The model: training set of January to June over Flight, network, registration, deployment"):
            trained = train.train(client, HERE / "data")
        with steps.step("The first two weeks of July, replayed in order, and the audit"):
            held = replay.run(client, HERE / "data", trained, began, report)
        with steps.step("Stopping"):
            running.close()
    print(f"\n{'OK' if held else 'FAILED'} after {time.monotonic() - began:.0f} s; {report}")
    return held


def stop(number: int, _: FrameType | None) -> None:
    """Ends through every `finally`, as ctrl-C does."""
    raise SystemExit(128 + number)


def client_error() -> type[Exception]:
    """What the client raises when the server refuses or is gone; its text says enough."""
    try:
        import coeval
    except ImportError as missing:
        sys.exit(f"{missing}: the demo needs the packages of requirements.txt, and python/ of this repository")
    return coeval.CoevalError


def arguments_of(text: str) -> argparse.ArgumentParser:
    """What every demo takes."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--server", type=Path, required=True, help="the coeval binary")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "target" / "demo")
    return parser


def program(parser: argparse.ArgumentParser, path: Path) -> Path:
    """A program that was built."""
    resolved = path.resolve()
    if not os.access(resolved, os.X_OK):
        parser.error(f"{resolved} is not a program: build it with `cargo build --release`")
    return resolved


def conduct(demonstration: Callable[[], bool]) -> None:
    """Runs a demo, ends through every `finally` whatever happens, and exits with 0 when it held."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    server_failure = client_error()
    try:
        held = demonstration()
    except (Failed, server_failure) as failure:
        sys.exit(f"\nFAILED: {failure}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing is left running")
    sys.exit(0 if held else 1)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--online", choices=["embedded", "redis"], default=os.environ.get("ONLINE") or "embedded")
    arguments = parser.parse_args()
    server = program(parser, arguments.server)
    began = time.monotonic()
    conduct(lambda: demo(server, arguments.online, arguments.out.resolve(), began))


if __name__ == "__main__":
    main()
