"""What --ray refuses before any cluster is asked."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from commands import call, capture, check_refused

from nla_engine.cluster import ray_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray": "here"}, "must be host:port of the cluster's head, or auto"),
        ({"ray": "ray://a:1"}, "must be host:port"),
        ({"ray": "auto", "shard": "1/2"}, "--ray and --shard exclude each other"),
        ({"ray": "auto", "dry_run": True}, "do not work on a Ray cluster"),
        ({"ray": "auto", "workers": 2}, "places its own workers"),
        ({"ray": "auto", "keep_partial": True}, "do not work on a Ray cluster"),
        ({"ray": "auto", "prompts": "-"}, "standard input"),
        ({"ray_workers": 2}, "are for a Ray cluster"),
        ({"ray": "auto", "ray_units": 0}, "must be 1 or more"),
    ],
)
def test_options_that_do_not_go_together(root: Path, tmp_path: Path, changes: dict, message: str) -> None:
    check_refused(call(*capture(root, tmp_path / "run.zarr", **changes)), message)
    assert not list(tmp_path.iterdir())


def test_without_ray_the_extra_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    check_refused(call(*capture(root, tmp_path / "run.zarr", ray="auto")), r"pip install 'nla-engine\[ray\]'")


def test_an_address_where_nothing_listens(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        ran = call(*capture(root, tmp_path / "run.zarr", ray=f"127.0.0.1:{taken.getsockname()[1]}"))
    check_refused(ran, r"no Ray answers there \(")  # at once, not after so many seconds


def test_an_address_where_something_else_listens(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts, and says nothing."""
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setattr(ray_run, "ANSWER_SECONDS", 3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = call(*capture(root, tmp_path / "run.zarr", ray=f"127.0.0.1:{other.getsockname()[1]}"))
    check_refused(ran, "no Ray answers there in 3 s")
    assert not list(tmp_path.iterdir())
