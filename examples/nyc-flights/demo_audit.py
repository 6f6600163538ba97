#!/usr/bin/env python3
"""Proof of sameness on real flights: everything that is served is logged, and the log is audited.

The first two weeks of July are replayed as in `demo.py`, with one departure in fifty told ten minutes late. Then

  * `coeval audit consistency` replays the logged rows offline. Every served value has to be what the same code says of the
    events that were known; where late events would have changed it, that is lateness, with its reason, and no bug;
  * `coeval labels` joins what became of the flights to the logged predictions;
  * `coeval drift` holds July against January to June. The seasons drift, and that is no bug either;
  * seven faults are planted into rows of a log that was clean, and the audit has to find every row and name the fault.

`make demo-audit` runs it with the binaries it built.

    python demo_audit.py --server target/release/coeval --bench target/release/bench [--out target/demo]
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import demo
from demo import Failed, Steps

HERE = Path(__file__).resolve().parent
STEPS = 9
FROM, TO = "2013-07-01", "2013-07-16"
FLUSH_SECONDS = 2
UPLOADED_SECONDS_MAX = 120
COMPARED_MIN = 200_000
CAUSES_NAMED_MIN = 0.9
SEEDS = 200
LATE_ONE_IN, LATE_MINUTES = 50, 10
JULY = "july"
# What summer does to New York.
DRIFTED = "weather_now:temp"


def asked(command: list[str], environment: dict[str, str], statuses: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Runs a command with `--json` and returns what it says."""
    command = [*command, "--json"]
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode not in statuses:
        raise Failed(f"`{' '.join(command[3:5])}` ended with status {done.returncode}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise Failed(f"`{' '.join(command[3:5])}` said no JSON: {error}") from error


def logged(project: Path) -> dict[str, int]:
    """What the gateways' accounts of the serving log add up to."""
    total: dict[str, int] = {}
    for account in project.glob(".coeval/nyc-flights/serving-log/*/*/losses-*.json"):
        for minute in json.loads(account.read_text())["minutes"].values():
            for what, rows in minute.items():
                total[what] = total.get(what, 0) + rows
    return total


def wait_until_uploaded(project: Path, rows: int) -> dict[str, int]:
    """The log is written behind what answers: waits until all of it is on the object store."""
    ends = time.monotonic() + UPLOADED_SECONDS_MAX
    while True:
        total = logged(project)
        if total.get("offered", 0) >= rows and total.get("written", 0) == total.get("chosen", 0):
            return total
        if time.monotonic() > ends:
            raise Failed(f"{rows:,} rows were served, and the accounts of the log say {total}")
        time.sleep(0.2)


def planted(bench: Path, seeds: int, failures: list[str]) -> dict[str, Any]:
    """Faults planted into rows of logs that were clean, by the benchmark program (see `make bench-audit`)."""
    command = [str(bench), "audit", "--seeds", str(seeds)]
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise Failed(f"`bench audit` ended with status {done.returncode}")
    found = json.loads(done.stdout)
    numbers = {
        "planted_clean_values": found["clean_values"],
        "planted_rows_changed": found["planted_rows_changed"],
        "planted_rows_flagged": found["planted_rows_flagged"],
        "false_flags": found["false_flags"] + found["false_flags_in_seeds"],
        "causes_named_share": found["causes_named_share"],
        "seeds": found["seeds"],
    }
    print(f"   {numbers['planted_rows_flagged']:,} of {numbers['planted_rows_changed']:,} changed rows flagged, "
          f"{numbers['false_flags']:,} others, among {numbers['planted_clean_values']:,} clean values; "
          f"the fault is named right in {numbers['causes_named_share']:.1%} of the logs")
    if numbers["planted_rows_flagged"] != numbers["planted_rows_changed"] or found["missed_in_seeds"]:
        failures.append("rows with planted faults were not flagged")
    if numbers["false_flags"]:
        failures.append("rows that were served right were flagged")
    if numbers["causes_named_share"] < CAUSES_NAMED_MIN:
        failures.append(f"fewer than {CAUSES_NAMED_MIN:.0%} of the faults were named right")
    return numbers


def demonstrate(server: Path, bench: Path | None, seeds: int, out: Path) -> bool:
    """All steps; True when everything held."""
    steps = Steps(STEPS)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "audit.json"
    report_file.unlink(missing_ok=True)
    project = out / "project"
    numbers: dict[str, Any] = {}
    failures: list[str] = []
    with contextlib.ExitStack() as running:
        with steps.step("The data: flights, weather and planes of New York, 2013, with honest clocks"):
            demo.prepare()
        with steps.step("A fresh project that logs every served row: validate, apply"):
            demo.copy_project(project)
            environment = {
                **os.environ,
                "COEVAL_GRPC": "127.0.0.1:0",
                "COEVAL_HTTP": "127.0.0.1:0",
                "COEVAL_REQUEST_TIME": "allowed",
                "COEVAL_LOG_SAMPLE": "100%",
                "COEVAL_LOG_FLUSH": f"{FLUSH_SECONDS}s",
            }
            for command in ("validate", "apply"):
                demo.run([str(server), "-C", str(project), command], environment)
        import coeval
        import replay
        import train

        with steps.step("The server, and a model of January to June"):
            url = running.enter_context(demo.served(server, project, environment, out))
            client = running.enter_context(coeval.connect(url))
            client.refresh(timeout=demo.READY_SECONDS_MAX)
            train.train(client, HERE / "data")
        at = [*("-C", str(project))]
        with_server = ["--server", url.removeprefix("grpc://")]
        with steps.step(f"The first two weeks of July, replayed; one departure in {LATE_ONE_IN} is told {LATE_MINUTES} min late"):
            rows = train.spine(HERE / "data", replay.BEGIN, replay.END)
            late = replay.Late(one_in=LATE_ONE_IN, by_us=LATE_MINUTES * 60_000_000)
            online = replay.replay(client, rows, HERE / "data", late)
            account = wait_until_uploaded(project, 2 * rows.num_rows)
            print(f"{rows.num_rows:,} flights served twice, as features and as predictions, in {online.seconds:.0f} s; "
                  f"the log has {account['written']:,} of {account['offered']:,} rows")
        with steps.step("The audit: every logged value, replayed offline"):
            command = [str(server), *at, "audit", "consistency", "--service", train.SERVICE, "--from", FROM, "--to", TO]
            audit = asked([*command, *with_server], environment, statuses=(0, 1))
            values = audit["values"]
            numbers["compared_values"] = sum(values[kind] for kind in ("equal", "bug", "lateness"))
            numbers["bugs"], numbers["lateness"] = values["bug"], values["lateness"]
            print(f"   {numbers['compared_values']:,} values compared: {values['bug']:,} bugs, {values['lateness']:,} late, "
                  f"{values['fallback']:,} fallbacks; at most {audit['bug_rate_upper']:.2g} wrong with 95 % confidence")
            for source in audit["lateness"]:
                print(f"   late: {json.dumps(source)}")
            if numbers["bugs"]:
                failures.append(f"{numbers['bugs']} served values are not what the same code says offline")
            if numbers["compared_values"] < COMPARED_MIN:
                failures.append(f"only {numbers['compared_values']:,} values were compared, of {COMPARED_MIN:,} at least")
            if not values["lateness"] or not audit["lateness"]:
                failures.append("events came late, and the audit does not say so")
        with steps.step("What became of the flights: labels joined to the log"):
            labels = out / "labels.parquet"
            replay.write_labels(online, rows, labels)
            demo.run([str(server), *at, "labels", "add", "--model", train.MODEL, str(labels)], environment)
            quality = asked([str(server), *at, "labels", "show", "--model", train.MODEL, "--from", FROM, "--to", TO], environment)
            demo.run([str(server), *at, "labels", "show", "--model", train.MODEL, "--from", FROM, "--to", TO], environment)
            numbers["auc_joined"] = quality["parts"][0]["classes"]["auc"]
            numbers["auc_online"] = replay.auc_online(online, rows)
            if abs(numbers["auc_joined"] - numbers["auc_online"]) > 1e-6:
                failures.append(f"AUC {numbers['auc_joined']} by joined labels, and {numbers['auc_online']} by the replay")
        with steps.step("Drift: these two weeks of July against January to June"):
            # The days whose events were told: of later ones the windows are empty.
            client.flush()
            client.training_set(train.SERVICE, rows, name=JULY).to_arrow()
            of = ["--dataset", JULY, "--against", train.DATASET]
            demo.run([str(server), *at, "drift", "show", *of], environment)
            demo.run([str(server), *at, "drift", "plot", *of, "--feature", DRIFTED], environment)
            drift = asked([str(server), *at, "drift", "show", *of], environment)
            numbers["drift"] = {feature["name"]: feature["verdict"] for feature in drift["report"]["features"]}
            if numbers["drift"].get(DRIFTED) != "DRIFT":
                failures.append(f"`{DRIFTED}` of July looks like January to June, which it does not")
        with steps.step("Stopping"):
            running.close()
    with steps.step("Seven planted faults: does the audit find every row, and name the fault?"):
        if bench is None:
            print("no benchmark program given: left out")
        else:
            numbers |= planted(bench, seeds, failures)
    numbers["seconds"] = round(time.monotonic() - began, 1)
    report_file.write_text(json.dumps(numbers, indent=2) + "\n")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"\n{'FAILED' if failures else 'OK'} after {numbers['seconds']:.0f} s; {report_file}")
    return not failures


def main() -> None:
    parser = demo.arguments_of(__doc__)
    parser.add_argument("--bench", type=Path, help="the benchmark program, which plants faults")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="small logs into which faults are planted")
    arguments = parser.parse_args()
    server = demo.program(parser, arguments.server)
    bench = demo.program(parser, arguments.bench) if arguments.bench else None
    demo.conduct(lambda: demonstrate(server, bench, arguments.seeds, arguments.out.resolve()))


if __name__ == "__main__":
    main()
