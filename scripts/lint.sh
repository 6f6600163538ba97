#!/usr/bin/env bash
# Formatting and clippy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

scripts/setup.sh rust-components
use_libtorch
step "formatting"
cargo fmt --all --check
step "clippy"
cargo clippy --locked --workspace --all-targets --features torch -- -D warnings
