#!/usr/bin/env bash
# Removes what was built and what the demo left behind. The Python environment stays: it took minutes to download.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

rm -rf target/demo target/test target/bench
cargo clean
