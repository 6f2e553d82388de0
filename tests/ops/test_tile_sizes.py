"""How attention's programs are cut: on Hopper as it was measured, and so that they fit every other card."""

from __future__ import annotations

import functools

import pytest
import torch

from nla_engine.ops.cards import HOPPER, SHARED_KIB, Card
from nla_engine.ops.tile_sizes import Cut, card_or_interpreter, cut_for

CARDS = [Card(0, "card", capability, 1024 * kib) for capability, kib in SHARED_KIB.items()]


def test_attention_is_cut_on_hopper_as_it_was_measured() -> None:
    hopper = next(card for card in CARDS if card.capability == HOPPER)
    cut_on_hopper = functools.partial(cut_for, card=hopper)
    assert cut_on_hopper(128, 2, 16) == Cut(16, 32, 1, 2)
    assert cut_on_hopper(128, 2, 32) == Cut(32, 64, 4, 3)
    for rows in (32, 64):
        assert cut_on_hopper(64, 2, rows) == Cut(rows, 64, 4, 3)
        assert cut_on_hopper(256, 2, rows) == Cut(rows, 32, 4, 2)
    for rows in (16, 32, 64):
        assert cut_on_hopper(128, 4, rows) == Cut(rows, 64, 4, 2)
        assert cut_on_hopper(256, 4, rows) == Cut(rows, 32, 4, 2)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.capability)
def test_every_cut_fits_its_card(card: Card) -> None:
    for size in (8, 64, 80, 96, 128, 192, 256, 512):
        for itemsize in (2, 4):
            for rows in (16, 32, 64, 128, 256):
                if size == 512 and itemsize == 4 and card.shared_bytes < 1024 * 99:
                    with pytest.raises(ValueError, match="heads of 512 channels do not fit"):
                        cut_for(size, itemsize, rows, card)
                    continue
                made = cut_for(size, itemsize, rows, card)
                assert made.shared_bytes(size, itemsize, card) <= card.shared_bytes
                assert made.rows >= 16 and made.keys >= 16 and rows % made.rows == 0


def test_the_interpreter_has_a_card() -> None:
    assert card_or_interpreter(torch.device("cpu")).capability == HOPPER
