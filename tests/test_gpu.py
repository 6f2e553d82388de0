"""The engine on a GPU: Triton kernels, fused blocks and CUDA graphs against transformers on the same device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model

from nla_engine.capture import plan, tap
from nla_engine.capture.run import run_capture
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions, RoundtripOptions
from nla_engine.engine.fused import _merge_tensors
from nla_engine.engine.generator import Generator
from nla_engine.engine.pass_graphs import SWITCH
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import Room
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.streams import capture_stream, side_stream
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Choosing, Sampling, SlotState, advance_reference, advance_triton
from nla_engine.ops.truncation import Truncation
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

pytestmark = pytest.mark.gpu
PREFIX = (7, 8, 9, 10, 11)
EOS = 257
TRIO = Path(__file__).parent.parent / "nla_engine" / "demo" / "trio"


def language_model(architecture: str = "qwen2", dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(architecture).to("cuda", dtype)
    return wrap_model(model, byte_tokenizer(), name=architecture)


def run(
    lm: LanguageModel,
    requests: list[Request],
    *,
    slots: int,
    kernels: str = "auto",
    sampling=Sampling(),
    prefix=(),
) -> dict[int, Completion]:
    runner = Runner(lm, slots=slots, length=len(prefix) + 60, prefix=prefix, kernels=Kernels(kernels))
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), [EOS])
    generator = Generator(runner, max_new_tokens=20, stop=stop, sampling=sampling, max_prefill_tokens=50)
    completions = {completion.request.id: completion for completion in generator.run(requests)}
    runner.close()
    return completions


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_greedy_tokens_equal_transformers(architecture: str, prefix: tuple[int, ...], rng) -> None:
    lm = language_model(architecture)
    requests = [
        Request(i, tuple(rng.integers(1, 250, rng.integers(1, 30)).tolist()), int(rng.integers(1, 20)))
        for i in range(25)
    ]
    completions = run(lm, requests, slots=7, prefix=prefix)
    lm.model.set_attn_implementation("eager")
    for request in requests:
        ids = torch.tensor([[*prefix, *request.token_ids]], device="cuda")
        out = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert completions[request.id].generated.tolist() == out[0, ids.shape[1] :].tolist()


def test_fast_and_reference_paths_agree_with_vectors_and_sampling(rng) -> None:
    lm = language_model()
    vectors = rng.standard_normal((40, lm.d_model)).astype(np.float32)
    requests = [Request(i, (30, 20, 21), 15, torch.from_numpy(vectors[i : i + 1]), (0,)) for i in range(40)]
    cut = Truncation(top_p=0.8, top_k=100, min_p=0.05)
    for sampling in (Sampling(), Sampling(1.0, 3), Sampling(1.5, 3, cut), Sampling(1.5, 3, Truncation(0.6))):
        fast = run(lm, requests, slots=16, prefix=PREFIX, sampling=sampling)
        slow = run(lm, requests, slots=5, prefix=PREFIX, sampling=sampling, kernels="reference")
        same = [fast[i].generated.tolist() == slow[i].generated.tolist() for i in range(40)]
        assert np.mean(same) >= 0.95  # a borderline draw may fall either way


@pytest.mark.parametrize("cut", [(0.9, None, None), (0.8, 20, None), (None, 50, 0.05), (1e-3, None, None)])
def test_a_graph_draws_what_the_reference_draws_from_a_vocabulary_of_today(cut: tuple) -> None:
    """The same launches, replayed over new logits, in bfloat16 with the many equal values that it has."""
    lanes, vocabulary, steps = 64, 152_064, 6
    table = torch.zeros(1, vocabulary, dtype=torch.uint8, device="cuda")
    how = Choosing(Sampling(0.8, 11, Truncation(*cut)), table, 1, False)
    at = torch.arange(lanes, device="cuda")
    logits = torch.zeros(lanes, vocabulary, dtype=torch.bfloat16, device="cuda")
    fast, slow = (SlotState.allocate(lanes, steps + 1, logits.device) for _ in range(2))
    advance_triton(logits, at, fast, how)  # no slot is active; compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance_triton(logits, at, fast, how)
    for state in (fast, slow):
        state.active[:-1] = True
        state.limit.fill_(steps + 1)
        state.sequence.copy_(torch.arange(lanes + 1))
    for _ in range(steps):
        logits.normal_(0, 2.5)
        graph.replay()
        advance_reference(logits, at, slow, how)
    assert torch.equal(fast.position, slow.position)
    assert (fast.generated == slow.generated)[:-1, :steps].float().mean() >= 0.97  # roundings at an edge


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2**-8), (torch.bfloat16, 0.05)])
def test_ten_thousand_ragged_requests_lose_and_misplace_nothing(
    architecture: str, dtype: torch.dtype, limit: float, tmp_path: Path, rng
) -> None:
    lm = language_model(architecture, dtype)
    count = 10_000 if architecture == "qwen2" and dtype == torch.float32 else 500
    lines = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 24)))) for _ in range(count)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    options = CaptureOptions(
        model="in memory",
        prompts=prompts,
        layer=(1, 3),
        out=tmp_path / "run.zarr",
        max_new_tokens=12,
        positions="all",
        codec="bf16",
        batch_size=200,
        temperature=1.5,
    )
    summary = run_capture(options, lm=lm)
    store = CaptureStore.open(options.out)
    assert summary.sequences == count and all(check.ok for check in verify(options.out))
    assert store.rows == sum(len(sequence.tokens) for sequence in store.iter_sequences())
    lm.model.set_attn_implementation("eager")
    for number in rng.choice(count, 40, replace=False):
        sequence = store.sequence(int(number))
        assert (
            sequence.prompt_text() == f"<|im_start|>user\n{lines[number]}<|im_end|>\n<|im_start|>assistant\n"
        )
        with torch.no_grad():
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].cuda()
            want = lm.model(ids, output_hidden_states=True).hidden_states[2][0].float().cpu().numpy()
        got = store.layer(1)[sequence.rows]
        error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() <= limit


def test_ten_thousand_requests_over_too_few_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng
) -> None:
    """200 slots of at most three blocks, and 150 blocks: sequences step back all the time, and lose nothing."""
    lm = language_model()
    lines = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 80)))) for _ in range(10_000)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    monkeypatch.setattr(plan, "default_room", lambda *_, **__: Room(200, 150))
    options = CaptureOptions(
        model="in memory", prompts=prompts, layer=(1, 3), out=tmp_path / "run.zarr", max_new_tokens=60,
        positions="all", codec="bf16", temperature=1.5,
    )  # fmt: skip
    summary = run_capture(options, lm=lm)
    store = CaptureStore.open(options.out)
    assert summary.sequences == 10_000 and summary.stepped_back > 100
    assert all(check.ok for check in verify(options.out))
    assert store.rows == sum(len(sequence.tokens) for sequence in store.iter_sequences())
    lm.model.set_attn_implementation("eager")
    for number in rng.choice(10_000, 100, replace=False):
        sequence = store.sequence(int(number))
        with torch.no_grad():
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].cuda()
            want = lm.model(ids, output_hidden_states=True).hidden_states[2][0].float().cpu().numpy()
        got = store.layer(1)[sequence.rows]
        assert (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max() <= 2**-8


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_rows_are_read_before_the_next_block_changes_them_however_late_the_tap(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph the tap runs beside the next block: delayed by 0.1 ms per layer, it keeps the same bits as outside."""
    lm = language_model(architecture, torch.bfloat16)
    layers, slots, kept = tuple(range(len(lm.blocks))), 64, []
    stop = StopAutomaton([b""] * lm.vocab_size, ())
    work = [Request(i, tuple(range(1 + i, 12 + i)), 20) for i in range(slots)]
    encode = tap.encode_rows

    def late(*given: Any, **how: Any) -> None:
        torch.cuda._sleep(200_000)
        encode(*given, **how)

    monkeypatch.setattr(tap, "encode_rows", late)
    monkeypatch.setenv(SWITCH, "0")  # prompt passes of another size may round differently
    for graphs in (True, False):
        monkeypatch.setattr(Runner, "graphable", property(lambda self, graphs=graphs: graphs))
        keeper = tap.RowTap(
            layers, Codec.named("bf16", lm.d_model), tap.RowRange.parse("all"), rows_per_slot=31,
            sink_norm=dict.fromkeys(layers, math.inf), device=lm.device,
        )  # fmt: skip
        with Runner(lm, slots=slots, length=31, tap=keeper) as runner:
            generator = Generator(runner, max_new_tokens=20, stop=stop, read_last=True)
            generator.prepare()
            kept.append({ended.request.id: ended for ended in generator.run(iter(work))})
    for id_ in range(slots):
        one, other = kept[0][id_], kept[1][id_]
        assert one.generated.tolist() == other.generated.tolist()
        for layer in layers:
            assert (one.rows[layer].codes == other.rows[layer].codes).all(), (id_, layer)


