"""Models over two processes (gloo) against the whole model in one: rows, tokens, explanations, reconstructions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import shell
from safetensors.torch import load_file, save_file
from stand_in_gpu import StandIn
from tiny import save_ar, save_av, save_model, write_prompts

from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine import fused
from nla_engine.engine.leader import Leader, open_ranks
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.runner import Runner
from nla_engine.engine.split_load import load_split
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.models.source import find_source
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.sites import PARTS
from nla_engine.store import CaptureStore

CPU = torch.device("cpu")
LAYER = 2
#: Largest difference of float32 sums in another order, relative to the largest value.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Leader]:
    """Two processes, this one among them."""
    with open_ranks((CPU, CPU)) as opened:
        assert isinstance(opened, Leader)
        yield opened


def split(ranks: Leader, directory: Path, **more: Any) -> LanguageModel:
    return load_split(ranks, find_source(str(directory)), dtype=torch.float32, **more)


def whole(directory: Path) -> LanguageModel:
    return load_model(str(directory), device=CPU, dtype=torch.float32)


def apart(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


#: (architecture, --kernels): biases and GQA; qk-norm; fewer key/value heads than ranks; a tied head, norms after each
#: sublayer, windows; the same in a wrapper that sees images.
CASES = [
    ("qwen2", "fused"),
    ("qwen3", "auto"),
    ("llama", "fused"),
    ("gemma3_text", "fused"),
    ("gemma3", "auto"),
]


@pytest.mark.parametrize(("architecture", "kernels"), CASES)
def test_a_capture_is_that_of_one_process(
    ranks: Leader, tmp_path: Path, architecture: str, kernels: str, seed: int
) -> None:
    """Refill, shared prompts of several replies, sampling, every site, next tokens: the same tokens, rows as near as
    float32 allows."""
    base = save_model(tmp_path / "base", architecture, seed=seed % 1000)
    prompts = write_prompts(tmp_path / "p.jsonl", 5)
    stores = []
    for lm in (whole(base), split(ranks, base)):
        size = 1 if lm.ranks is None else 2
        options = CaptureOptions(
            model=str(base),
            prompts=(prompts,),
            layer=(1, LAYER),
            sites=tuple(PARTS),
            out=str(tmp_path / f"{size}.zarr"),
            max_new_tokens=9,
            replies=2,
            temperature=0.7,
            seed=seed,
            next_token=2,
            batch_size=4,
            codec="bf16",
            kernels=kernels,
            tensor_parallel=size,
        )
        run_capture(options, lm=lm)
        stores.append(CaptureStore.open(options.out))
    one, two = stores
    for column in ("token_id", "next_token_id", "position", "sequence"):
        assert np.array_equal(one.column(column), two.column(column))
    assert one.provenance["weights"] == two.provenance["weights"], (
        "the fingerprint is that of the whole model"
    )
    assert np.allclose(one.column("next_logprob"), two.column("next_logprob"), atol=1e-4, equal_nan=True)
    for site in one.sites:
        norms = (one.layer(site).norm(), two.layer(site).norm())
        assert apart(*norms) < CLOSE, site.label
        assert apart(two.layer(site)[:], one.layer(site)[:]) < 2**-7, site.label  # both rounded to bfloat16


@pytest.mark.parametrize(("architecture", "kernels"), CASES)
@torch.inference_mode()
def test_states_are_those_of_plain_transformers(
    ranks: Leader, tmp_path: Path, architecture: str, kernels: str, rng: np.random.Generator
) -> None:
    base = save_model(tmp_path / "base", architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = rng.integers(0, 250, 17).tolist()
    expected = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    lm = split(ranks, base)
    runner = ranks.make(Runner, lm.truncated(LAYER), slots=2, length=20, kernels=Kernels(kernels))
    with runner:
        states = runner.read([(1, 0, ids)])
        ranks.check()
    assert apart(states, expected.hidden_states[LAYER + 1][0]) < CLOSE
    logits = ranks.together(LanguageModel.logits, lm, expected.hidden_states[-1][0])
    assert apart(logits, expected.logits[0]) < CLOSE, "the vocabulary is split, and 259 is odd"


def test_a_dry_run_says_what_lies_where(ranks: Leader, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gemma3_text")
    lm = split(ranks, base)
    said: list[str] = []
    options = CaptureOptions(
        model=str(base),
        prompts=(write_prompts(tmp_path / "p.jsonl", 2),),
        layer=(LAYER,),
        out=str(tmp_path / "run.zarr"),
        max_new_tokens=3,
        tensor_parallel=2,
        dry_run=True,
    )
    estimate = estimate_capture(options, announce=said.append, lm=lm)
    assert estimate.rows == 6 and not Path(options.out).exists()
    stored = load_file(base / "model.safetensors")  # the embedding is whole on both, the products are halves
    mine = sum(t.nbytes if t.ndim == 1 or "embed" in name else t.nbytes / 2 for name, t in stored.items())
    places = [line for line in said if line.startswith("rank ")]
    assert [line.split(":")[0] for line in places] == ["rank 0 on cpu", "rank 1 on cpu"]
    assert all(f": {mine / 2**20:.1f} MiB of weights, " in line for line in places)
    assert ["rows" in line for line in places] == [True, False]


class SharedSums:
    """Stands for `engine.peers.PeerSums` on a CPU: every sum lies in the same memory, and a part is gone once it is
    summed."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.peers = ranks, self
        self.memory = torch.full((2, 1 << 20), torch.nan)
        self.sums = 0

    def part(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return self.memory[0, : rows * width].view(rows, width)

    def has(self, part: torch.Tensor) -> bool:
        return part.data_ptr() == self.memory[0].data_ptr()

    def holds(self, states: torch.Tensor) -> bool:
        return states.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()

    def sum(self, part: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        self.sums += 1
        total = self.ranks.reduce(part.clone())
        if x is None:
            return part.copy_(total)
        total += x
        self.memory[0].fill_(torch.nan)
        return self.memory[1, : part.numel()].view(part.shape).copy_(total)


def share_sums(ranks: Ranks) -> None:
    ranks.peers = SharedSums(ranks)  # type: ignore[assignment]


@pytest.fixture
def shared_sums(ranks: Leader) -> Iterator[SharedSums]:
    """Sums in memory of their own, as on GPUs that can write each other's, on every rank."""
    ranks.together(share_sums, ranks)
    shared: Any = ranks.peers
    yield shared
    assert shared.sums > 50
    ranks.together(setattr, ranks, "peers", None)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_sums_in_memory_of_their_own(
    ranks: Leader, shared_sums: SharedSums, tmp_path: Path, architecture: str, seed: int
) -> None:
    """What is kept of a pass does not change with the next sum: rows of prompts and replies, states that are read."""
    base = save_model(tmp_path / "base", architecture, seed=seed % 1000)
    prompts, stores = write_prompts(tmp_path / "p.jsonl", 5), []
    for lm in (whole(base), split(ranks, base)):
        size = 1 if lm.ranks is None else 2
        options = CaptureOptions(
            model=str(base),
            prompts=(prompts,),
            layer=tuple(range(len(lm.blocks))),
            sites=("resid_post", "resid_mid"),
            positions="all",
            out=str(tmp_path / f"{size}.zarr"),
            max_new_tokens=7,
            batch_size=3,
            codec="bf16",
            kernels="fused",
            tensor_parallel=size,
        )
        run_capture(options, lm=lm)
        stores.append(CaptureStore.open(options.out))
    one, two = stores
    assert np.array_equal(one.column("token_id"), two.column("token_id"))
    for site in one.sites:
        assert apart(two.layer(site).norm(), one.layer(site).norm()) < CLOSE, site.label
        assert apart(two.layer(site)[:], one.layer(site)[:]) < 2**-7, site.label
    lm = split(ranks, base).truncated(LAYER)
    with ranks.make(Runner, lm, slots=2, length=20, kernels=Kernels("fused")) as runner:
        first = runner.read([(0, 0, [5, 6, 7])])
        kept = first.clone()
        runner.read([(1, 0, [9, 8, 7, 6])])
        assert torch.equal(first, kept)


def test_kernels_sum_in_memory_that_processes_share(stand_in: StandIn, tmp_path: Path) -> None:
    """What GPUs do that write each other's memory, against plain transformers."""
    for architecture in ("gemma3_text", "llama"):
        save_model(tmp_path / architecture, architecture)
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(tests / "shared_peers.py"), str(tmp_path), "2", str(stand_in.path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in told] == ["gemma3_text", "llama"]
    assert all(float(apart) < CLOSE for _, apart, _ in told), told
    assert 20 < int(told[0][2]) < int(told[1][2]), "each pass has two sums a block"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_a_long_pass_is_summed_in_pieces(
    ranks: Leader, tmp_path: Path, architecture: str, rng: np.random.Generator
) -> None:
    base = save_model(tmp_path / "base", architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = rng.integers(0, 250, 23).tolist()
    expected = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    lm = split(ranks, base).truncated(LAYER)
    with ranks.make(Runner, lm, slots=1, length=30, kernels=Kernels("fused")) as runner:
        ranks.together(cut_pieces, 5)
        try:
            states = runner.read([(0, 0, ids)])
            ranks.check()
        finally:
            ranks.together(cut_pieces, 8192)
    assert apart(states, expected) < CLOSE


def cut_pieces(rows: int) -> None:
    fused.PIECE_ROWS = rows


@pytest.mark.parametrize(
    ("architecture", "shares"),
    [("qwen2", False), ("qwen2", True), ("gemma3_text", False)],
    ids=["qwen2", "qwen2-shared-sums", "gemma3_text"],
)
def test_av_and_ar_are_those_of_one_process(
    ranks: Leader,
    tmp_path: Path,
    architecture: str,
    shares: bool,
    rng: np.random.Generator,
    request: pytest.FixtureRequest,
) -> None:
    if shares:
        request.getfixturevalue("shared_sums")
    av, ar = save_av(tmp_path / "av", LAYER, architecture), save_ar(tmp_path / "ar", LAYER, architecture)
    vectors = [(number, rng.standard_normal(64).astype(np.float32)) for number in range(5)]
    how: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "kernels": Kernels("fused")}
    said, read = [], []
    for group in (None, ranks):
        writes = Verbalizer.load(str(av), ranks=group, **how)
        reads = Reconstructor.load(str(ar), ranks=group, **how)
        sampled = Sampling(0.7, seed=3)
        texts = list(writes.explain(vectors, samples=2, max_new_tokens=20, batch_size=3, sampling=sampled))
        said.append(texts)
        read.append(reads.reconstruct([text.text for text in texts] + ["one", "much longer " * 9]))
        reads.close()
        assert writes.fingerprint() and reads.fingerprint()
    assert said[0] == said[1]
    assert apart(read[1], read[0]) < CLOSE


def test_an_injection_at_a_block_is_passed_on(
    ranks: Leader, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Only rank 0 has the vectors."""
    from nla_engine.models.sidecar import Given

    av = save_av(tmp_path / "av", LAYER)
    vectors = [(number, rng.standard_normal(64).astype(np.float32)) for number in range(3)]
    how: dict[str, Any] = {"device": CPU, "dtype": torch.float32}
    how["given"] = Given(injection="add@1", norm_match=True)
    texts = [
        list(Verbalizer.load(str(av), ranks=group, **how).explain(vectors, max_new_tokens=12))
        for group in (None, ranks)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.real
def test_three_ranks_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct has 9 heads, 3 key/value heads and a tied head. By the command, whose processes are its
    own."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("What is the capital of France?\nName three colours.\nWhat is 12 times 12?\n")
    stores = []
    for size in (1, 3):
        out = tmp_path / f"{size}.zarr"
        arguments = (
            "--prompts",
            prompts,
            "--layer",
            20,
            "--out",
            out,
            "--max-new-tokens",
            24,
            "--codec",
            "bf16",
        )
        ran = shell(
            "capture", smollm2, *arguments, "--device", "cpu", "--dtype", "float32", "--tensor-parallel", size
        )
        assert ran.code == 0, ran.err
        stores.append(CaptureStore.open(out))
    one, three = stores
    assert np.array_equal(one.column("token_id"), three.column("token_id"))
    assert one.provenance["weights"] == three.provenance["weights"]
    assert apart(three.layer(20).norm(), one.layer(20).norm()) < CLOSE


def test_what_does_not_belong_into_the_files_is_refused(tmp_path: Path) -> None:
    """By name, before anything is read. With an own group: a refusal ends it on every rank."""
    from nla_engine.engine.split_load import check_split
    from nla_engine.errors import CheckpointError

    base = save_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    changes = {
        "are missing": {key: each for key, each in weights.items() if "layers.1.mlp.up" not in key},
        "have no place": {**weights, "model.layers.0.mlp.more.weight": torch.zeros(3)},
        "have the wrong shape": {**weights, "model.norm.weight": torch.zeros(3)},
    }
    for words, tensors in changes.items():
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        files, _ = check_split(find_source(str(base)), 2, torch.float32)
        with pytest.raises(CheckpointError, match=words):
            files.places(files.whole())
