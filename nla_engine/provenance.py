"""What a result records of the run that made it: versions, command line, time."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("nla_engine", "torch", "transformers", "triton", "zarr", "numba", "numpy", "safetensors")


def describe_run() -> dict[str, Any]:
    """A JSON-able record of this process."""
    return {
        "started": now(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
