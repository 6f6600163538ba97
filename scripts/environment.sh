# Where things are kept, for the other scripts to source. Nothing here installs anything.
#
# Builds and the Python environment lie in the user's cache, not in the clone: a second clone, or the same one after
# `git clean`, starts warm.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
# Supervisors and containers start programs without it; cargo and pip would each guess for themselves.
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/coeval
venv=$cache/venv
python=$venv/bin/python
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
# rustup installs here without telling the shell that is running.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

if [ -t 2 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\033[1m' plain=$'\033[0m'
else
    bold='' plain=''
fi

# Says what happens now.
step() {
    printf '%s\n' "${bold}>> $*${plain}" >&2
}

fail() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# Clones share one folder of builds, and cargo tells their files apart by age alone: after another clone was built there, its
# newer binaries would pass for this one's. So this clone's sources are made newer than anything built elsewhere.
claim_builds() {
    local built_from=$CARGO_TARGET_DIR/.coeval-root
    [ "$(cat "$built_from" 2>/dev/null)" != "$root" ] || return 0
    find . \( -name .git -o -name target \) -prune -o -type f \( -name '*.rs' -o -name '*.bin' \) -exec touch {} +
    mkdir -p "$CARGO_TARGET_DIR"
    printf '%s\n' "$root" >"$built_from"
}

# The libtorch that the `torch` feature is built against and the programs open.
use_libtorch() {
    local lines
    lines=$(scripts/libtorch.sh "$python")
    eval "$lines"
}
