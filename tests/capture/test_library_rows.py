"""Rows that leave while transformers' own generation runs: unequal prompts, small rings, a host that sees ends late."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import transformers
from family_runs import family_model, fault, natural_ends

from nla_engine.capture import staging
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.engine.choose import open_generator
from nla_engine.engine.forecast import Tally
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.transfer import Glance
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels
from nla_engine.sites import Site

SLOTS, LENGTH, NEW = 5, 70, 40


@pytest.fixture(params=["at once", "late"])
def sees_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Late: as on a GPU, where the host reads what it saw before the pass that it has just queued."""
    if request.param == "late":
        monkeypatch.setattr(Glance, "passed", property(lambda self: False))
    return str(request.param)


def asked(rng: np.random.Generator) -> Iterator[Request]:
    for i, new in enumerate([NEW, 3, 0, NEW, NEW, 1, NEW, 0, 2, NEW, NEW, NEW]):
        yield Request(i, tuple(rng.integers(3, 250, rng.integers(1, 25)).tolist()), new)


def run(
    lm: LanguageModel,
    requests: list[Request],
    *,
    codec: str,
    positions: str,
    sink_norm: float = math.inf,
    eos: Sequence[int] = (),
    prefill: int = 2048,
) -> tuple[dict[int, Completion], Tally]:
    layers = tuple(map(Site, range(len(lm.blocks))))
    most = max(request.max_new_tokens for request in requests)
    told: list[Tally] = []
    generator = open_generator(
        lm,
        slots=SLOTS,
        length=LENGTH,
        tap=RowTap(
            layers,
            Codec.named(codec, lm.d_model),
            RowRange.parse(positions),
            rows_per_slot=max(most, 1),
            sink_norm=dict.fromkeys(layers, sink_norm),
            device=lm.device,
        ),
        kernels=Kernels("library"),
        announce=lambda text: None,
        how={
            "max_new_tokens": most,
            "stop": StopAutomaton([b""] * lm.vocab_size, eos) if most else None,
            "read_last": bool(most),
            "max_prefill_tokens": prefill,
        },
    )
    with generator.runner:
        groups = list(generator.groups(iter(requests), watch=lambda tally: told.append(tally())))
    return {each.request.id: each for group in groups for each in group}, told[-1]


@pytest.mark.parametrize(("config", "positions"), [("BloomConfig", "all"), ("MambaConfig", "generated")])
def test_rows_are_those_of_transformers_alone(
    config: str, positions: str, sees_ends: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, requests = family_model(getattr(transformers, config)), list(asked(rng))
    monkeypatch.setattr(staging, "RING_BYTES", 1)
    whole, _ = run(lm, requests, codec="bf16", positions=positions)
    found, tally = run(lm, requests, codec="bf16", positions=positions, eos=natural_ends(whole))
    assert sorted(found) == list(range(len(requests)))
    for each in found.values():
        size = len(each.request.token_ids)
        first = 0 if positions == "all" else size
        assert each.positions.tolist() == list(range(first, size + len(each.generated)))
        assert not (len(each.positions) and fault(lm, each))
    assert any(each.finish is Finish.EOS for each in found.values())
    assert tally.ended == len(requests) and tally.running == []
    assert tally.generated == sum(len(each.generated) for each in found.values())
    assert tally.read == sum(len(request.token_ids) for request in requests)


def test_rows_kept_exactly_are_the_same_from_small_rings(
    sees_ends: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, requests = family_model(transformers.BloomConfig), list(asked(rng))
    whole, _ = run(lm, requests, codec="int8", positions="all")
    middle = float(np.median(np.concatenate([each.rows[Site(1)].norm for each in whole.values()])))

    def again() -> dict[int, Completion]:
        ends = natural_ends(whole)
        return run(lm, requests, codec="int8", positions="all", sink_norm=middle, eos=ends)[0]

    expected = again()
    monkeypatch.setattr(staging, "RING_BYTES", 1)
    found = again()
    for i, each in expected.items():
        assert each.generated.tolist() == found[i].generated.tolist()
        for site, rows in each.rows.items():
            for name, values in vars(rows).items():
                if isinstance(values, np.ndarray):
                    assert values.tobytes() == getattr(found[i].rows[site], name).tobytes(), (i, site, name)


def test_a_batch_ends_one_pass_after_its_last_sequence_at_most(
    sees_ends: str, rng: np.random.Generator
) -> None:
    lm = family_model(transformers.BloomConfig)
    requests = [Request(i, tuple(rng.integers(3, 250, 9).tolist()), NEW) for i in range(SLOTS)]
    found, tally = run(lm, requests, codec="bf16", positions="generated", eos=list(range(lm.vocab_size)))
    assert all(len(each.generated) == 1 and not fault(lm, each) for each in found.values())
    # The prompts, the last tokens, and what the host had queued before it saw that no sequence runs.
    assert tally.steps == 2 + (sees_ends == "late")


def test_prompts_are_read_on_where_hardly_anything_is_generated(rng: np.random.Generator) -> None:
    """Rows of a prompt need more places than those of the replies, by which rings are sized."""
    lm = family_model(transformers.BloomConfig)
    requests = [Request(i, tuple(rng.integers(3, 250, size).tolist()), 2) for i, size in enumerate((1, 3, 3))]
    found, _ = run(lm, requests, codec="bf16", positions="all")
    assert len(found) == 3 and not any(fault(lm, each) for each in found.values())


def test_texts_that_one_pass_cannot_hold_are_read_in_several(rng: np.random.Generator) -> None:
    lm = family_model(transformers.BloomConfig)
    requests = [Request(i, tuple(rng.integers(3, 250, 20).tolist()), 0) for i in range(12)]
    found, tally = run(lm, requests, codec="bf16", positions="all", prefill=20)
    assert sorted(found) == list(range(12)) and tally.read == 240
    for each in found.values():
        assert len(each.positions) == 20 and torch.isfinite(torch.from_numpy(each.rows[Site(0)].norm)).all()
        assert not fault(lm, each)
