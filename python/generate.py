#!/usr/bin/env python3
"""Generates `src/coeval/_generated` from the protos of the repository.

The generated code is committed, so that installing the package needs no protoc. protoc places modules by proto package
(`coeval.v1.types_pb2`), which would shadow this package's own name, so imports are made relative to `_generated`.
A test runs this into a temporary folder and compares.

    python generate.py            # writes src/coeval/_generated
    python generate.py --to DIR   # writes DIR
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTOS = HERE.parent / "proto" / "proto"
TARGET = HERE / "src" / "coeval" / "_generated"
# The version the committed code was generated with: other versions write other headers.
GRPCIO_TOOLS = "1.85.1"

INIT = '"""Code generated from proto/proto/coeval/v1 by generate.py. Do not edit."""\n'


def rewrite(text: str) -> str:
    """Makes imports relative and names modules where they really are."""
    text = re.sub(r"^from coeval\.v1 import (\w+_pb2)", r"from . import \1", text, flags=re.M)
    return re.sub(r"(['\"])coeval\.v1\.(\w+_pb2)\1", r"\1coeval._generated.\2\1", text)


def generate(target: Path) -> list[str]:
    """Writes the modules into `target` and returns their names."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(PROTOS.glob("coeval/v1/*.proto"))
    if not protos:
        raise SystemExit(f"no protos under {PROTOS}")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{PROTOS}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={scratch}",
            f"--pyi_out={scratch}",
            f"--grpc_python_out={scratch}",
            *[str(proto) for proto in protos],
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        target.mkdir(parents=True, exist_ok=True)
        for stale in [*target.glob("*_pb2*.py"), *target.glob("*_pb2*.pyi")]:
            stale.unlink()
        written = []
        for path in sorted(Path(scratch, "coeval", "v1").iterdir()):
            # Protos without a service get an empty grpc module; nothing would import it.
            text = path.read_text()
            if path.name.endswith("_grpc.py") and "Stub" not in text:
                continue
            (target / path.name).write_text(rewrite(text))
            written.append(path.name)
    (target / "__init__.py").write_text(INIT)
    return [*written, "__init__.py"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=TARGET)
    target = parser.parse_args().to
    for name in generate(target):
        print(target / name, file=sys.stderr)
    shutil.rmtree(target / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main()
