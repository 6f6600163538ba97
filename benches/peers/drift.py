"""Evidently's and NannyML's defaults on the training sets and windows of Coeval's simulation, beside its own verdicts.

    cargo run --release -p drift --example calibration -- --write FOLDER --windows 10 --sizes 200,1000,10000 --training 10000
    python3 -m venv peers && peers/bin/pip install -r requirements-drift.txt
    DO_NOT_TRACK=1 NML_DISABLE_USAGE_LOGGING=1 peers/bin/python drift.py FOLDER [evidently|nannyml|both]

Each case is one float64 feature: a training set, a window, the shift between them (0: nothing changed) and how rows
depend on each other. A peer is asked what its defaults say of the window as one chunk:

- Evidently: `ValueDrift` with neither method nor threshold given.
- NannyML: `UnivariateDriftCalculator` with neither method nor threshold given: Jensen-Shannon, against the mean and three
  deviations of the training set's chunks. Chunks have the window's size, or a tenth of the training set's where that is
  less (the share of the window's chunks is then what counts), and no chunk is a remainder.

Prints the share of windows in which each raised an alarm, as a table and as one line of JSON.
"""

import collections
import json
import sys
import warnings

import numpy
import pandas

warnings.filterwarnings("ignore")


def evidently(training, window):
    from evidently import Dataset, DataDefinition, Report
    from evidently.metrics import ValueDrift

    definition = DataDefinition(numerical_columns=["x"])
    datasets = [Dataset.from_pandas(pandas.DataFrame({"x": x}), data_definition=definition) for x in (window, training)]
    snapshot = Report([ValueDrift(column="x")], include_tests=True).run(*datasets).dict()
    status = snapshot["tests"][0]["status"]
    return str(getattr(status, "value", status)).upper().endswith("FAIL")


def nannyml(training, window):
    import nannyml

    chunk = min(len(window), len(training) // 10)
    training, window = (pandas.DataFrame({"x": x[: len(x) // chunk * chunk]}) for x in (training, window))
    calculator = nannyml.UnivariateDriftCalculator(column_names=["x"], chunk_size=chunk)
    calculator.fit(training)
    results = calculator.calculate(window).filter(period="analysis").to_df()
    return float(results[("x", "jensen_shannon", "alert")].mean())


PEERS = {"evidently": evidently, "nannyml": nannyml}


def main():
    folder = sys.argv[1]
    asked = sys.argv[2] if len(sys.argv) > 2 else "both"
    peers = {name: peer for name, peer in PEERS.items() if asked in (name, "both")}
    with open(f"{folder}/cases.json") as file:
        cases = json.load(file)
    tallies = collections.defaultdict(collections.Counter)
    for case in cases:
        training, window = (
            numpy.fromfile(f"{folder}/{case['name']}.{side}.f64", dtype="<f8") for side in ("training", "window")
        )
        tally = tallies[case["dependence"], case["rows"], case["shift"]]
        tally["windows"] += 1
        tally["coeval"] += case["verdict"] == "DRIFT"
        tally["coeval_insufficient"] += case["verdict"] == "INSUFFICIENT_DATA"
        for name, peer in peers.items():
            tally[name] += peer(training, window)

    columns = ["coeval", "coeval_insufficient", *peers]
    print(f"{'':32} {'rows':>8} {'shift':>6} {'windows':>8} " + " ".join(f"{column:>20}" for column in columns))
    lines = []
    for (dependence, rows, shift), tally in tallies.items():
        shares = {column: tally[column] / tally["windows"] for column in columns}
        print(
            f"{dependence:32} {rows:>8} {shift:>6} {tally['windows']:>8} "
            + " ".join(f"{shares[column]:>20.2f}" for column in columns)
        )
        lines.append({"dependence": dependence, "rows": rows, "shift": shift, "windows": tally["windows"], **shares})
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
