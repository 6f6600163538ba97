"""Feature flags: the hash by itself, the client and the OpenFeature providers against the real server."""

import asyncio
import datetime as dt
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import coeval
from coeval import flags

SERVER = os.environ.get("COEVAL_SERVER_BIN")
with_server = pytest.mark.skipif(
    not SERVER, reason="COEVAL_SERVER_BIN is not set: the tests against a real server did not run"
)
NOTE = Path(__file__).resolve().parents[2] / "docs" / "design" / "2026-11-22-rollout.md"

KEYS = {
    "`N14228`": ("N14228",),
    "`N24211`": ("N24211",),
    "`JFK`, `LAX`": ("JFK", "LAX"),
    "(one empty text)": ("",),
    "(no part)": (),
    "−9223372036854775808": (-(2**63),),
    "true, bytes 00 ff": (True, b"\x00\xff"),
}


def test_the_vectors_of_the_design_note():
    lines = re.findall(r"^\| (`[^`]*`|\(empty\)) \| (.+?) \| (\d+) \| ([0-9a-f]{16}) \|$", NOTE.read_text(), re.M)
    assert len(lines) == len(KEYS)
    for salt, key, bucket, unit in lines:
        salt = "" if salt == "(empty)" else salt.strip("`")
        assert flags.place(salt, *KEYS[key]) == flags.Placed(int(bucket), int(unit, 16)), key


def test_what_is_no_key_and_no_attribute():
    with pytest.raises(coeval.InvalidArgument, match="float"):
        flags.place("delay", 1.5)  # type: ignore[arg-type]
    with pytest.raises(coeval.InvalidArgument, match="object"):
        flags.request("p", ["a"], "u", {"x": object()}, True)
    when = dt.datetime(2024, 1, 2, 3, tzinfo=dt.timezone.utc)
    asked = flags.request("p", {"a": "boolean", "b": None}, "", {"when": when, "deep": {"list": [1, 2.5]}}, False)
    assert json.loads(asked.context) == {"when": "2024-01-02T03:00:00+00:00", "deep": {"list": [1, 2.5]}}
    assert [(flag.name, flag.type) for flag in asked.flags] == [("a", "boolean"), ("b", "")]
    # An empty key is a key.
    assert asked.HasField("targeting_key")
    assert not flags.request("p", [], None, None, True).HasField("targeting_key")


SETTINGS = """
project: shop
store: ./.coeval
online: embedded
serve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}
serving_log: off
"""

DEFINITIONS = """
requests: [{name: basket, fields: [{name: total, type: float64}]}]
feature_services: [{name: buying, features: ["basket:total"]}]
"""

WHY = ("--why", "a test", "--who", "ada")


