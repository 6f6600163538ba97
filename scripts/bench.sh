#!/usr/bin/env bash
# The benchmarks: builds our program, installs the engines it is compared with, and runs them in turn. docs/benchmarks.md
# says what is measured.
#
#     scripts/bench.sh pit|windows|flight|online|inference|rollout [--runs N] [--only WORKLOAD...] [--rows SPINE VIEW]
#     scripts/bench.sh audit [--rows N] [--seeds N]
#
# Generated files (about 12 GB for all benchmarks) and the peers' Python lie in COEVAL_BENCH, by default in the user's
# cache.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ $# -gt 0 ] || fail "say which benchmark: pit, windows, flight, online, inference, rollout or audit"
have cargo || fail "cargo not found; run \`make setup\` first"
if [ "$1" = audit ]; then
    shift
    claim_builds
    step "building the benchmark program (release; the first time this takes a while)"
    cargo build --release --locked -p benches
    exec python3 benches/audit.py --bench "$CARGO_TARGET_DIR/release/bench" "$@"
fi
place=${COEVAL_BENCH:-$cache/bench}
peers=$place/peers

wanted=$({
    python3 --version
    cat benches/peers/requirements.txt
} | sha256sum | cut -d' ' -f1)
if [ "$(cat "$peers/.coeval-stamp" 2>/dev/null)" != "$wanted" ]; then
    step "installing the peers into $peers"
    python3 -m venv --clear "$peers"
    "$peers/bin/pip" install --quiet --disable-pip-version-check -r benches/peers/requirements.txt >&2
    printf '%s\n' "$wanted" >"$peers/.coeval-stamp"
fi

more=()
features=()
if [ "$1" = online ]; then
    feast=$place/feast
    wanted=$({
        python3 --version
        cat benches/peers/requirements-feast.txt
    } | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$feast/.coeval-stamp" 2>/dev/null)" != "$wanted" ]; then
        step "installing Feast into $feast"
        python3 -m venv --clear "$feast"
        "$feast/bin/pip" install --quiet --disable-pip-version-check -r benches/peers/requirements-feast.txt >&2
        printf '%s\n' "$wanted" >"$feast/.coeval-stamp"
    fi
    more=(--feast "$feast/bin/python")
fi

claim_builds
if [ "$1" = online ] || [ "$1" = inference ] || [ "$1" = rollout ]; then
    have redis-server || scripts/setup.sh redis
    use_libtorch
    step "building the server (release; the first time this takes a while)"
    cargo build --release --locked -p cli --features torch
    more+=(--server "$CARGO_TARGET_DIR/release/coeval")
fi
if [ "$1" = inference ] || [ "$1" = rollout ]; then
    features=(--features torch)
    more+=(--torch "$python")
fi
step "building the benchmark program (release; the first time this takes a while)"
cargo build --release --locked -p benches "${features[@]}"
exec "$peers/bin/python" benches/run.py "$@" --bench "$CARGO_TARGET_DIR/release/bench" --data "$place/data" "${more[@]}"
