#!/usr/bin/env bash
# Installs what is missing: system packages, the Python environment, libtorch's layout. What is there already is left alone;
# a second run takes about a second.
#
#     scripts/setup.sh [redis] [rust-components]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

rust_min=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

# Debian's names of the packages that bring each program.
missing=()
need() {
    have "$1" || missing+=("$2")
}
need g++ g++        # our side of libtorch is C++
need readelf binutils
need python3 python3
if ! have python3 || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3-venv)
fi
for extra in "$@"; do
    if [ "$extra" = redis ]; then
        need redis-server redis-server
    fi
done
if [ ${#missing[@]} -gt 0 ]; then
    have apt-get || fail "missing: ${missing[*]} (Debian's names); install them and run this again"
    if [ "$(id -u)" = 0 ]; then
        as_root=()
    elif have sudo; then
        as_root=(sudo)
    else
        fail "missing: ${missing[*]}; run \`apt-get install ${missing[*]}\` as root, then this again"
    fi
    step "installing system packages: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

have cargo || fail "cargo not found; install Rust $rust_min or newer with rustup"
rust=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$rust_min" "$rust" | sort -V | head -n1)" != "$rust_min" ]; then
    fail "rustc $rust is older than $rust_min; run \`rustup update stable\`"
fi
for extra in "$@"; do
    if [ "$extra" = rust-components ] && ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
        have rustup || fail "cargo fmt or cargo clippy is missing; install them with your Rust"
        step "installing rustfmt and clippy"
        rustup component add rustfmt clippy
    fi
done

claim_builds

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$(python3 --version) is older than 3.10"

# The stamp is the content of everything that decides what is installed; the clone's place is part of it, because the
# `coeval` package is installed from it.
stamp=$venv/.coeval-stamp
wanted=$({
    python3 --version
    echo "$root"
    cat examples/nyc-flights/requirements.txt python/pyproject.toml
} | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || [ ! -x "$python" ]; then
    step "installing Python packages into $venv (PyTorch is large: some minutes the first time)"
    [ -x "$python" ] || python3 -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r examples/nyc-flights/requirements.txt -e 'python[dev]' >&2
    printf '%s\n' "$wanted" >"$stamp"
fi

use_libtorch
