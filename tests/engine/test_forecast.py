"""The part of a generation that is done, and the time left that follows from it, on simulated jobs."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import language_model

from nla_engine.engine.forecast import FIXED_PART, Forecast, Tally
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.tokens import token_bytes


def simulate(
    replies: np.ndarray, prompt: int, limit: int, slots: int, device: str
) -> list[tuple[float, float, int]]:
    """(time so far, part that was told, sequences that have ended) after every step, as the scheduler takes them."""
    forecast = Forecast(len(replies), prompt * len(replies), limit, slots, device)
    tally, waiting, running, fixed = Tally(), list(replies), [], FIXED_PART[device]
    now, told = 0.0, []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([0, waiting.pop(0)])
            tally.read += prompt
            now += 0.2 * prompt / slots
        now += fixed + (1 - fixed) * len(running) / slots
        tally.steps, tally.lanes = tally.steps + 1, tally.lanes + len(running)
        for sequence in running:
            sequence[0] += 1
        for done, reply in running:
            if done == reply:
                tally.end(done, limit)
        running = [each for each in running if each[0] < each[1]]
        tally.running = [done for done, _ in running]
        told.append((now, forecast.part(tally), tally.ended))
    return told


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "count", "slots", "limit"),
    [
        ("long", 200, 30, 128),
        ("geometric", 400, 32, 300),
        ("geometric", 64, 64, 300),
        ("normal", 300, 64, 512),
    ],
)
def test_the_time_left_is_right_within_a_factor_of_two(rng, device, kind: str, count, slots, limit) -> None:
    """Once a tenth of the time has passed and a twentieth of the replies have ended, at nearly every look.

    Where all sequences run in one wave, their lengths are known only when it ends, so more looks may miss it.
    """
    jobs, most = (1, 0.05) if count > slots else (20, 0.15)
    shares = []
    for _ in range(jobs):
        lengths = {
            "long": np.full(count, limit),
            "geometric": rng.geometric(1 / 80, count),
            "normal": rng.normal(150, 40, count).round(),
        }[kind]
        told = simulate(np.clip(lengths, 1, limit).astype(int), 50, limit, slots, device)
        whole = told[-1][0]
        assert told[-1][1] == pytest.approx(1) and all(0 < part <= 1 for _, part, _ in told)
        few = 0 if kind == "long" else 0.05 * count
        looks = [
            (now, part) for now, part, ended in told if 0.1 * whole <= now <= 0.85 * whole and ended >= few
        ]
        shares.append(
            np.mean([not 0.5 <= now * (1 - part) / part / (whole - now) <= 2 for now, part in looks])
        )
    assert np.mean(shares) <= most


def test_only_reading(rng) -> None:
    forecast = Forecast(10, 1000, 0, 4)
    assert [forecast.part(Tally(read=read)) for read in (0, 250, 1000)] == [0.0, 0.25, 1.0]


def test_survival_is_what_kaplan_and_meier_say() -> None:
    """Replies of 2 and 4 tokens, and one that has 3 and still runs."""
    tally = Tally(running=[3])
    tally.end(2, 10)
    tally.end(4, 10)
    alive = Forecast(3, 0, 10, 3).survival(tally)
    assert alive[:4] == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert (np.diff(alive) <= 0).all() and alive[10] == 0 < alive[9]


def test_the_scheduler_counts_what_is_done() -> None:
    lm, seen = language_model("Qwen2Config"), []
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), lm.eos_ids)
    requests = [Request(i, tuple(range(3, 6 + i)), 4 + i) for i in range(5)]
    with Runner(lm, slots=2, length=40) as runner:
        generator = Generator(runner, max_new_tokens=10, stop=stop)
        done = [
            c
            for group in generator.groups(requests, watch=lambda t: seen.append((t().tokens, t().ended)))
            for c in group
        ]
    tokens = sum(len(each.generated) for each in done)
    assert seen[-1] == (tokens, 5) and seen == sorted(seen)
    assert {each.finish for each in done} <= set(Finish)
