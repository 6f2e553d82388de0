"""Sites inside fused blocks on a GPU, where the tap of a captured graph runs beside the work that follows."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture import tap
from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.engine.generator import Generator
from nla_engine.engine.pass_graphs import SWITCH
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.places import find_places
from nla_engine.sites import ATTN_OUT, EMBEDDINGS, MLP_OUT, PARTS, RESID_MID, RESID_POST, Site, crossed

pytestmark = pytest.mark.gpu
SLOTS, NEW = 64, 20


def language_model(architecture: str, dtype: torch.dtype) -> LanguageModel:
    model = tiny_model(architecture).to("cuda", dtype)
    return wrap_model(model, byte_tokenizer(), name=architecture)


def captured(lm: LanguageModel, sites: tuple[Site, ...]) -> dict[int, Completion]:
    """Two sequences per slot, so that every slot is used again."""
    keeper = tap.RowTap(
        sites, Codec.named("bf16", lm.d_model), tap.RowRange.parse("all"), rows_per_slot=31,
        sink_norm=dict.fromkeys(sites, math.inf), device=lm.device,
    )  # fmt: skip
    stop = StopAutomaton([b""] * lm.vocab_size, ())
    work = [Request(i, tuple(range(1 + i, 12 + i)), NEW) for i in range(2 * SLOTS)]
    with Runner(lm, slots=SLOTS, length=31, tap=keeper) as runner:
        assert runner._fused
        generator = Generator(runner, max_new_tokens=NEW, stop=stop, read_last=True)
        generator.prepare()
        return {ended.request.id: ended for ended in generator.run(iter(work))}


def keep(seen: dict[Site, torch.Tensor], site: Site, hidden: torch.Tensor) -> None:
    seen[site] = hidden[0].clone()


@pytest.mark.parametrize("parts", [tuple(PARTS), *((part,) for part in PARTS)], ids=["all", *PARTS])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_sites_keep_their_bits_however_late_the_tap(
    architecture: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed by 0.1 ms per site, the tap in a graph reads what it reads outside: nothing is overwritten or freed."""
    lm = language_model(architecture, torch.bfloat16)
    sites, encode = crossed(range(len(lm.blocks)), parts), tap.encode_rows

    def late(*given: Any, **how: Any) -> None:
        torch.cuda._sleep(200_000)
        encode(*given, **how)

    monkeypatch.setattr(tap, "encode_rows", late)
    monkeypatch.setenv(SWITCH, "0")  # prompt passes of another size may round differently
    kept = []
    for graphs in (True, False):
        monkeypatch.setattr(Runner, "graphable", property(lambda self, graphs=graphs: graphs))
        kept.append(captured(lm, sites))
    for id_, one in kept[0].items():
        assert one.generated.tolist() == kept[1][id_].generated.tolist()
        for site in sites:
            assert (one.rows[site].codes == kept[1][id_].rows[site].codes).all(), (id_, str(site))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2**-8), (torch.bfloat16, 0.08)], ids=["32", "16"]
)
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3_text"])
def test_sites_in_a_graph_are_what_plain_transformers_computes(
    architecture: str, dtype: torch.dtype, limit: float
) -> None:
    lm = language_model(architecture, dtype)
    sites = crossed((0, len(lm.blocks) - 1), PARTS)
    done = captured(lm, sites)
    usual = {ATTN_OUT: "self_attn", MLP_OUT: "mlp", RESID_MID: "post_attention_layernorm"}
    normed = {
        ATTN_OUT: "post_attention_layernorm",
        MLP_OUT: "post_feedforward_layernorm",
        RESID_MID: "pre_feedforward_layernorm",
    }
    names = normed if architecture == "gemma3_text" else usual
    places = find_places(lm, sites)
    for site in sites:  # by name, and not as the package finds them
        block = lm.blocks[site.layer]
        module = block if site.part in (RESID_POST, EMBEDDINGS) else getattr(block, names[site.part])
        assert places[site].module is module
    for id_ in (0, 5, SLOTS + 3):
        ended, seen = done[id_], dict[Site, torch.Tensor]()
        tokens = np.concatenate([ended.request.token_ids, ended.generated])
        with ExitStack() as hooks, torch.inference_mode():
            for site, place in places.items():
                hooks.callback(place.watch(partial(keep, seen, site)).remove)
            lm.model.set_attn_implementation("eager")
            lm.decoder(input_ids=torch.from_numpy(tokens.astype(np.int64))[None].cuda(), use_cache=False)
        for site in sites:
            want = seen[site][ended.positions].float().cpu().numpy()
            own = bf16_values(ended.rows[site].codes.view(np.uint16))
            error = np.linalg.norm(own - want, axis=1) / np.linalg.norm(want, axis=1)
            assert error.max() <= limit, (id_, str(site), float(error.max()))
