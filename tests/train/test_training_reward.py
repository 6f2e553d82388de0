"""Reinforcement: rewards by hand, and texts that get better by it."""

from __future__ import annotations

import numpy as np
import torch

from nla_engine.models.load import LanguageModel, load_model
from nla_engine.train.fit import Fitter
from nla_engine.train.pair import TrainedAR, TrainedAV
from nla_engine.train.reinforce import av_step, judge
from nla_engine.train.rollouts import Rollouts, Written
from nla_engine.train.supervised import ar_step


def test_rewards_and_advantages_by_hand(rng: np.random.Generator) -> None:
    sizes, status = rng.integers(1, 21, 6).tolist(), ["ok", "unclosed", "untagged", "ok", "ok", "unclosed"]
    written = [Written((0,) * size, "", each) for size, each in zip(sizes, status, strict=True)]
    mse = rng.uniform(0, 4, 6)
    judged = judge(torch.from_numpy(mse), written, 3, 20)
    cost = {"ok": 0.0, "unclosed": 0.5, "untagged": 1.0}
    reward = np.array(
        [-m - 0.2 * max(0, n - 15) / 5 - cost[s] for m, n, s in zip(mse, sizes, status, strict=True)]
    )
    np.testing.assert_allclose(judged.reward, reward, atol=1e-6)
    for part in (slice(0, 3), slice(3, 6)):
        group = reward[part]
        wanted = (group - group.mean()) / (group.std() + 0.01)
        np.testing.assert_allclose(judged.advantage[part], wanted, atol=1e-5)


def test_the_loss_is_that_of_the_formula(av: TrainedAV, rng: np.random.Generator) -> None:
    """Its gradient, beside one through the whole sum at once."""
    vectors = torch.from_numpy(rng.standard_normal((4, 64))).float()
    written = [Written(tuple(rng.integers(3, 250, size).tolist()), "", "ok") for size in (3, 5, 2, 4)]
    advantage = torch.from_numpy(rng.standard_normal(4)).float()
    warm = {name: weight.detach() + 0.02 for name, weight in av.parameters.items()}
    apart = av_step(av, vectors, written, advantage, kl=0.3, warm=warm, tokens_at_once=64)
    found = {name: weight.grad.clone() for name, weight in av.parameters.items()}
    for weight in av.parameters.values():
        weight.grad = None
    ids = [each.ids for each in written]
    log_p = av.log_probs(vectors, ids)
    with torch.no_grad():
        log_q = av.log_probs(vectors, ids, warm)
    ratio = log_q - log_p
    k3 = ratio.exp() - ratio - 1
    each = torch.repeat_interleave(advantage, torch.tensor([3, 5, 2, 4]))
    ((-each * log_p + 0.3 * k3).mean()).backward()
    np.testing.assert_allclose(apart, float(k3.detach().mean()), rtol=1e-4, atol=1e-7)
    for name, weight in av.parameters.items():
        torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-3)


def flatten(*models: LanguageModel) -> None:
    """Make the models less sure: with small logits, samples of one vector differ."""
    with torch.no_grad():
        for lm in models:
            lm.head.weight.mul_(0.5)


def test_a_few_steps_improve_the_reward(av: TrainedAV, ar: TrainedAR, rng: np.random.Generator) -> None:
    """The same vectors again and again: what the AV writes of them is read back better and better."""
    lm = load_model(av.lm.name, device=torch.device("cpu"), dtype=torch.float32)
    flatten(av.lm, lm)
    rollouts = Rollouts(lm, av, new_tokens=6, slots=32, seed=5)
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(6)).repeat_interleave(8, 0)
    fitters = [Fitter(av.parameters, 0.01), Fitter(ar.parameters, 0.003)]
    rewards = []
    for step in range(8):
        rollouts.update()
        written = rollouts.write(vectors[::8], samples=8, temperature=1.0, first_draw=step * 4)
        mse = ar_step(ar, vectors, [each.text for each in written], tokens_at_once=4096)
        judged = judge(mse, written, 8, 6)
        av_step(av, vectors, written, judged.advantage, kl=0.0, warm={}, tokens_at_once=4096)
        for fitter in fitters:
            fitter.step(step, 1, 0.0)
        rewards.append(float(judged.reward.mean()))
    rollouts.close()
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2


def test_the_av_alone_learns_what_is_rewarded(av: TrainedAV) -> None:
    """Texts of one token. Rewarded are those on one side of a plane, which a state can favour; no AR helps."""
    lm = load_model(av.lm.name, device=torch.device("cpu"), dtype=torch.float32)
    rollouts = Rollouts(lm, av, new_tokens=1, slots=64, seed=7)
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(8))
    side = torch.randn(64, generator=torch.Generator().manual_seed(9))
    bad = (lm.head.weight.float() @ side < 0).float().detach()
    fitter = Fitter(av.parameters, 0.01)
    rewards = []
    for step in range(8):
        rollouts.update()
        written = rollouts.write(vectors, samples=32, temperature=1.0, first_draw=step * 4)
        mse = torch.stack([bad[each.ids[0]] for each in written])
        judged = judge(mse, written, 32, 4)
        repeated = vectors.repeat_interleave(32, 0)
        av_step(av, repeated, written, judged.advantage, kl=0.0, warm={}, tokens_at_once=4096)
        fitter.step(step, 1, 0.0)
        rewards.append(-float(mse.mean()))
    rollouts.close()
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2
