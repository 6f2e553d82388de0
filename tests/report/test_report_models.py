"""The page says from what the models of a table were put together, and what the vectors went through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from commands import LAYER, call, explain, roundtrip, score
from maps import save_map
from report_samples import Said, Text, make_run
from tiny import D

from nla_engine.report import write_report
from nla_engine.report.data import Explained
from nla_engine.report.facts import facts
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

HOSTILE = "<img src=x onerror='window.pwned=1'>"


def words_of(store: CaptureStore, table: Path) -> dict[str, str]:
    return dict(facts(store, Explained.read(store, table))["Words"])


def test_adapters_their_bases_and_maps(adapted: Path, tmp_path: Path) -> None:
    save_map(tmp_path / "enc.safetensors", np.eye(D))
    out, base = tmp_path / "x.parquet", adapted / "base"
    given = {
        "av_base": base,
        "injection": "add@1",
        "norm_match": True,
        "av_map": tmp_path / "enc.safetensors",
    }
    assert call(*roundtrip(adapted, out, ar_base=base, limit=3, **given)).code == 0
    store, metadata = CaptureStore.open(adapted / "run.zarr"), read_metadata(out)
    words = words_of(store, out)
    for role in ("AV", "AR"):
        assert words[f"base of the {role}"] == f"{base.parent.name}/base"
        checksum = metadata[f"{role.lower()}_adapter"]
        assert words[f"adapter of the {role}"] == f"merged into its base, checksum {checksum}"
    enters = words["a learned map before the AV"]
    assert (
        enters.endswith(f"/enc.safetensors, checksum {metadata['av_map']}")
        and "a learned map behind the AR" not in words
    )
    assert words["injection"] == "add@1, norm: that of what is there"
    write_report(store, out, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text("utf-8")
    assert (
        f"<dt>adapter of the AV</dt><dd>merged into its base, checksum {metadata['av_adapter']}</dd>" in page
    )
    texts = tmp_path / "e.parquet"
    assert call(*explain(adapted, texts, limit=3, **given)).code == 0
    assert call(*score(adapted, tmp_path / "s.parquet", texts, ar_base=base)).code == 0
    scored = words_of(
        store, tmp_path / "s.parquet"
    )  # what explain recorded of the AV goes on into the scores
    told = {name: value for name, value in words.items() if "AV" in name or "AR" in name}
    assert {name: scored[name] for name in told} == told


def test_a_released_pair_has_nothing_to_say_of_them(root: Path) -> None:
    words = words_of(CaptureStore.open(root / "run.zarr"), root / "explained.parquet")
    assert not any(
        word in name for name in words for word in ("base", "adapter", "map", "whitening", "vectors of")
    )
    assert int(read_metadata(root / "explained.parquet")["layer"]) == LAYER


def test_names_are_escaped(tmp_path: Path) -> None:
    """Everything that a table's metadata may hold reaches the page as text."""
    run = {"slots": "L1@0", "prompt": HOSTILE, "prefill": HOSTILE, "av_map": HOSTILE, "whitening": HOSTILE}
    metadata = {
        f"{role}_{key}": HOSTILE
        for role in ("av", "ar")
        for key in ("base", "base_revision", "adapter", "map", "whitening")
    }
    further = {"3": {"variance": 0.5}}
    store, table = make_run(
        tmp_path,
        [Text(["a"], {0: [Said("x")]})],
        run=run,
        **metadata,
        av_base_in_training="4bit",
        further_layers=further,
    )
    told = facts(store, Explained.read(store, table))
    words = dict(told["Words"])
    assert words["base of the AV"] == f"{HOSTILE} at {HOSTILE} (in training its weights had 4 bits)"
    assert words["whitening before the AV"] == f"{HOSTILE}, checksum {HOSTILE}"
    assert words["a learned map behind the AR"] == f"the file beside the weights, checksum {HOSTILE}"
    assert (words["vectors of each prompt"], words["prompt of the user"]) == ("L1@0", HOSTILE)
    assert dict(told["Scores"])["further layers"].startswith("3: in the table only, as cos_L3")
    write_report(store, table, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text("utf-8")
    assert HOSTILE not in page and "&lt;img src=x" in page
