"""Sites inside blocks: what the engine taps there is what forward hooks on plain transformers see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import wrong_by_any_rounding
from tiny import MOE, byte_tokenizer, language_model, tiny_model

from nla_engine.engine import fused
from nla_engine.engine.runner import Runner
from nla_engine.engine.tap import NoTap
from nla_engine.errors import EngineError, RequestError
from nla_engine.models import load
from nla_engine.models.places import find_places
from nla_engine.ops.backends import Kernels
from nla_engine.sites import ATTN_OUT, EMBEDDINGS, MLP_OUT, PARTS, RESID_MID, RESID_POST, Site, crossed

#: Of each kind of block: what adds to the residual stream, and which module reads it in between.
USUAL = ("self_attn", "mlp", "post_attention_layernorm")
NORMED = ("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm")
PARALLEL = ("self_attn", "mlp", None)
#: Relative L2 difference per row that another order of sums may make.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def tiny(name: str) -> Callable[[], load.LanguageModel]:
    return lambda: load.wrap_model(tiny_model(name, layers=3), byte_tokenizer(), name=name)


FAMILIES = {
    "llama": (tiny("llama"), USUAL),
    "qwen2": (tiny("qwen2"), USUAL),
    "qwen3": (tiny("qwen3"), USUAL),
    "gemma2": (
        lambda: language_model("Gemma2Config", head_dim=16, num_hidden_layers=3, sliding_window=64),
        NORMED,
    ),
    "gemma3": (tiny("gemma3_text"), NORMED),
    "qwen2_moe": (
        lambda: language_model("Qwen2MoeConfig", **MOE | {"use_sliding_window": False}, num_hidden_layers=3),
        USUAL,
    ),
    "phi3": (lambda: language_model("Phi3Config", num_hidden_layers=3), USUAL),
    "phi": (lambda: language_model("PhiConfig", num_hidden_layers=3), PARALLEL),
}


class Kept(NoTap):
    """Keeps every state that it is shown, by site, slot and position."""

    def __init__(self, *layers: Site) -> None:
        self.layers = layers
        self.seen: dict[Site, dict[tuple[int, int], torch.Tensor]] = {site: {} for site in layers}

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        for row, where in zip(
            hidden.clone().float(), zip(slot.tolist(), position.tolist(), strict=True), strict=True
        ):
            self.seen[layer][where] = row

    def rows(self, site: Site, slot: int, size: int) -> torch.Tensor:
        return torch.stack([self.seen[site][slot, position] for position in range(size)])


def hooked(
    lm: load.LanguageModel, names: tuple[Any, ...], ids: list[int], layer: int
) -> dict[str, torch.Tensor]:
    """What hooks see at one block when plain transformers reads ids: float32 [T, d] by part."""
    lm.model.set_attn_implementation("eager")
    seen: dict[str, torch.Tensor] = {}
    block = lm.blocks[layer]

    def keep(part: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[part] = output[0].detach().clone().float()

        return hook

    def read(part: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            seen[part] = (args[0] if args else kwargs["hidden_states"])[0].detach().clone().float()

        return hook

    attention, mlp, middle = names
    with ExitStack() as hooks, torch.inference_mode():
        for part, name in ((ATTN_OUT, attention), (MLP_OUT, mlp)):
            hooks.callback(getattr(block, name).register_forward_hook(keep(part)).remove)
        hooks.callback(block.register_forward_hook(keep(RESID_POST)).remove)
        if middle:
            module = getattr(block, middle)
            hooks.callback(module.register_forward_pre_hook(read(RESID_MID), with_kwargs=True).remove)
        first = lm.blocks[0].register_forward_pre_hook(read(EMBEDDINGS), with_kwargs=True)
        hooks.callback(first.remove)
        lm.decoder(input_ids=torch.tensor([ids]), use_cache=False)
    return seen


def apart(own: torch.Tensor, want: torch.Tensor) -> float:
    return float(((own - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_what_hooks_on_plain_transformers_see(
    family: str, dtype: torch.dtype, kernels: str, rng: np.random.Generator
) -> None:
    """In a prompt, after a shared prefix, in decode steps and in a slot that is used again; at each block alone."""
    make, names = FAMILIES[family]
    lm = make()
    lm.model.to(dtype)
    prefix = rng.integers(3, 250, 5).tolist()
    given = [prefix + rng.integers(3, 250, size).tolist() for size in (9, 4, 12)]
    parts = [part for part in PARTS if part != RESID_MID or names[2]]
    last = len(lm.blocks) - 1
    found = []
    tap = Kept(*crossed((0, last), parts))
    decoded = 3
    with Runner(lm, slots=2, length=20, prefix=prefix, tap=tap, kernels=Kernels(kernels)) as runner:
        if kernels == "reference":
            assert not runner._fused
        for slots in ((0, 1), (2,)):  # the third sequence takes the slot of the first
            tap.seen = {site: {} for site in tap.layers}
            runs = [(slot % 2, len(prefix), given[slot][len(prefix) : -decoded]) for slot in slots]
            runner.prefill([run for run in runs if run[2]])
            for step in range(decoded):
                ids = torch.tensor([given[slot][step - decoded] for slot in slots])
                at = torch.tensor([len(given[slot]) + step - decoded for slot in slots])
                runner.decode(ids, torch.tensor([slot % 2 for slot in slots]), at, 20)
            for slot in slots:
                for site in tap.layers:
                    at = range(len(prefix), len(given[slot]))
                    found.append((site, slot, torch.stack([tap.seen[site][slot % 2, p] for p in at])))
    for site, slot, own in found:
        routed = site.layer > 0 or site.part in (MLP_OUT, RESID_POST)
        if routed and family == "qwen2_moe" and dtype == torch.bfloat16:
            continue  # rounding may send a token to other experts

        def wrong(site=site, slot=slot, own=own) -> bool:
            whole = hooked(lm, names, given[slot], site.layer)[site.part][len(prefix) :]
            return not apart(own, whole) < CLOSE[dtype] * (1 if site.layer == 0 else 3)

        assert not wrong_by_any_rounding(lm, wrong), site


@pytest.mark.parametrize("part", [ATTN_OUT, RESID_MID, MLP_OUT])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_site_alone_changes_no_state(family: str, part: str, rng: np.random.Generator) -> None:
    """Of a fused block whose other products still add in place."""
    make, names = FAMILIES[family]
    lm, ids = make(), rng.integers(3, 250, 12).tolist()
    want = hooked(lm, names, ids, 1)
    site = Site(1, part)
    tap = Kept(site)
    with Runner(lm, slots=1, length=13, kernels=Kernels("fused")) as runner:
        plain = runner.prefill([(0, 0, ids)])
    with Runner(lm, slots=1, length=13, tap=tap, kernels=Kernels("fused")) as runner:
        states = runner.prefill([(0, 0, ids)])
        assert [bool(block.forward.taps) for block in runner._fused] == [False, True, False]
    assert apart(states, plain) < 1e-5
    assert apart(tap.rows(site, 0, 12), want[part]) < 2e-5


def test_a_block_that_adds_up_differently_has_no_sites(rng: np.random.Generator) -> None:
    phi = FAMILIES["phi"][0]()
    with pytest.raises(
        RequestError, match="PhiConfig: block 2 computes attention and MLP in parallel.*resid_mid out"
    ):
        find_places(phi, [Site(2, RESID_MID)])
    scaled = language_model("GraniteConfig", residual_multiplier=0.5)
    with pytest.raises(
        RequestError, match="GraniteConfig: block 1 does not return the sum.*its attn_out is not known"
    ):
        Runner(scaled, slots=1, length=8, tap=Kept(Site(1, ATTN_OUT)))
    with Runner(scaled, slots=1, length=8, tap=Kept(Site(1), Site.at(0, EMBEDDINGS))) as runner:
        runner.prefill([(0, 0, [5, 6, 7])])


@pytest.mark.parametrize("part", [ATTN_OUT, MLP_OUT])
def test_a_site_that_the_fused_block_gets_wrong_stops_the_run(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is right all the same, so only the check of the site itself can see it."""

    def spoiled(block: Any, x: torch.Tensor, product: torch.Tensor, norm: Any, part: str) -> torch.Tensor:
        block._show(part, x + product)
        return x + product

    monkeypatch.setattr(fused.FusedBlock, "_add_shown", spoiled)
    with pytest.raises(EngineError, match=f"layer 1 {part} of the engine differs from transformers' own by"):
        Runner(tiny("llama")(), slots=1, length=8, tap=Kept(Site(1, part)), kernels=Kernels("fused"))


def test_a_number_is_the_output_of_a_block() -> None:
    """Stores and programs that name layers by number mean the same rows as ever."""
    assert Site(20) == 20 and {20: "x"}[Site(20)] == "x" and {Site(20): "x"}[np.int64(20)] == "x"
    assert Site(20) != Site(20, ATTN_OUT) and Site(20, ATTN_OUT) != 20 and Site.at(3, EMBEDDINGS) != 0
    sites = crossed((2, 0), PARTS)
    assert [str(site) for site in sites[:5]] == ["embeddings", "0_attn_out", "0_resid_mid", "0_mlp_out", "0"]
    assert len(sites) == 9 and [Site.parse(str(site)) for site in sites] == list(sites)
    for text in ("", "x", "-1", "3_resid_post", "3_embeddings", "3_attn_out ", "٣", True, None):
        with pytest.raises(ValueError, match="no layer and no site"):
            Site.parse(text)
