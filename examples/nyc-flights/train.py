#!/usr/bin/env python3
"""Trains the delay model on January to June and hands it to the server.

The training set comes over Arrow Flight: for each flight, the features as they were known an hour before it was scheduled
to leave. The network learns on January to May and is judged on June; July it meets in production (replay.py).

What the server gives a model is one tensor per declared input, `[rows, number of features]`, in the order of the YAML. So
everything else belongs inside the module: the scaling, whose numbers are learnt from the training months only, and the
embedding of the carrier.

    python train.py --url grpc://127.0.0.1:7400
"""

from __future__ import annotations

import argparse
import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path

import coeval
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
SERVICE = "delay_inputs"
MODEL = "delay"
DATASET = "january-to-june"
CARRIER = "context:carrier_id"
# Features of the service that are no numbers, and the one that is a number only by name; the model's `dense` input in
# features/flight.yaml leaves out the same.
NOT_DENSE = {"plane:engine", "last_landing:airport", "flight:scheduled", "flight:carrier", CARRIER}
MISSING = 0.0  # as `missing:` of the model's input
CARRIERS = 17  # sixteen, and 0 for unknown
TRAIN_UNTIL = dt.date(2013, 6, 1)
DATASET_UNTIL = dt.date(2013, 7, 1)
SEED = 20130101
THREADS = 2
EPOCHS = 6
BATCH = 1024
GOLDEN_ROWS = 32


