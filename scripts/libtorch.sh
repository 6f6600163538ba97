#!/usr/bin/env bash
# Lays out the libtorch that the `torch` feature links, from the torch wheel of a Python environment.
#
#     eval "$(scripts/libtorch.sh [python] [cache-folder])"
#
# The training scripts need the torch wheel anyway, so it serves as libtorch too: nothing is downloaded twice, and
# the model is run by the very library that exported it. The wheel cannot be linked as it stands: its libtorch.so
# drags in libtorch_cuda.so, and with it gigabytes of CUDA libraries that a CPU build does not need. So
# <cache-folder>/libtorch/ gets `include` as it is and a `lib` of symlinks to libtorch_cpu.so and what that really
# needs, while `libtorch.so` becomes a one-line linker script, because tch asks the linker for -ltorch.
#
# Standard output carries shell lines to evaluate and nothing else. Running it again changes nothing.
set -euo pipefail

# tch 0.24 is generated against exactly this version; another one would be undefined behaviour, not a link error.
torch_version=2.11.0

python=${1:-python3}
cache=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/coeval}

fail() {
    echo "libtorch.sh: $*" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || fail "only Linux is supported: build without the torch feature, or set LIBTORCH yourself"
command -v readelf >/dev/null || fail "readelf not found: install binutils"
command -v "$python" >/dev/null || fail "$python not found: pass a Python interpreter as the first argument"

# Prints the wheel's version and its folder, without importing torch, which takes seconds.
find_torch() {
    "$python" - <<'PY'
import importlib.metadata, importlib.util, os
try:
    version = importlib.metadata.version("torch").split("+")[0]
except importlib.metadata.PackageNotFoundError:
    version = "none"
spec = importlib.util.find_spec("torch")
print(version, os.path.dirname(spec.origin) if spec and spec.origin else "-")
PY
}

read -r found torch <<<"$(find_torch)"
if [ "$found" != "$torch_version" ]; then
    echo "libtorch.sh: installing torch $torch_version into $python (has: $found)" >&2
    "$python" -m pip install --disable-pip-version-check "torch==$torch_version" >&2 ||
        fail "could not install torch $torch_version: pass the interpreter of a virtual environment as the first argument"
    read -r found torch <<<"$(find_torch)"
    [ "$found" = "$torch_version" ] || fail "$python still has torch $found after installing $torch_version"
fi
[ -e "$torch/lib/libtorch_cpu.so" ] || fail "$torch/lib/libtorch_cpu.so is missing: reinstall torch $torch_version"

site=$(dirname "$torch")
libtorch=$cache/libtorch
mkdir -p "$libtorch/lib"

# A link that is right already is left alone, so that a build running meanwhile never sees it missing.
link() {
    [ "$(readlink "$2" || true)" = "$1" ] || ln -sfn "$1" "$2"
}

write() {
    [ -f "$2" ] && [ "$(cat "$2")" = "$1" ] || printf '%s\n' "$1" >"$2"
}

# Where the wheels keep libraries. What is found in none of them comes from the system.
find_library() {
    local folder
    for folder in "$torch/lib" "$site"/torch.libs "$site"/nvidia/*/lib; do
        if [ -e "$folder/$1" ]; then
            echo "$folder/$1"
            return
        fi
    done
}

# Follow NEEDED entries from libtorch_cpu.so: for the CUDA wheel that is libc10, libgomp, libcudart and libcupti;
# for a CPU wheel only the first two. All lie side by side, where libtorch_cpu.so's own $ORIGIN finds them.
declare -A wanted=()
queue=(libtorch_cpu.so)
while [ ${#queue[@]} -gt 0 ]; do
    name=${queue[0]}
    queue=("${queue[@]:1}")
    [ -z "${wanted[$name]:-}" ] || continue
    path=$(find_library "$name")
    [ -n "$path" ] || continue
    wanted[$name]=$path
    while read -r needed; do
        queue+=("$needed")
    done < <(readelf -d "$path" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
done
[ -n "${wanted[libc10.so]:-}" ] || fail "$torch/lib/libtorch_cpu.so does not need libc10.so: is this a torch $torch_version wheel?"

for name in "${!wanted[@]}"; do
    link "${wanted[$name]}" "$libtorch/lib/$name"
    # The linker is asked for -lgomp, and only compilers that came with OpenMP have an unversioned name for it.
    if [[ $name == libgomp* && $name != libgomp.so ]]; then
        link "${wanted[$name]}" "$libtorch/lib/libgomp.so"
        wanted[libgomp.so]=${wanted[$name]}
    fi
done
wanted[libtorch.so]=script
for path in "$libtorch"/lib/*; do
    [ -n "${wanted[$(basename "$path")]:-}" ] || rm -f "$path"
done

write 'INPUT(libtorch_cpu.so)' "$libtorch/lib/libtorch.so"
link "$torch/include" "$libtorch/include"
# torch-sys compares this with the version it was generated for.
write "$torch_version" "$libtorch/build-version"

printf 'export LIBTORCH=%q\n' "$libtorch"
case ":${LD_LIBRARY_PATH:-}:" in
*":$libtorch/lib:"*) search=$LD_LIBRARY_PATH ;;
*) search=$libtorch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ;;
esac
printf 'export LD_LIBRARY_PATH=%q\n' "$search"
