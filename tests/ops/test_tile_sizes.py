"""How attention's programs are cut: on Hopper as it was measured, and so that they fit every other card."""

from __future__ import annotations

import functools

import pytest
import torch

from nla_engine.ops.cards import HOPPER, SHARED_KIB, Card
from nla_engine.ops.tile_sizes import Cut, card_or_interpreter, cut_for, part_for, quick_step

CARDS = [Card(0, "card", capability, 1024 * kib) for capability, kib in SHARED_KIB.items()]


def test_attention_is_cut_on_hopper_as_it_was_measured() -> None:
    hopper = next(card for card in CARDS if card.capability == HOPPER)
    cut_on_hopper = functools.partial(cut_for, card=hopper)
    assert cut_on_hopper(128, 2, 16) == Cut(16, 32, 1, 2)
    assert cut_on_hopper(64, 2, 16) == Cut(16, 32, 1, 2)
    assert cut_on_hopper(64, 2, 16, quick=True) == cut_on_hopper(64, 2, 16, part=128) == Cut(16, 64, 4, 3)
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


@pytest.mark.parametrize(
    ("places", "programs", "part"),
    [
        (4096, 2048, 0),
        (4097, 2048, 1024),  # one long sequence would hold up the step
        (192, 4, 128),  # one sequence of a 7B model
        (128, 4, 0),
        (16_384, 4, 256),
        (16_384, 32, 1024),
        (1024, 32, 128),
        (1024, 128, 512),
        (1024, 256, 0),
    ],
)
def test_a_sequence_is_divided_if_it_is_long_or_the_card_would_be_idle(
    places: int, programs: int, part: int
) -> None:
    card = Card(0, "H100", HOPPER, 232_448, processors=132)
    assert part_for(places, programs, 64, card) == part


@pytest.mark.parametrize(
    ("size", "places", "programs", "quick"),
    [
        (64, 1216, 512 * 3, True),  # SmolLM2-135M, chats: 54.6 us one way, 39.1 the other
        (64, 1216, 64 * 3, True),  # 35.9, 16.8
        (64, 128, 64 * 3, True),  # 8.4, 6.8
        (64, 320, 512 * 3, False),  # 32.6, 33.2
        (64, 128, 512 * 3, False),  # 23.0, 24.4
        (64, 1216, 512 * 8, False),
        (128, 1216, 64 * 4, False),
    ],
)
def test_programs_are_quick_where_few_or_uneven_lanes_leave_the_card_waiting(
    size: int, places: int, programs: int, quick: bool
) -> None:
    assert quick_step(size, places, programs, Card(0, "H100", HOPPER, 232_448, processors=132)) == quick
