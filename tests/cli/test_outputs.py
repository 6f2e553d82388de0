"""Where nothing can be written is said before any model is loaded; a checkpoint without a tokenizer is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import call, capture, check_refused, explain, roundtrip, written

from nla_engine.errors import RequestError
from nla_engine.models import load
from nla_engine.store.directory import check_directory, check_parents

Words = Callable[[Path, Path], list[object]]

#: Commands that write to a place, given the directory of the models.
WRITERS: dict[str, Words] = {
    "capture": lambda root, place: capture(root, place / "x.zarr"),
    "roundtrip": lambda root, place: roundtrip(root, place / "deep" / "x.parquet"),
    "explain": lambda root, place: explain(root, place / "x.parquet"),
    "lens": lambda root, place: [
        *("lens", root / "run.zarr", "--model", root / "base", "--out", place / "x.parquet"),
    ],
    "report": lambda root, place: [
        *("report", root / "run.zarr", "--explained", root / "explained.parquet", "--out", place / "x.html"),
    ],
    "export": lambda root, place: ["export", root / "run.zarr", "--to", "npy", "--out", place / "x.npy"],
    "demo": lambda root, place: ["demo", "--out", place / "x"],
    "study": lambda root, place: ["study", "multiplication", "--out", place / "x"],
}


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read before the place is refused."""
    monkeypatch.setattr(load, "load_model", lambda *args, **how: pytest.fail("a model was loaded"))


@pytest.fixture
def user() -> Iterator[None]:
    """Not root, who may write anywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("command", WRITERS)
def test_below_a_file(command: str, root: Path, tmp_path: Path) -> None:
    place = written(tmp_path / "notes", "mine")
    check_refused(call(*WRITERS[command](root, place)), "notes is no directory: choose another name")
    assert place.read_text() == "mine" and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("command", WRITERS)
def test_without_the_right(command: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **how: path != locked and real(path, mode))
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    check_refused(
        call(*WRITERS[command](root, locked)), "no right to write in .*locked: choose another place"
    )
    assert not list(locked.iterdir())


@pytest.mark.usefixtures("user")
def test_the_right_is_that_of_the_user() -> None:
    with pytest.raises(RequestError, match="no right to write in /"):
        check_parents(Path("/x.parquet"))
    with pytest.raises(RequestError, match="no right to write in /"):
        check_directory(Path("/deep/x"))
    check_parents(Path("/tmp/nowhere/deep/x.parquet"))
    check_directory(Path("/tmp"))


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)], ids=["none", "config alone"])
@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_a_checkpoint_without_a_tokenizer(
    left: tuple[str, ...], family: str, root: Path, tmp_path: Path
) -> None:
    """For some families the library makes an empty tokenizer, for others it raises."""
    model = shutil.copytree(root / "base", tmp_path / "base")
    config = model / "config.json"
    config.write_text(config.read_text().replace("qwen2", family.lower()).replace("Qwen2", family))
    for file in model.glob("tokenizer*"):
        if file.name not in left:
            file.unlink()
    command = capture(root, tmp_path / "x.zarr")
    check_refused(
        call("capture", model, *command[2:]), "base: holds no tokenizer: copy the model.s tokenizer"
    )
