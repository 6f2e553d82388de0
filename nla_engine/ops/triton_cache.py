"""Where Triton caches compiled kernels."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def find_place() -> None:
    """Leave Triton's default below HOME. If that cannot be written, use a directory that is removed at exit."""
    if {"TRITON_HOME", "TRITON_CACHE_DIR"} & set(os.environ):
        return
    wanted = Path(os.path.expanduser("~/"), ".triton", "cache")
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        # A new directory, which others cannot have filled: Triton runs what it finds there.
        made = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="nla_engine-kernels-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
