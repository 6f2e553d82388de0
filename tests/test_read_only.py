"""The package where its user may not write, and a HOME that nobody may write to."""

from __future__ import annotations

import os
import subprocess
import sys

#: numba finds no place for what it compiled: neither beside the file, nor below HOME, nor as the user named one.
WITHOUT_PLACE = """
from numba.core import caching
for kind in (caching.CompileResultCacheImpl, caching.CodeLibraryCacheImpl):
    kind._locator_classes = []
"""
ENCODES = """
import numpy as np
from nla_engine.codec import Codec
rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
codec = Codec.named("int8", 64)
print(np.abs(codec.decode(codec.encode(rows)) - rows).max() < 0.1)
"""


def test_loops_are_compiled_where_nothing_can_be_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLACE + ENCODES],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
