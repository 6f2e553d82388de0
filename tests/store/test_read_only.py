"""The package where its user may not write, and a HOME that nobody may write to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nla_engine.ops.triton_cache import find_place

#: numba finds no place for what it compiled: neither beside the file, nor below HOME, nor as the user named one.
WITHOUT_PLACE = """
from numba.core import caching
for kind in (caching.CompileResultCacheImpl, caching.CodeLibraryCacheImpl):
    kind._locator_classes = []
"""
ENCODES = """
import numpy as np
from nla_engine.codec.rows import Codec
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


WHERE = "import nla_engine.ops; from triton import knobs; print(knobs.cache.dir)"


def kept_at(monkeypatch: pytest.MonkeyPatch, writable: bool, **environment: str) -> str | None:
    """TRITON_CACHE_DIR as it is afterwards."""
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    find_place()
    return os.environ.get("TRITON_CACHE_DIR")


def test_kernels_are_kept_elsewhere_only_where_home_is_read_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert kept_at(monkeypatch, True, HOME=str(tmp_path / "none")) is None
    assert kept_at(monkeypatch, False, HOME="/", TRITON_CACHE_DIR="/mine") == "/mine"
    assert kept_at(monkeypatch, False, HOME="/", TRITON_HOME="/mine") is None
    place = kept_at(monkeypatch, False, HOME=str(tmp_path / "none"))
    assert place and Path(place).parent == tmp_path and Path(place).stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_a_home_of_somebody_else(tmp_path: Path) -> None:
    """Without capabilities, as a batch job under another user is; what was made is gone at the end."""
    os.chown(tmp_path, 65534, 65534)
    tmp_path.chmod(0o555)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [*drop, sys.executable, "-c", WHERE],
        capture_output=True,
        text=True,
        timeout=250,
        env={**environment, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.strip())
    assert place.name.startswith("nla_engine-kernels-") and not place.exists()
