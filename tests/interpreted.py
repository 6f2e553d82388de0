"""Where the tests of Triton kernels run: on a GPU, or in a process in which Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
_can_run = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="needs a GPU or TRITON_INTERPRET=1 (see test_in_the_interpreter)",
)
starts_the_interpreter = pytest.mark.skipif(
    DEVICE == "cuda" or INTERPRETED, reason="the kernels run here directly"
)


#: The marks of what launches Triton kernels: a test (see `runs_kernels`), or one of its parameters.
LAUNCHES = (pytest.mark.kernels, _can_run)


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """A test that launches Triton kernels."""
    for mark in LAUNCHES:
        test = mark(test)
    return test


def run_in_the_interpreter(file: str) -> None:
    """Every kernel test of a file, in a process of its own where Triton interprets.

    Without what conftest.py imports, which takes longer than many of these tests: their fixtures are in fresh_seed.py.
    """
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernels", file]
    done = subprocess.run(
        [*command, "--noconftest", "-p", "fresh_seed", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=Path(tests).parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