def test_work_beside_a_capture_never_goes_to_its_stream() -> None:
    device = torch.device("cuda")
    capture, side = capture_stream(device), side_stream(device)
    assert capture.cuda_stream != side.cuda_stream
    for _ in range(40):  # more than torch has
        torch.cuda.Stream()
        assert (capture_stream(torch.device("cuda", 0)), side_stream(device)) == (capture, side)


def test_merged_weights_are_read_before_their_memory_is_used_again() -> None:
    """On a stream of its own, behind slow work, while another stream allocates memory and writes to it."""
    device, size = torch.device("cuda"), 1 << 24
    for _ in range(5):
        weights = [torch.nn.Parameter(torch.full((size,), float(i), device=device)) for i in range(3)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side_stream(device)):
            torch.cuda._sleep(20_000_000)
            merged = _merge_tensors(weights)
        taken = [torch.full((size,), float("nan"), device=device) for _ in range(3)]
        torch.cuda.synchronize()
        assert merged.view(3, size).eq(torch.arange(3.0, device=device)[:, None]).all()
        del taken


@pytest.fixture(params=[0, 1])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device by its number, which is the current one only while it is used."""
    if torch.cuda.device_count() <= request.param:
        pytest.skip("needs two CUDA devices")
    before = torch.cuda.current_device()
    yield f"cuda:{request.param}"
    torch.cuda.set_device(before)


def test_demo_on_a_gpu_says_what_it_says_on_a_cpu(gpu: str, tmp_path: Path) -> None:
    from nla_engine.demo.problems import held_out_problems, prompt_record

    prompts = tmp_path / "problems.jsonl"
    prompts.write_text("".join(json.dumps(prompt_record(problem)) + "\n" for problem in held_out_problems(6)))
    tables = {}
    for device in ("cpu", gpu):
        store = tmp_path / f"{device[:4]}.zarr"
        run_capture(
            CaptureOptions(
                model=str(TRIO / "base"),
                prompts=prompts,
                layer=(5,),
                out=store,
                max_new_tokens=32,
                dtype="float32",
                device=device,
            )
        )
        out = store.with_suffix(".parquet")
        run_roundtrip(
            RoundtripOptions(
                store=store, av=str(TRIO / "av"), ar=str(TRIO / "ar"), out=out, dtype="float32", device=device
            )
        )
        # Sequences are stored as they end, which batches decide.
        tables[device] = (
            pq.read_table(out).sort_by([("sequence", "ascending"), ("position", "ascending")]).to_pylist()
        )
    assert len(tables["cpu"]) == len(tables[gpu])
    pairs = list(zip(tables["cpu"], tables[gpu], strict=True))
    assert all(a["token"] == b["token"] for a, b in pairs)
    assert np.mean([a["explanation"] == b["explanation"] for a, b in pairs]) >= 0.97
    assert np.mean([a["fve_nrm"] for a, _ in pairs]) == pytest.approx(
        np.mean([b["fve_nrm"] for _, b in pairs]), abs=5e-3
    )
