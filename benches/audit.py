"""What the consistency audit sees of planted faults: `bench audit`, as a table and as target/bench/audit.json.

    audit.py --bench PROGRAM [--rows N] [--seeds N] [--seed-rows N]

Started by scripts/bench.sh. Fails where a changed row was not flagged, a right one was, or causes are named worse than
promised.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLEAN_VALUES_MIN = 1_000_000
NAMED_SHARE_MIN = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="our program")
    parser.add_argument("--rows", type=int, default=80_000, help="of the large log")
    parser.add_argument("--seeds", type=int, default=200, help="small logs, each once with every fault")
    parser.add_argument("--seed-rows", type=int, default=6_000, help="of each small log")
    args = parser.parse_args()
    command = [args.bench, "audit", "--rows", args.rows, "--seeds", args.seeds, "--seed-rows", args.seed_rows]
    answer = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(answer)

    print(f"large log   {found['compared_values']:>12,} values compared, {found['clean_values']:,} of them clean, "
          f"in {found['audit_seconds']:.1f} s; {found['lateness']:,} late")
    print(f"planted     {found['planted_rows']:>12,} rows with one of seven faults, of which {found['planted_rows_changed']:,} "
          f"have other bits ({found['changed_values']:,} values)")
    print(f"flagged     {found['planted_rows_flagged']:>12,} of them, and {found['false_flags']:,} others "
          f"({found['flagged_values']:,} values)")
    print(f"causes      {found['causes_right']:>12,} right of {found['causes_named']:,} logs with three changed rows and more "
          f"({found['causes_named_share']:.1%}); {found['seeds_all_right']} of {found['seeds']} seeds without a miss")
    print(f"\n{'FAULT':<10}{'LOGS':>6}{'TOO FEW':>9}{'RIGHT':>7}{'TIED':>6}  OTHERWISE")
    for fault, named in found["causes"].items():
        wrong = ", ".join(f"{count} x {what}" for what, count in named["wrong"].items())
        print(f"{fault:<10}{named['logs']:>6}{named['too_few']:>9}{named['right']:>7}{named['tied']:>6}  {wrong}")

    wrong = []
    if found["planted_rows_flagged"] != found["planted_rows_changed"] or found["flagged_values"] != found["changed_values"]:
        wrong.append("values with other bits were not flagged")
    if found["false_flags"] or found["false_flags_in_seeds"]:
        wrong.append("rows that were served right were flagged")
    if found["missed_in_seeds"]:
        wrong.append("rows of small logs were not flagged")
    if found["clean_values"] < CLEAN_VALUES_MIN:
        wrong.append(f"there were fewer than {CLEAN_VALUES_MIN:,} clean values")
    if found["causes_named_share"] < NAMED_SHARE_MIN:
        wrong.append(f"fewer than {NAMED_SHARE_MIN:.0%} of causes were right")
    said = {
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    out = ROOT / "target" / "bench" / "audit.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**said, **found, "wrong": wrong}, indent=1) + "\n")
    for text in wrong:
        print(f"WRONG: {text}")
    print(f"all numbers: {out}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
