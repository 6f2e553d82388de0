"""Sites beside the blocks' outputs, from the command to the store: against forward hooks on plain transformers."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from commands import call, capture, contents
from tiny import save_model, write_prompts

from nla_engine.capture import staging
from nla_engine.capture.audit import audit
from nla_engine.codec.rows import SINK_FACTOR, Codec, bf16_values
from nla_engine.errors import RequestError, StoreError
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.sites import ATTN_OUT, EMBEDDINGS, MLP_OUT, PARTS, RESID_MID, RESID_POST, Site
from nla_engine.store import CaptureStore
from nla_engine.store.exchange.export import export
from nla_engine.store.exchange.importing import import_rows
from nla_engine.store.exchange.merge import merge

ALL = ",".join(PARTS)
GROUPS = [
    "embeddings",
    *(f"layer_{k}{part}" for k in (0, 2) for part in ("_attn_out", "_resid_mid", "_mlp_out", "")),
]


def model(root: Path) -> LanguageModel:
    return load_model(str(root / "base"), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a store of every site of layers 0 and 2."""
    root = tmp_path_factory.mktemp("sites")
    save_model(root / "base", "gemma3_text")
    write_prompts(root / "prompts.jsonl", 6)
    done = call(
        *capture(
            root,
            root / "run.zarr",
            layer="0,2",
            sites=ALL,
            codec="bf16",
            positions="all",
            kernels="fused",
            batch_size=2,
        ),
        "--json",
    )
    assert done.code == 0, done.err
    first, second = ([f"{k}_attn_out", f"{k}_resid_mid", f"{k}_mlp_out", k] for k in (0, 2))
    assert done.json["layers"] == ["embeddings", *first, *second]
    return root


