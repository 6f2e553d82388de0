"""A bucket on an S3 server of this machine (moto), in a process of its own: what a store on S3 costs this process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from unittest import mock

_SECONDS_TO_START = 60


def missing() -> list[str]:
    """The packages that a server, or a store on it, needs and that are not installed."""
    return [name for name in ("obstore", "moto", "flask") if find_spec(name) is None]


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """The URL of an empty bucket, and its server's address and keys in the environment. It lies in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    try:
        _make_bucket(server, f"{address}/growth")
        with mock.patch.dict(os.environ, environment):
            yield "s3://growth"
    finally:
        server.terminate()
        server.wait()


def _make_bucket(server: subprocess.Popen[bytes], url: str) -> None:
    """Once the server answers. RuntimeError if it ends, or does not answer."""
    last = time.monotonic() + _SECONDS_TO_START
    while server.poll() is None and time.monotonic() < last:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        time.sleep(0.1)
    raise RuntimeError("the S3 server of moto does not start")
