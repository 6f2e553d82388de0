"""AV and AR in training beside plain transformers, and the files that they become."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from nla_engine.models.load import load_model
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.train.lora import write_adapter
from nla_engine.train.output import write_pair
from nla_engine.train.pair import TrainedAR, TrainedAV, mse_nrm
from nla_engine.train.rollouts import Rollouts
from nla_engine.train.supervised import ar_step, av_step, parts, target_ids


def merged_by_hand(model: TrainedAV | TrainedAR, plain: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """A plain model of transformers with W + 2 B A in every adapted layer (alpha is twice the rank)."""
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, lora in model.adapters.items():
            weights[f"{prefix}{name}.weight"] += 2.0 * lora.up @ lora.down
    return plain.eval()


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
    from nla_engine.train.data import Rows

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
    out = tmp_path / "sidecars"
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
    from nla_engine.ops.backends import Kernels

    lm = copy.copy(av.lm)
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


def test_new_weights_in_place_are_those_of_an_engine_that_is_opened_with_them(
    av: TrainedAV, rng: np.random.Generator, seed: int
) -> None:
    check_in_place(av, rng, seed, torch.device("cpu"))


def check_in_place(av: TrainedAV, rng: np.random.Generator, seed: int, device: torch.device) -> None:
    """Texts of several samples from an engine that was open while the weights changed, and from a fresh one."""
    vectors = torch.from_numpy(rng.standard_normal((5, 64))).float()

    def engine() -> Rollouts:
        lm = load_model(av.lm.name, device=device, dtype=torch.float32)
        return Rollouts(lm, av, new_tokens=12, slots=4, seed=seed)

    def texts(rollouts: Rollouts) -> list[tuple[int, ...]]:
        rollouts.update()
        written = rollouts.write(vectors, samples=3, temperature=1.0)
        return [each.ids for each in written]

    held = engine()
    before = texts(held)
    with torch.no_grad():
        for weight in av.parameters.values():
            weight.add_(torch.from_numpy(rng.standard_normal(weight.shape)).float().to(weight.device) * 0.05)
    after = texts(held)
    held.close()
    fresh = engine()
    assert texts(fresh) == after != before
    fresh.close()