class Delay(nn.Module):
    """A small network over standardised numbers and an embedding of the carrier; answers the probability of being late."""

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.carrier = nn.Embedding(CARRIERS, 6)
        self.layers = nn.Sequential(
            nn.Linear(mean.shape[0] + 6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def logit(self, dense: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
        # Five deviations is already extreme; one broken anemometer (1048 mph in February) must not drown the rest.
        scaled = ((dense - self.mean) / self.scale).clamp(-5.0, 5.0)
        known = carrier[:, 0].clamp(0, 16)
        return self.layers(torch.cat([scaled, self.carrier(known)], dim=1))[:, 0]

    def forward(self, dense: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.logit(dense, carrier))


@dataclass
class Trained:
    """What later steps need of a training run."""

    rows: int
    version: int
    auc_june: float
    module: torch.jit.ScriptModule
    dense: list[str]


def dense_features(client: coeval.Client) -> list[str]:
    """The features of the `dense` input, in the order in which the server gives them to the model."""
    return [name for name in client.catalog(refresh=True).services[SERVICE].features.names if name not in NOT_DENSE]


def tensors(table: pa.Table, dense: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's inputs, made of a training set's columns as the server makes them of a request's."""
    columns = [_float32(table.column(name)) for name in dense]
    carrier = pc.fill_null(table.column(CARRIER), 0).to_numpy()
    return torch.from_numpy(np.stack(columns, axis=1)), torch.from_numpy(carrier.astype(np.int64)[:, None])


def _float32(column: pa.ChunkedArray) -> np.ndarray:
    numbers = column.cast(pa.float64()) if not pa.types.is_boolean(column.type) else column.cast(pa.int8()).cast(pa.float64())
    return pc.fill_null(numbers, MISSING).to_numpy().astype(np.float32)


def auc(score: np.ndarray, late: np.ndarray) -> float:
    """The area under the ROC curve: how often a late flight scores above a punctual one, ties counting half."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    # The mean rank of each group of equal scores.
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.concatenate((starts, [len(ordered)])))
    ranks = np.empty(len(score))
    ranks[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    positives = int(late.sum())
    negatives = len(late) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((ranks[late].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def spine(data: Path, begin: dt.date, end: dt.date) -> pa.Table:
    """The flights scheduled for departure on the days from `begin` up to `end`, which is not included."""
    table = pq.read_table(data / "spine.parquet")
    day = table.column("scheduled_day")
    return table.filter(pc.and_(pc.greater_equal(day, begin), pc.less(day, end)))


def fit(dense: torch.Tensor, carrier: torch.Tensor, late: torch.Tensor) -> Delay:
    """Trains the network; the same inputs give the same weights."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Quantiles rather than moments, so that outliers do not set the scale; a constant column keeps its own.
    numbers = dense.numpy()
    low, middle, high = np.nanquantile(numbers, [0.05, 0.5, 0.95], axis=0)
    spread = np.where(high > low, (high - low) / 3.29, np.maximum(numbers.std(axis=0), 1e-6))
    model = Delay(torch.from_numpy(middle.astype(np.float32)), torch.from_numpy(spread.astype(np.float32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = EPOCHS * (len(late) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    shuffle = torch.Generator().manual_seed(SEED)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(late), generator=shuffle)
        for start in range(0, len(late) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            loss = nn.functional.binary_cross_entropy_with_logits(model.logit(dense[rows], carrier[rows]), late[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: Delay) -> torch.jit.ScriptModule:
    """TorchScript, frozen: weights become constants and nothing of Python is left."""
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.script(model))


def predict(module: torch.jit.ScriptModule, table: pa.Table, dense: list[str]) -> np.ndarray:
    """What the model says about rows of a training set."""
    with torch.inference_mode():
        return module(*tensors(table, dense)).numpy()


def training_set(client: coeval.Client, data: Path, name: str = DATASET) -> tuple[coeval.Dataset, pa.Table]:
    """The flights of January to June with what was known of each an hour before it was scheduled to leave, kept as a dataset."""
    began = time.monotonic()
    asked = spine(data, dt.date(2013, 1, 1), DATASET_UNTIL)
    dataset = client.training_set(SERVICE, asked, name=name, seed=SEED)
    table = dataset.to_arrow()
    if table.num_rows != asked.num_rows:
        raise SystemExit(f"asked for {asked.num_rows} rows, got {table.num_rows}")
    seconds = time.monotonic() - began
    rate = table.num_rows / seconds
    print(f"training set `{dataset.name}` {dataset.id or ''}: {table.num_rows:,} rows, {table.num_columns} columns "
          f"in {seconds:.1f} s ({rate:,.0f} rows/s)")
    return dataset, table


def register(client: coeval.Client, dataset: coeval.Dataset, table: pa.Table, until: dt.date = TRAIN_UNTIL) -> Trained:
    """Fits a network to the flights of a training set before `until`, judges it on June, and registers it."""
    began = time.monotonic()
    dense = dense_features(client)
    labelled = table.filter(pc.is_valid(table.column("late")))
    day = labelled.column("scheduled_day")
    learning = labelled.filter(pc.less(day, until))
    june = labelled.filter(pc.greater_equal(day, TRAIN_UNTIL))
    late = torch.from_numpy(learning.column("late").to_numpy().astype(np.float32))
    module = export(fit(*tensors(learning, dense), late))
    auc_june = auc(predict(module, june, dense), june.column("late").to_numpy().astype(bool))
    auc_learning = auc(predict(module, learning, dense), learning.column("late").to_numpy().astype(bool))
    last = until - dt.timedelta(days=1)
    print(f"trained on {learning.num_rows:,} flights, {len(dense)} numbers and the carrier, in {time.monotonic() - began:.1f} s: "
          f"AUC {auc_learning:.4f} (January to {last:%B}), {auc_june:.4f} (June, held out)")

    # Every gateway compares what it computes with what is computed here, before the version answers anything.
    dense_rows, carrier_rows = tensors(june.slice(0, GOLDEN_ROWS), dense)
    golden = coeval.Golden.of(module, {"dense": dense_rows, "carrier": carrier_rows}, ["p_late"])
    registered = client.register_model(
        MODEL,
        module,
        golden=golden,
        dataset=dataset,
        metrics={f"auc_january_to_{last:%B}".lower(): auc_learning, "auc_june": auc_june},
        seed=SEED,
    )
    print(f"registered `{MODEL}` version {registered.version} ({registered.digest[:19]})")
    return Trained(table.num_rows, registered.version, auc_june, module, dense)


def deploy(client: coeval.Client, version: int, why: str) -> None:
    """Has every gateway load a version. The first one gets the traffic."""
    deployed = client.deploy_model(MODEL, version, why=why)
    client.refresh()
    print(f"version {version} of `{MODEL}` is deployed; the champion is version {deployed.champion}")
    for note in deployed.notes:
        print(f"note: {note}")


def train(client: coeval.Client, data: Path) -> Trained:
    """The whole step: training set, fit, judgement, registration, deployment."""
    trained = register(client, *training_set(client, data))
    deploy(client, trained.version, why="first two weeks of July")
    return trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="grpc://127.0.0.1:7400")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    with coeval.connect(arguments.url) as client:
        train(client, arguments.data)


if __name__ == "__main__":
    main()