def hooked(lm: LanguageModel, tokens: np.ndarray) -> dict[Site, np.ndarray]:
    """Every site of layers 0 and 2 of one sequence: float32 [T, d]."""
    lm.model.set_attn_implementation("eager")
    seen: dict[Site, np.ndarray] = {}

    def keep(site: Site, states: torch.Tensor) -> None:
        seen[site] = states[0].numpy().copy()

    with ExitStack() as hooks, torch.inference_mode():

        def on(module: Any, site: Site, reads: bool = False) -> None:
            if reads:
                handle = module.register_forward_pre_hook(
                    lambda _m, args, kwargs: keep(site, args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            else:
                handle = module.register_forward_hook(
                    lambda _m, _i, out: keep(site, out[0] if isinstance(out, tuple) else out)
                )
            hooks.callback(handle.remove)

        on(lm.blocks[0], Site.at(0, EMBEDDINGS), reads=True)
        for layer in (0, 2):
            block = lm.blocks[layer]
            on(block, Site(layer))
            on(block.post_attention_layernorm, Site(layer, ATTN_OUT))
            on(block.pre_feedforward_layernorm, Site(layer, RESID_MID), reads=True)
            on(block.post_feedforward_layernorm, Site(layer, MLP_OUT))
        lm.decoder(input_ids=torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return seen


def test_every_site_is_read_by_plain_zarr(root: Path) -> None:
    """Prompts and generated tokens, slots used again; the numbers of another library, decoded by hand."""
    group = zarr.open_group(root / "run.zarr", mode="r")
    assert sorted(name for name, _ in group.groups()) == sorted([*GROUPS, "rows", "sequences", "vocabulary"])
    about = group.attrs["nla_engine"]
    assert about["format_version"] == 2 and set(about["site_conventions"]) == set(PARTS) - {RESID_POST}
    lm, store = model(root), CaptureStore.open(root / "run.zarr")
    assert store.layers == (0, 2) and len(store.sites) == 9
    for sequence in store.iter_sequences():
        position = group["rows/position"][sequence.rows]
        for site, states in hooked(lm, sequence.tokens).items():
            name = (
                "embeddings"
                if site.part == EMBEDDINGS
                else f"layer_{site.layer}" + ("" if site.part == RESID_POST else f"_{site.part}")
            )
            stored = bf16_values(group[f"{name}/codes"][sequence.rows])
            want = states[position]
            assert np.abs(stored - want).max() <= 0.01 * np.abs(want).max(), site
            own = store.layer(site.layer, site=site.part)
            assert np.array_equal(own[sequence.rows], stored)
            assert np.allclose(own.norm()[sequence.rows], np.linalg.norm(want, axis=1), rtol=1e-3)


@pytest.mark.parametrize("ring_bytes", [staging.RING_BYTES, 1])
def test_transformers_own_generation_gives_the_same_sites(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring_bytes: int
) -> None:
    """Prompts in one pass, replies token by token, and with rows that leave after every other token."""
    monkeypatch.setattr(staging, "RING_BYTES", ring_bytes)
    given = {"layer": "0,2", "sites": ALL, "codec": "bf16", "positions": "all"}
    done = call(*capture(root, tmp_path / "lib.zarr", kernels="library", batch_size=4, **given))
    assert done.code == 0, done.err
    lm, store = model(root), CaptureStore.open(tmp_path / "lib.zarr")
    fused = CaptureStore.open(root / "run.zarr")
    assert store.sites == fused.sites
    for sequence in store.iter_sequences():
        position = store.column("position")[sequence.rows]
        for site, states in hooked(lm, sequence.tokens).items():
            want, rows = states[position], store.layer(site)[sequence.rows]
            assert np.abs(rows - want).max() <= 0.01 * np.abs(want).max(), site
        assert fused.sequence(sequence.number).tokens.tolist() == sequence.tokens.tolist()


def test_readers_name_a_site_or_mean_the_output(root: Path) -> None:
    store = CaptureStore.open(root / "run.zarr")
    assert store.layer(2).site == 2 and np.array_equal(
        store.layer(2)[:], store.layer(2, site="resid_post")[:]
    )
    assert store.layer(0, site="embeddings").site == store.layer(7, site="embeddings").site
    assert store.chosen_layer(None, "embeddings") == Site.at(0, EMBEDDINGS) and store.chosen_layer(2) == 2
    assert "norm_2_attn_out" in store.fields and len(
        store.where("norm_2_attn_out > 0 and norm_embeddings > 0")
    )
    assert "layers 0, 2; embeddings; layer 0 attn_out" in repr(store)
    assert "layer 2 mlp_out" in repr(store.layer(2, site="mlp_out"))
    with pytest.raises(StoreError, match="layer 1 attn_out is not in .*: it has embeddings, 0_attn_out, .*2"):
        store.layer(1, site="attn_out")
    with pytest.raises(StoreError, match="'attn' is no site: choose one of resid_post"):
        store.layer(2, site="attn")
    with pytest.raises(StoreError, match="holds layers 0, 2: name one"):
        store.chosen_layer(None)
    shown = call("info", root / "run.zarr")
    assert "2_attn_out" in shown.out and shown.code == 0


def test_each_site_has_its_own_sinks_and_error(root: Path) -> None:
    store, lm = CaptureStore.open(root / "run.zarr"), model(root)
    prompts = [s.tokens[: s.prompt_size] for s in store.iter_sequences()]
    rows: dict[Site, list[np.ndarray]] = {site: [] for site in store.sites}
    for tokens in prompts:
        for site, states in hooked(lm, tokens).items():
            rows[site].append(states)
    for site in store.sites:
        norm = np.linalg.norm(np.concatenate(rows[site]).astype(np.float64), axis=1)
        assert store.sink_norm[site] == pytest.approx(SINK_FACTOR * np.median(norm), rel=0.01)
        assert store.codec_error[site]["mean"] < 0.01
    assert len({store.sink_norm[site] for site in store.sites}) == 9


def test_verify_reads_every_site_again(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = call("verify", root / "run.zarr", "--model", root / "base", "--json")
    assert done.code == 0, done.out
    names = {check["name"] for check in done.json["checks"]} if "checks" in done.json else set()
    store, lm = CaptureStore.open(root / "run.zarr"), model(root)
    names |= {check.name for check in audit(store, lm)}
    for name in (
        "embeddings: rows are the input of block 0",
        "layer 2 attn_out: rows are the attn_out of block 2",
        "layer 2 mlp_out: rows fit block 2 better than block 1",
        "layer 2: rows are the output of block 2",
    ):
        assert name in names
    from nla_engine.capture import tap

    right = tap.RowTap.__call__

    def wrong(self: Any, layer: Site, hidden: torch.Tensor, *where: torch.Tensor) -> None:
        right(self, layer, hidden * 1.3 if layer == Site(2, ATTN_OUT) else hidden, *where)

    monkeypatch.setattr(tap.RowTap, "__call__", wrong)
    bad = tmp_path / "bad.zarr"
    assert call(*capture(root, bad, layer=2, sites="attn_out,resid_post")).code == 0
    found = [check.name for check in audit(CaptureStore.open(bad), lm) if not check.ok]
    assert found == ["layer 2 attn_out: rows are the attn_out of block 2"]


def test_a_site_is_exported_imported_and_merged_as_itself(root: Path, tmp_path: Path) -> None:
    store = CaptureStore.open(root / "run.zarr")
    for to, name in (("parquet", "x.parquet"), ("safetensors", "x.safetensors")):
        for site in (Site(2, MLP_OUT), Site.at(0, EMBEDDINGS)):
            out, back = tmp_path / f"{site}-{name}", tmp_path / f"{site}-{to}.zarr"
            export(store, to, out, layer=site.layer, site=site.part)
            made = import_rows(out, back)
            assert made.layer == str(site)
            again = CaptureStore.open(back)
            assert again.sites == (site,) and np.array_equal(again.layer(site)[:], store.layer(site)[:])
            assert again.chosen_layer(None) == site and again.layers == ()
            with pytest.raises(RequestError, match=f"its vectors are {site.part}, not attn_out"):
                import_rows(out, tmp_path / "no.zarr", site="attn_out")
    with pytest.raises(RequestError, match="format nla has no word for attn_out"):
        export(store, "nla", tmp_path / "x.nla.parquet", layer=2, site="attn_out")
    done = call(
        "export",
        root / "run.zarr",
        "--to",
        "npy",
        "--layer",
        2,
        "--site",
        "attn_out",
        "--out",
        tmp_path / "x.npy",
    )
    assert done.code == 0 and np.array_equal(np.load(tmp_path / "x.npy"), store.layer(2, "attn_out")[:])
    made = import_rows(tmp_path / "x.npy", tmp_path / "npy.zarr", layer=2, site="attn_out")
    assert made.layer == "2_attn_out"
    for number in (1, 2):
        assert call(*capture(root, tmp_path / f"{number}.zarr", layer=2, sites="attn_out")).code == 0
    joined = merge([tmp_path / "1.zarr", tmp_path / "2.zarr"], tmp_path / "both.zarr")
    assert (
        joined.sites == (Site(2, ATTN_OUT),)
        and joined.rows == 2 * CaptureStore.open(tmp_path / "1.zarr").rows
    )


def test_damaged_rows_of_a_site_are_found_and_dropped(root: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "bad.zarr"
    shutil.copytree(root / "run.zarr", bad)
    shard = bad / "layer_2_attn_out" / "codes" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(bytes(data))
    done = call("verify", bad)
    assert done.code == 1 and "layer_2_attn_out/codes" in done.out + done.err
    (bad / "embeddings" / "exact_row" / "c" / "0").unlink(missing_ok=True)
    repaired = call("verify", bad, "--repair")
    assert "layer_2_attn_out/codes" in repaired.out + repaired.err


def test_a_store_of_outputs_alone_is_as_it_always_was(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.zarr"
    assert call(*capture(root, out, layer="0,2")).code == 0
    about = json.loads((out / "zarr.json").read_text())["attributes"]["nla_engine"]
    assert about["format_version"] == 2 and about["layers"] == [0, 2] and "site_conventions" not in about
    assert about["layer_convention"] == (
        "layer K is the residual stream after decoder block K (both residual adds done, before any final norm): "
        "transformers hidden_states[K+1] for every block but the last. A row belongs to the token that was read."
    )
    assert set(about["sink_norm"]) == set(about["commit"]["exact"]) == {"0", "2"}
    assert "sites" not in about["options"]


def test_resuming_takes_the_same_sites(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_engine.capture import run as stage

    whole, out = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    given = {"layer": 2, "sites": "attn_out,embeddings", "batch_size": 2}
    assert call(*capture(root, whole, **given)).code == 0
    right, calls = stage.Appender.add, []

    def cut(self: Any, ended: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        right(self, ended)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Appender, "add", cut)
        assert call(*capture(root, out, **given)).code != 0
    done = call(*capture(root, out, **{**given, "sites": "attn_out", "resume": True}))
    assert done.code == 1 or done.code == 2
    assert "sites was" in done.err
    assert call(*capture(root, out, **given, resume=True)).code == 0
    one, two = CaptureStore.open(whole), CaptureStore.open(out)
    assert one.sites == two.sites == (Site.at(0, EMBEDDINGS), Site(2, ATTN_OUT))
    for site in one.sites:
        assert np.allclose(one.layer(site)[:], two.layer(site)[:], atol=1e-3)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("attn", "--sites is 'attn': it must be of resid_post, resid_mid, attn_out, mlp_out, embeddings"),
        ("", "--sites is ''"),
        ("resid_post,", "--sites is 'resid_post,'"),
    ],
)
def test_a_site_that_there_is_not(root: Path, tmp_path: Path, sites: str, message: str) -> None:
    before = contents(root)
    done = call(*capture(root, tmp_path / "run.zarr", sites=sites))
    assert done.code == 2 and message in done.err and contents(root) == before
    assert not (tmp_path / "run.zarr").exists()


def test_a_model_without_the_site_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    from tiny import byte_tokenizer, language_model

    phi = language_model("PhiConfig")
    phi.model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write_prompts(tmp_path / "prompts.jsonl", 2)
    done = call(*capture(tmp_path, tmp_path / "run.zarr", layer=1, sites="resid_mid"))
    assert done.code == 2 and "block 1 computes attention and MLP in parallel" in done.err
    assert not (tmp_path / "run.zarr").exists()
    assert call(*capture(tmp_path, tmp_path / "run.zarr", layer=1, sites="attn_out,mlp_out")).code == 0


def test_the_codec_holds_a_site_as_it_holds_a_layer(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    given = {
        "layer": 2,
        "sites": "attn_out,resid_post",
        "positions": "all",
        "batch_size": 2,
        "kernels": "fused",
    }
    assert call(*capture(root, out, **given)).code == 0
    store, exact = CaptureStore.open(out), CaptureStore.open(root / "run.zarr")
    assert store.codec == Codec.named("int8", store.d_model)
    for site in store.sites:
        own, want = store.layer(site)[:], exact.layer(site)[:]
        error = np.linalg.norm(own - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() < 0.03


@pytest.mark.parametrize("sites", ["embeddings", "attn_out,mlp_out"])
def test_text_is_read_up_to_the_site(root: Path, tmp_path: Path, sites: str) -> None:
    """With --corpus, the pass ends after the deepest block that has one."""
    (tmp_path / "p.txt").write_text("The harbour froze.\nNo ship could leave.\nSpring came late.\n")
    out = tmp_path / "run.zarr"
    given = {
        "prompts": tmp_path / "p.txt",
        "layer": 2,
        "sites": sites,
        "corpus": True,
        "max_new_tokens": None,
    }
    assert call(*capture(root, out, **given, codec="bf16")).code == 0
    store, lm = CaptureStore.open(out), model(root)
    for sequence in store.iter_sequences():
        states = hooked(lm, sequence.tokens)
        for site in store.sites:
            own, want = store.layer(site)[sequence.rows], states[site]
            assert np.abs(own - want).max() <= 0.01 * np.abs(want).max(), site
