"""The parts of the benchmarks' drivers that judge: what a wrong one says would pass for a measurement."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy")
pytest.importorskip("pyarrow")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benches"))

import rollout  # noqa: E402
from report import Report, Wrong  # noqa: E402


def runs(p50: float, p99: float, blocks: int = 40) -> list[dict]:
    return [{"p50_us": p50, "p99_us": p99, "per_second": 1000.0, "answered": 1500} for _ in range(blocks)]


def test_a_shadow_is_judged_by_blocks_beside_each_other():
    report = Report()
    found = {"alone": runs(100.0, 200.0), "shadow": runs(104.0, 250.0)}
    # A minute in which the machine was slow to both is no difference.
    for name in found:
        for run in found[name][:15]:
            run["p50_us"] *= 3
    rollout.judge(report, found, forward_us=150.0, offered=60_000, scored=60_000, shed=0)
    met = {row.metric: (round(row.ratio, 3), row.met) for row in report.rows}
    assert met == {
        "shadow: champion's model busy": (0.15, True),
        "shadow at 100 %: p50, 40 paired blocks": (1.04, True),
        "shadow at 100 %: p99, 40 paired blocks": (1.25, False),
    }
    assert "60000 of 60000 rows scored, 0 shed (0.0%)" in report.checks[-1]


def test_a_champion_that_is_too_busy_misses_the_premise():
    report = Report()
    rollout.judge(report, {"alone": runs(1, 1), "shadow": runs(1, 1)}, forward_us=250.0, offered=60_000, scored=60_000, shed=0)
    assert not report.rows[0].met


def test_a_shadow_that_scores_nothing_is_no_measurement():
    with pytest.raises(Wrong, match="scored 10 of 60000"):
        rollout.judge(Report(), {"alone": runs(1, 1), "shadow": runs(1, 1)}, forward_us=1.0, offered=60_000, scored=10, shed=59_990)


def test_counts_are_read_by_model_and_version():
    metrics = """
coeval_model{model="small",version="1",what="rows"} 7
coeval_model{model="small",version="2",what="rows"} 12
coeval_model{model="other",version="2",what="rows"} 3
coeval_shadow_shed_rows_total{model="small",version="2"} 5
"""
    assert rollout.count_of(metrics, "coeval_model", 'version="2",what="rows"') == 12
    assert rollout.count_of(metrics, "coeval_shadow_shed_rows_total", "") == 5
    assert rollout.count_of("", "coeval_shadow_shed_rows_total", "") == 0


def test_the_model_has_criteria_once():
    text = "models:\n  - name: small\n    features: wide\n"
    assert "shadow: {min_rows" in rollout.definitions_with_shadow(text)
    with pytest.raises(Wrong):
        rollout.definitions_with_shadow("models:\n  - name: other\n")
