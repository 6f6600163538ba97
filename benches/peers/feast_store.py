"""Feast over the same Redis: `feast_store.py FOLDER DATA HOST:PORT fill|read [SECONDS]`.

`fill` makes a feature repository with one view of 50 features over wide0.parquet and writes it online; `read` asks its
Python SDK for one entity at a time, as fast as it goes, and prints one line of JSON.
"""

import json
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64

FEATURES = 50
folder, data, redis, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]


def store() -> FeatureStore:
    return FeatureStore(repo_path=str(folder))


if what == "fill":
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_store.yaml").write_text(
        f"project: bench\nprovider: local\nregistry: {folder}/registry.db\n"
        f"online_store: {{type: redis, connection_string: \"{redis}\"}}\nentity_key_serialization_version: 3\n"
    )
    entity = Entity(name="entity", join_keys=["entity"], value_type=ValueType.INT64)
    source = FileSource(path=str(data / "wide0.parquet"), timestamp_field="at")
    schema = [Field(name=f"f{i}", dtype=Float64) for i in range(FEATURES)]
    view = FeatureView(name="wide", entities=[entity], schema=schema, source=source, ttl=timedelta(0), online=True)
    feast = store()
    feast.apply([entity, view, FeatureService(name="wide", features=[view])])
    feast.write_to_online_store("wide", pq.read_table(data / "wide0.parquet").to_pandas())
else:
    feast = store()
    service = feast.get_feature_service("wide")
    seconds = float(sys.argv[5])
    keys = pq.read_metadata(data / "wide0.parquet").num_rows
    rng = random.Random(5)

    def ask() -> None:
        answer = feast.get_online_features(features=service, entity_rows=[{"entity": rng.randrange(keys)}]).to_dict()
        assert answer["f0"][0] is not None

    for _ in range(50):
        ask()
    micros = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        started = time.perf_counter()
        ask()
        micros.append((time.perf_counter() - started) * 1e6)
    micros.sort()
    said = {
        "answered": len(micros),
        "per_second": len(micros) / seconds,
        "p50_us": micros[len(micros) // 2],
        "p99_us": micros[int(len(micros) * 0.99)],
    }
    print(json.dumps(said))
