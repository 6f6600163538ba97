#!/usr/bin/env bash
# The demos: installs what is missing, builds the server, and runs examples/nyc-flights/demo.py, demo_audit.py or demo_rollout.py with it.
#
#     ONLINE=embedded|redis scripts/demo.sh
#     scripts/demo.sh audit
#     scripts/demo.sh rollout
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

online=${ONLINE:-embedded}
case $online in
embedded) scripts/setup.sh ;;
redis) scripts/setup.sh redis ;;
*) fail "ONLINE=$online; say embedded or redis" ;;
esac

use_libtorch
step "building the server (release; the first time this takes a while)"
cargo build --release --locked -p cli --features torch

if [ "${1:-}" = audit ]; then
    step "building the benchmark program, which plants faults (release; the first time this takes a while)"
    cargo build --release --locked -p benches
    step "the audit demo"
    exec "$python" examples/nyc-flights/demo_audit.py --server "$CARGO_TARGET_DIR/release/coeval" --bench "$CARGO_TARGET_DIR/release/bench"
fi

if [ "${1:-}" = rollout ]; then
    step "the rollout demo"
    exec "$python" examples/nyc-flights/demo_rollout.py --server "$CARGO_TARGET_DIR/release/coeval"
fi

step "the demo, with the $online store"
exec "$python" examples/nyc-flights/demo.py --server "$CARGO_TARGET_DIR/release/coeval" --online "$online"
