"""Where Triton keeps what it compiled. Knows no kernel."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def find_place() -> None:
    """Below HOME, as Triton itself would; where nobody may write there, in a directory that ends with this process."""
    if {"TRITON_HOME", "TRITON_CACHE_DIR"} & set(os.environ):
        return
    wanted = Path(os.path.expanduser("~/"), ".triton", "cache")
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        # Not one that others could fill beforehand: what lies in it is run.
        made = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="nla_engine-kernels-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
