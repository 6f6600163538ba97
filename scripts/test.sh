#!/usr/bin/env bash
# Every check: formatting, clippy, Rust tests, Python tests against the server that the Rust tests built. Ends with what the
# runners say of themselves.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

scripts/setup.sh redis rust-components
use_libtorch
scripts/lint.sh

logs=$root/target/test
mkdir -p "$logs"
# Without these, tests that need Redis or an S3 server say that they were skipped; here that would be a hole.
export COEVAL_REQUIRE_REDIS=1 COEVAL_REQUIRE_S3=1
export COEVAL_PYTHON=$python

step "Rust tests"
# The features are those of the clippy run and of every other build here, so that dependencies are compiled once per profile.
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --locked --workspace --features torch 2>&1 | tee "$logs/rust.log"
else
    step "cargo-nextest is not installed: using cargo test"
    cargo test --locked --workspace --features torch --no-fail-fast 2>&1 | tee "$logs/rust.log"
fi

step "Python tests"
# The integration tests of `cli` have built the program.
export COEVAL_SERVER_BIN=$CARGO_TARGET_DIR/debug/coeval
[ -x "$COEVAL_SERVER_BIN" ] || fail "$COEVAL_SERVER_BIN is missing although its tests ran"
"$python" -m pytest -p no:cacheprovider --rootdir python -c python/pyproject.toml python/tests 2>&1 | tee "$logs/python.log"
"$python" -m pytest -p no:cacheprovider examples/nyc-flights 2>&1 | tee "$logs/examples.log"

step "summary"
grep -E '^ *Summary \[|^test result:' "$logs/rust.log"
tail -qn 1 "$logs/python.log" "$logs/examples.log"