class Shop:
    """A project in a folder, the server that serves it, and the command line that changes its flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grpc = self.http = ""
        (folder / "coeval.yaml").write_text(SETTINGS)
        (folder / "shop.yaml").write_text(DEFINITIONS)
        self.command("apply", "--no-wait")

    def command(self, *arguments: str) -> dict:
        assert SERVER
        server = ("--server", self.grpc) if self.grpc and arguments[0] == "flag" else ()
        words = [SERVER, "-C", str(self.folder), "--json", *arguments, *server]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start(self) -> None:
        assert SERVER
        ready, log = self.folder / "ready.json", (self.folder / "server.log").open("ab")
        words = [SERVER, "-C", str(self.folder), "serve", "--ready-file", str(ready)]
        self.process = subprocess.Popen(words, stdout=log, stderr=log)
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                addresses = json.loads(ready.read_text())
                self.grpc, self.http = addresses["grpc"], addresses["http"]
                return
            except (OSError, ValueError):
                time.sleep(0.05)
        raise AssertionError((self.folder / "server.log").read_text())


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("flags"))
    # Without a server the control log is written here; the server then begins with it.
    shop.command("flag", "set", "early", "--variant", "on=true", "--variant", "off=false", "--default", "on", *WHY)
    shop.start()
    rule = ("--rule", "country = 'DE' AND age >= 18 -> on", "--rule", "account.plan IN ('pro') -> on")
    shop.command("flag", "set", "ranker", *rule, "--split", "on=25%", "--layer", "pages", *WHY)
    for name, of, value in [
        ("color", "string", "color"), ("limit", "integer", "10"), ("ratio", "float", "0.5"), ("whole", "float", "2"),
        ("look", "object", '{"size": 3, "tags": ["a"]}'),
    ]:
        shop.command("flag", "set", name, "--type", of, "--variant", f"a={value}", "--default", "a", *WHY)
    shop.command("flag", "set", "off", "--split", "on=100%", "--disable", *WHY)
    yield shop
    shop.process.send_signal(signal.SIGTERM)
    try:
        assert shop.process.wait(timeout=60) == 0
    finally:
        shop.process.kill()




@with_server
def test_the_client_evaluates(shop):
    with coeval.connect(f"grpc://{shop.grpc}") as client:
        everything = client.flags(unit="N14228")
        assert sorted(everything) == ["color", "early", "limit", "look", "off", "ranker", "ratio", "whole"]
        assert {name: everything[name].value for name in ("color", "early", "limit", "look", "off", "ratio")} == {
            "color": "color", "early": True, "limit": 10, "look": {"size": 3, "tags": ["a"]}, "off": False, "ratio": 0.5,
        }
        assert everything["off"].reason == "DISABLED" and everything["limit"].type == "integer"
        german = client.flag("ranker", unit="x", context={"country": "DE", "age": 18})
        assert (german.value, german.variant, german.reason) == (True, "on", "TARGETING_MATCH")
        assert client.flag("ranker", context={"account": {"plan": "pro"}}).value is True
        assert client.flag("ranker", context={"country": "AT"}).error_code == "TARGETING_KEY_MISSING"
        assert client.flag("nowhere").error_code == "FLAG_NOT_FOUND"
        assert client.flag("limit", type="boolean").error_code == "TYPE_MISMATCH"
        with pytest.raises(coeval.InvalidArgument, match="type of flags"):
            client.flag("limit", type="bool")
        with pytest.raises(coeval.InvalidArgument, match="bytes"):
            client.flag("limit", context={"x": "y" * 70_000})


@with_server
def test_units_fall_where_python_says_and_a_ramp_only_adds(shop):
    units = [f"N{number:05}" for number in range(2_000)]
    with coeval.connect(f"grpc://{shop.grpc}") as client:

        def given() -> dict[str, bool]:
            return {unit: client.flag("ranker", unit=unit).value for unit in units}

        before = given()
        assert 0.21 < sum(before.values()) / len(units) < 0.29
        # Units of one bucket are alike: the bucket decides, and it is Python's too.
        by_bucket: dict[int, set[bool]] = {}
        for unit, value in before.items():
            by_bucket.setdefault(flags.place("pages", unit).bucket, set()).add(value)
        assert all(len(values) == 1 for values in by_bucket.values())
        assert any(len([u for u in units if flags.place("pages", u).bucket == b]) > 1 for b in by_bucket)
        ramped = shop.command("flag", "ramp", "ranker", "on", "50%", *WHY)
        assert (ramped["before"], ramped["share"]) == (2_500, 5_000)
        after = given()
        assert all(after[unit] for unit, value in before.items() if value)
        assert 0.45 < sum(after.values()) / len(units) < 0.55
        told = shop.command("flag", "exposures", "ranker")
        first, second = (told["entries"][str(entry)] for entry in sorted(map(int, told["entries"])))
        assert first["on"]["units"] == sum(before.values()) and second["on"]["units"] == sum(after.values())
        # The unit that was asked about with `expose=False` is nowhere.
        assert told["torn_units"] == 0
    written = [path for path in (shop.folder / ".coeval").rglob("*.jsonl.zst")]
    assert written and not any(b"N00001" in path.read_bytes() for path in written)
    history = shop.command("flag", "history", "ranker")["changes"]
    assert [change["who"] for change in history] == ["ada", "ada"] and history[0]["entry"] > history[1]["entry"]


@with_server
def test_the_openfeature_provider(shop):
    api = pytest.importorskip("openfeature.api", reason="openfeature-sdk is not installed")
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.exception import ErrorCode

    from coeval.openfeature import CoevalProvider

    api.set_provider_and_wait(CoevalProvider(f"grpc://{shop.grpc}"))
    client = api.get_client()
    german = EvaluationContext("x", {"country": "DE", "age": 30, "since": dt.datetime(2024, 1, 1)})
    details = client.get_boolean_details("ranker", False, german)
    assert (details.value, details.variant, details.reason, details.error_code) == (True, "on", "TARGETING_MATCH", None)
    assert isinstance(details.flag_metadata["entry"], int)
    assert client.get_string_value("color", "none") == "color"
    assert client.get_integer_value("limit", 1) == 10
    assert client.get_float_value("ratio", 1.0) == 0.5
    # An integer is a float too.
    assert client.get_float_value("whole", 1.0) == 2.0 and client.get_float_value("limit", 1.0) == 10.0
    assert client.get_object_value("look", {}) == {"size": 3, "tags": ["a"]}
    split = client.get_boolean_details("ranker", False, EvaluationContext("N14228"))
    assert split.reason in ("SPLIT", "DEFAULT")
    for name, context, code in [
        ("nowhere", german, ErrorCode.FLAG_NOT_FOUND),
        ("limit", german, ErrorCode.TYPE_MISMATCH),
        ("ranker", EvaluationContext(), ErrorCode.TARGETING_KEY_MISSING),
        ("ranker", EvaluationContext("x", {"big": "y" * 70_000}), ErrorCode.INVALID_CONTEXT),
    ]:
        details = client.get_boolean_details(name, True, context)
        assert (details.value, details.reason, details.error_code) == (True, "ERROR", code), details
    assert asyncio.run(client.get_integer_value_async("limit", 1)) == 10
    api.shutdown()

    # A server that is away gives everybody their own default.
    api.set_provider_and_wait(CoevalProvider("grpc://127.0.0.1:9", "shop", timeout=0.2))
    details = api.get_client().get_boolean_details("ranker", True, german)
    assert (details.value, details.error_code) == (True, ErrorCode.GENERAL)
    api.shutdown()


@with_server
def test_a_provider_that_knows_nothing_of_us(shop):
    """OpenFeature's own remote protocol, by OpenFeature's own client."""
    ofrep = pytest.importorskip("openfeature.contrib.provider.ofrep", reason="the OFREP provider is not installed")
    from openfeature import api
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.exception import ErrorCode

    api.set_provider_and_wait(ofrep.OFREPProvider(f"http://{shop.http}"))
    client = api.get_client()
    details = client.get_boolean_details("ranker", False, EvaluationContext("x", {"country": "DE", "age": 30}))
    assert (details.value, details.variant, details.reason) == (True, "on", "TARGETING_MATCH")
    assert client.get_object_value("look", {}) == {"size": 3, "tags": ["a"]}
    assert client.get_integer_value("limit", 1) == 10
    assert client.get_boolean_details("nowhere", True).error_code == ErrorCode.FLAG_NOT_FOUND
    assert client.get_boolean_details("ranker", True).error_code == ErrorCode.TARGETING_KEY_MISSING
    api.shutdown()
