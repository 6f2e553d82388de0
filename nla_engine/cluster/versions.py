"""What a worker must have in common with the process that started the run."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nla_engine

_PACKAGES = ("torch", "transformers", "numpy", "zarr")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of packages that change rows, and a hash of this package's own code."""
    digest, root = hashlib.sha256(), Path(nla_engine.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    found = {"nla_engine": f"{version('nla-engine')} (code {digest.hexdigest()[:12]})"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return {**found, "python": ".".join(platform.python_version_tuple()[:2])}


def differing(here: dict[str, str], there: dict[str, str]) -> str:
    """In words, what differs; empty if nothing does."""
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
