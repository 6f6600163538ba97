#!/usr/bin/env bash
# Says where the libtorch is that the `torch` feature is built against: in the torch wheel of a Python environment, which is
# installed if it is missing.
#
#     eval "$(scripts/libtorch.sh [python])"
#
# The training scripts need the torch wheel anyway, so it serves as libtorch too: nothing is downloaded twice, and the model
# is run by the very library that exported it. Only our C++ shim is linked against it (inference/build.rs); programs open it
# when they load their first model, from LIBTORCH or from where it was when they were built.
#
# Standard output carries a shell line to evaluate and nothing else. Running it again changes nothing.
set -euo pipefail

# The shim uses classes of C++, whose layout changes from one version to the next.
torch_version=2.11.0

python=${1:-python3}

fail() {
    echo "libtorch.sh: $*" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || fail "only Linux is supported: build without the torch feature"
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
for file in lib/libtorch_cpu.so lib/libc10.so include/torch/headeronly/version.h; do
    [ -e "$torch/$file" ] || fail "$torch/$file is missing: reinstall torch $torch_version"
done

printf 'export LIBTORCH=%q\n' "$torch"
