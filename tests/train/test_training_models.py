"""AV and AR in training beside plain transformers, and the files that they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import LAYER
from safetensors.torch import load_file
from train_models import merged_by_hand, shaken
from transformers import AutoModel, AutoModelForCausalLM

from nla_engine.models.load import load_model
from nla_engine.ops.backends import Kernels
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.train.data import Rows
from nla_engine.train.lora import write_adapter
from nla_engine.train.output import write_pair, write_sidecars
from nla_engine.train.pair import TrainedAR, TrainedAV, mse_nrm
from nla_engine.train.rollouts import Rollouts
from nla_engine.train.supervised import ar_step, av_step, parts, target_ids


def texts_of(rng: np.random.Generator, sizes: list[int]) -> list[list[int]]:
    return [rng.integers(3, 250, size).tolist() for size in sizes]


def test_log_probs_are_those_of_plain_transformers(
    av: TrainedAV, made: Path, rng: np.random.Generator
) -> None:
    plain = merged_by_hand(av, AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32))
    vectors = torch.from_numpy(rng.standard_normal((4, 64)).astype(np.float32))
    texts = texts_of(rng, [5, 1, 9, 3])
    found = av.log_probs(vectors, texts).detach().split([len(ids) for ids in texts])
    place = av.prompt.places[0]
    assert av.prompt.token_ids[place] == av.sidecar.marker_id
    for vector, ids, got in zip(vectors, texts, found, strict=True):
        read = torch.tensor([[*av.prompt.token_ids, *ids]])
        with torch.no_grad():
            embeds = plain.get_input_embeddings()(read)
            embeds[0, place] = vector * 12 / vector.norm()
            logits = plain(inputs_embeds=embeds).logits[0, len(av.prompt.token_ids) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_reconstructions_are_those_of_plain_transformers(ar: TrainedAR, made: Path) -> None:
    whole = AutoModel.from_pretrained(made / "base", dtype=torch.float32)
    plain = merged_by_hand(ar, whole)
    texts = ["one", "a longer text, {with} braces", ""]
    found = ar.reconstruct(texts).detach()
    for text, got in zip(texts, found, strict=True):
        before, after = ar.sidecar.template
        ids = ar.lm.tokenizer(f"{before}{text}{after}")["input_ids"]
        with torch.no_grad():
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[3]
        torch.testing.assert_close(got, ar.head.detach() @ states[0, -1], atol=2e-4, rtol=2e-4)


def test_other_weights_stand_in_for_the_trained_ones(av: TrainedAV, rng: np.random.Generator) -> None:
    vectors, texts = torch.from_numpy(rng.standard_normal((2, 64))).float(), texts_of(rng, [4, 6])
    with torch.no_grad():
        before = av.log_probs(vectors, texts)
        kept = {name: weight.clone() for name, weight in av.parameters.items()}
        for weight in av.parameters.values():
            weight.add_(0.05)
        assert not torch.allclose(av.log_probs(vectors, texts), before, atol=1e-3)
        torch.testing.assert_close(av.log_probs(vectors, texts, kept), before, atol=0, rtol=0)


def test_small_passes_give_the_gradients_of_a_large_one(
    av: TrainedAV, ar: TrainedAR, rng: np.random.Generator
) -> None:
    count = 6
    vectors = torch.from_numpy(rng.standard_normal((count, 64))).float()
    texts = ["word " * int(size) for size in rng.integers(1, 5, count)]
    rows = Rows(np.arange(count), np.arange(count), np.arange(count), vectors, texts)

    def gradients(tokens_at_once: int) -> list[torch.Tensor]:
        av_step(av, rows, np.arange(count), new_tokens=40, tokens_at_once=tokens_at_once)
        ar_step(ar, vectors, texts, tokens_at_once=tokens_at_once)
        weights = [*av.parameters.values(), *ar.parameters.values()]
        found = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        assert all(each is not None for each in found)
        return found

    for small, large in zip(gradients(1), gradients(10**6), strict=True):
        torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("most", [1, 50, 64, 1000])
def test_parts_hold_every_text_once_and_keep_to_their_size(most: int, rng: np.random.Generator) -> None:
    sizes = rng.integers(1, 60, 40).tolist()
    groups = list(parts(sizes, most))
    assert sorted(np.concatenate(groups).tolist()) == list(range(40))
    assert all(len(g) == 1 or len(g) * max(sizes[i] for i in g) <= most for g in groups)


def test_targets_stand_in_tags_and_end(av: TrainedAV) -> None:
    tokenizer = av.lm.tokenizer
    (whole, cut) = (target_ids(tokenizer, ["a {b}"], most)[0] for most in (200, 7))
    assert tokenizer.decode(whole[:-1]) == "<explanation>a {b}</explanation>"
    assert whole[-1] == tokenizer.eos_token_id and cut == whole[:7]


def test_the_files_hold_what_was_trained(
    av: TrainedAV, ar: TrainedAR, made: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The engine's own loader merges them to the trainer's weights, and reads a text as the trainer does."""
    out = tmp_path / "pair"
    write_pair(out, av, ar, str(made / "base"), None)
    write_adapter(out / "av", av.adapters, str(made / "base"), None, torch.float32)  # unrounded
    device = torch.device("cpu")
    loaded = load_model(str(out / "av"), device=device, dtype=torch.float32)
    weights = dict(loaded.model.named_parameters())
    for name, value in av.changed():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=1e-6)
    read = Reconstructor.load(str(out / "ar"), device=device, dtype=torch.float32)
    texts = ["one", "another text"]
    again = read.reconstruct(texts)
    read.close()
    assert float(mse_nrm(ar.reconstruct(texts).detach(), again).max()) < 1e-3  # bfloat16 files
    assert load_file(out / "ar" / "value_head.safetensors")["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_the_engine_samples_from_what_the_trainer_holds(
    kernels: str, av: TrainedAV, rng: np.random.Generator, seed: int
) -> None:
    """Log-probabilities of what it samples, before and after the weights were replaced in place."""
    lm = load_model(av.lm.name, device=torch.device("cpu"), dtype=torch.float32)
    vectors = torch.from_numpy(rng.standard_normal((3, 64))).float()
    rollouts = Rollouts(lm, av, new_tokens=8, slots=1, seed=seed, kernels=Kernels(kernels))
    seen: list[torch.Tensor] = []
    head = lm.logits

    def note(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        seen.append(logits.float().log_softmax(-1).clone())
        return logits

    def apart() -> float:
        rollouts.update()
        rollouts.write(vectors[:1], samples=1, temperature=1.0)  # opens the engine, which checks itself
        lm.logits = note
        seen.clear()
        written = rollouts.write(vectors, samples=1, temperature=1.0, first_draw=int(rng.integers(1 << 20)))
        del lm.logits
        told = torch.cat([part[-1:] for part in seen])
        ids = [token for each in written for token in each.ids]
        assert len(told) == len(ids)
        sampled = told[torch.arange(len(ids)), torch.tensor(ids)]
        with torch.no_grad():
            return float((av.log_probs(vectors, [each.ids for each in written]) - sampled).abs().max())

    assert apart() < 1e-3
    with torch.no_grad():
        for weight in av.parameters.values():
            weight.add_(torch.from_numpy(rng.standard_normal(weight.shape)).float() * 0.05)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Rollouts, "update", lambda self: None)
        assert apart() > 1e-2  # the test can fail
    assert apart() < 1e-3
    rollouts.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_open_engine_takes_new_weights(
    device: str, made: Path, tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    """Its texts are those of an engine that is opened with them, and the trainer finds each greedy token best.

    On a GPU its graphs were captured before the weights changed.
    """
    on, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    lm, served = (load_model(str(made / "base"), device=on, dtype=dtype) for _ in range(2))
    write_sidecars(tmp_path, lm.tokenizer, lm.d_model, LAYER, "12", 0)
    av = shaken(TrainedAV(lm, tmp_path / "av", 4, 1), 2)
    vectors = torch.from_numpy(rng.standard_normal((5, 64))).float()

    def texts(rollouts: Rollouts) -> list[tuple[int, ...]]:
        sampled = rollouts.write(vectors, samples=3, temperature=1.0)
        greedy = rollouts.write(vectors, samples=1, temperature=0.0)
        return [each.ids for each in (*sampled, *greedy)]

    def missed(greedy: list[tuple[int, ...]]) -> float:
        """By how much the trainer finds another token likelier, at most."""
        logits: list[torch.Tensor] = []
        head = av.lm.logits
        av.lm.logits = lambda hidden: logits.append(head(hidden)) or logits[-1]
        with torch.no_grad():
            chosen = av.log_probs(vectors, greedy)
        del av.lm.logits
        return float((logits[0].float().log_softmax(-1).max(-1).values - chosen).max())

    held = Rollouts(served, av, new_tokens=12, slots=4, seed=seed)
    held.update()
    before = texts(held)
    near = 1e-4 if dtype == torch.float32 else 0.1
    assert missed(before[-5:]) < near
    with torch.no_grad():
        for weight in av.parameters.values():
            weight.add_(torch.from_numpy(rng.standard_normal(weight.shape)).float().to(on) * 0.05)
    assert missed(texts(held)[-5:]) > 0.3  # it has the old weights still
    held.update()
    after = texts(held)
    assert missed(after[-5:]) < near
    held.close()
    fresh = Rollouts(served, av, new_tokens=12, slots=4, seed=seed)
    again = texts(fresh)
    fresh.close()
    assert missed(again[-5:]) < near and after != before
    if device == "cpu":  # a GPU's engines may choose other products, which round otherwise
        assert again == after
