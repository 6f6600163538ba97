"""The facts about where a model was trained that go into its record.

They are gathered, never guessed: what cannot be found out stays empty.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

# What changes the numbers a training run produces, when installed.
_LIBRARIES = ("coeval", "torch", "numpy", "pandas", "polars", "pyarrow", "scikit-learn", "xgboost", "lightgbm")


def commit() -> str:
    """The git commit of the working directory, with `-dirty` when tracked files differ from it; empty without git."""
    try:
        head = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}-dirty" if dirty else head


def libraries() -> dict[str, str]:
    """Versions of Python and of the libraries that matter to training."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def digest() -> str:
    """SHA-256 over the sorted `name==version` lines of everything installed."""
    lines = {
        f"{distribution.metadata['Name'].lower()}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def hardware() -> str:
    """Architecture, processor and number of cores."""
    return f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return answer.stdout.strip()
