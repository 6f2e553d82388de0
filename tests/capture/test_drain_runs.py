"""Whole runs with rings of 16 rows and little memory: against transformers, and against runs whose rows all stay."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from played_graphs import Stepped
from tiny import byte_tokenizer, tiny_model, write_records

from nla_engine.capture import calibrate, outbox, spill, staging
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.run import run_capture
from nla_engine.capture.spill import RowKeeper
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec, bf16_bits, bf16_values
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import WriteError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

LAYERS, NEW = (0, 2), 60


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")


def requests(rng: np.random.Generator, prefix: tuple[int, ...], twins: bool) -> list[Request]:
    """Prompts of up to 40 tokens after the prefix, some read only; of those that go on some have a twin."""
    made: list[Request] = []
    for _ in range(14):
        ids = tuple(rng.integers(1, 250, int(rng.integers(1, 40))).tolist())
        new = int(rng.integers(1, NEW + 1)) * int(twins or rng.random() < 0.8)
        made.append(Request(len(made), ids, new))
        if twins and rng.random() < 0.3:
            made.append(Request(len(made), ids, new, again=True))
    return made


def generated(
    lm: LanguageModel,
    work: list[Request],
    positions: str,
    prefix: tuple[int, ...],
    keeper: RowKeeper,
    replayed: bool,
) -> dict[int, Completion]:
    tap = RowTap(
        LAYERS, keeper.codec, RowRange.parse(positions), rows_per_slot=NEW, sink_norm=dict.fromkeys(LAYERS, np.inf),
        device=lm.device, keeper=keeper,
    )  # fmt: skip
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), tuple(range(0, 250, 60)))
    with (
        Runner(lm, slots=5, length=110, prefix=prefix, tap=tap) as runner,
        pytest.MonkeyPatch.context() as patch,
    ):
        generator = Generator(runner, max_new_tokens=NEW, stop=stop, read_last=True, max_prefill_tokens=17)
        if replayed:  # as with graphs: several steps at a time, the last of them after the look
            patch.setattr(Runner, "graphable", True)
            cache = runner.cache
            step = partial(generator._step, longest=cache.prefix_size + cache.size)
            patch.setattr(
                generator,
                "_graph",
                lambda lanes, steps: Stepped(step, lanes + 2, cache.spare, lm.device, None),
            )
        return {ended.request.id: ended for ended in generator.run(iter(work))}


@torch.no_grad()
def block_output(lm: LanguageModel, tokens: list[int], layer: int) -> np.ndarray:
    """By transformers alone, float32 [n, d]."""
    lm.model.set_attn_implementation("eager")
    states = lm.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return states[layer + 1][0].numpy()


@pytest.mark.parametrize(
    ("positions", "shared", "steps"),
    [("generated", 9, STEPS_BETWEEN_POLLS), ("all", 0, STEPS_BETWEEN_POLLS), ("last,generated", 0, 1)],
)
def test_rows_are_those_of_transformers_and_the_same_bits_as_rows_that_stay(
    positions: str,
    shared: int,
    steps: int,
    lm: LanguageModel,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = tuple(rng.integers(1, 250, shared).tolist())
    work, codec = requests(rng, prefix, positions == "generated"), Codec.named("bf16", lm.d_model)
    stays, leaves = RowKeeper(codec, len(LAYERS)), RowKeeper(codec, len(LAYERS), 20_000)
    one = generated(lm, work, positions, prefix, stays, steps > 1)
    monkeypatch.setattr(staging, "RING_BYTES", 0)
    monkeypatch.setattr(outbox, "PORTION_BYTES", 5 * codec.row_bytes * len(LAYERS))
    other = generated(lm, work, positions, prefix, leaves, steps > 1)
    assert (stays.peak == 0) == (positions == "generated"), "rows of passes make room for the next"
    assert 0 < leaves.peak <= 20_000
    keep = RowRange.parse(positions)
    assert sorted(one) == sorted(other) == [request.id for request in work]
    for id_, ended in other.items():
        request = ended.request
        tokens = [*prefix, *request.token_ids, *ended.generated.tolist()]
        given = len(tokens) - len(ended.generated)
        wanted = np.arange(keep.first(given), keep.end(given, len(tokens)))
        assert ended.generated.tolist() == one[id_].generated.tolist()
        assert ended.positions.tolist() == one[id_].positions.tolist() == wanted.tolist()
        for layer in LAYERS:
            rows, again = ended.rows[layer], one[id_].rows[layer]
            for name in ("codes", "scales", "norm", "exact_index"):
                assert (getattr(rows, name) == getattr(again, name)).all(), (id_, layer, name)
            true = block_output(lm, tokens, layer)[wanted]
            got, want = rows.decode(codec), bf16_values(bf16_bits(true))
            assert (np.abs(got - want) <= 2**-7 * np.abs(true) + 1e-5 * np.abs(true).max(initial=0)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_rows_leave_between_the_launches_of_a_graph(
    positions: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of rows that all stay, also if each portion is held up, so that the host falls behind."""
    model = tiny_model("qwen2").to("cuda", torch.bfloat16)
    lm = wrap_model(model, byte_tokenizer(), name="tiny")
    work, codec = requests(rng, (), positions == "generated"), Codec.named("bf16", lm.d_model)
    one = generated(lm, work, positions, (), RowKeeper(codec, len(LAYERS)), False)
    monkeypatch.setattr(staging, "RING_BYTES", 0)
    monkeypatch.setattr(outbox, "PORTION_BYTES", 5 * codec.row_bytes * len(LAYERS))
    monkeypatch.setattr(outbox, "UNDERWAY_BYTES", 3 * outbox.PORTION_BYTES)
    real = outbox.Outbox._receive

    def late(*given: object) -> None:
        time.sleep(0.001)
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(outbox.Outbox, "_receive", late)
    leaves = RowKeeper(codec, len(LAYERS), 20_000)
    other = generated(lm, work, positions, (), leaves, False)
    assert 0 < leaves.peak <= 20_000
    for id_, ended in other.items():
        assert ended.generated.tolist() == one[id_].generated.tolist()
        assert ended.positions.tolist() == one[id_].positions.tolist()
        for layer in LAYERS:
            assert (ended.rows[layer].codes == one[id_].rows[layer].codes).all(), (id_, layer)


def options(tmp_path: Path, out: str, **changes: object) -> CaptureOptions:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["x" * (1 + 7 * i % 31) + str(i) for i in range(9)]
    prompts = write_records(tmp_path, [{"prompt": text} for text in texts])
    base: dict[str, object] = {
        "model": "in memory",
        "prompts": prompts,
        "layer": LAYERS,
        "out": tmp_path / out,
    }
    base |= {"batch_size": 5, "max_new_tokens": NEW, "temperature": 1.0, "chat": False}
    return CaptureOptions(**{**base, **changes})  # type: ignore[arg-type]


@pytest.fixture
def keepers(monkeypatch: pytest.MonkeyPatch) -> list[RowKeeper]:
    """The keepers of the runs to come, whose rings are small."""
    made: list[RowKeeper] = []
    real = RowKeeper.beside

    def beside(*given: object) -> RowKeeper:
        made.append(real(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(staging, "RING_BYTES", 0)
    monkeypatch.setattr(RowKeeper, "beside", beside)
    return made


def same(one: Path, other: Path, bits: bool) -> None:
    """Check that two stores hold the same rows, and the same bits if every pass had the same tokens."""
    a, b = CaptureStore.open(one), CaptureStore.open(other)
    assert all(check.ok for check in verify(other)) and b.complete and a.rows == b.rows > 0
    for name in ("token_id", "next_token_id", "position", "sequence", "flags"):
        assert a.column(name).tolist() == b.column(name).tolist()
    for layer in LAYERS:
        error = np.linalg.norm(a.layer(layer)[:] - b.layer(layer)[:], axis=1)
        assert error.max() <= (0 if bits else 0.01) * np.linalg.norm(a.layer(layer)[:], axis=1).min()


@pytest.mark.parametrize(
    "given",
    [
        {"positions": "all"},
        {"positions": "all", "tokens": "[0-9a-m]", "every": 2, "skip_sinks": True},
    ],
    ids=["all", "chosen"],
)
def test_memory_for_rows_is_bounded_and_the_rest_is_in_files(
    given: dict,
    lm: LanguageModel,
    tmp_path: Path,
    keepers: list[RowKeeper],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 20_000
    monkeypatch.setattr(calibrate, "SINK_FACTOR", 8)  # no last bit decides
    run_capture(options(tmp_path, "whole.zarr", **given), lm=lm)
    assert keepers[0].peak > limit / 4 and not keepers[0].spilled
    run_capture(options(tmp_path, "little.zarr", host_memory=limit / 2**30, **given), lm=lm)
    real = RowKeeper.beside
    monkeypatch.setattr(RowKeeper, "beside", lambda *of_run: real(*of_run[:-1], limit))
    run_capture(options(tmp_path, "spilled.zarr", **given), lm=lm)  # little for running sequences only
    for keeper, out in zip(keepers[1:], ("little.zarr", "spilled.zarr"), strict=True):
        assert 0 < keeper.peak <= limit / 4 and keeper.spilled > limit
        same(tmp_path / "whole.zarr", tmp_path / out, bits=out == "spilled.zarr")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["little.zarr", "p.jsonl", "spilled.zarr", "whole.zarr"]


def test_files_lie_beside_the_store_and_have_no_name(
    lm: LanguageModel, tmp_path: Path, keepers: list[RowKeeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full ends the run: what is committed stays, and the run goes on later. Nothing else is left."""
    run_capture(options(tmp_path, "whole.zarr"), lm=lm)
    real, calls, seen = os.pwrite, [], set()

    def full(file: int, data: memoryview, at: int) -> int:
        calls.append(file)
        place = Path(os.readlink(f"/proc/self/fd/{file}").removesuffix(" (deleted)"))
        seen.add(place.parent)
        assert not place.exists()
        if len(calls) > 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    some = options(tmp_path, "cut.zarr", host_memory=1e-6)
    with pytest.raises(
        WriteError, match=f"{tmp_path}: rows of running .* cannot be written here: No space left"
    ):
        run_capture(some, lm=lm)
    assert seen == {tmp_path}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.zarr", "p.jsonl", "whole.zarr"]
    assert not CaptureStore.open(tmp_path / "cut.zarr").complete
    open_files = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    assert not any("(deleted)" in name and str(tmp_path) in name for name in open_files)
    monkeypatch.setattr(os, "pwrite", real)
    run_capture(options(tmp_path, "cut.zarr", resume=True), lm=lm)
    a, b = CaptureStore.open(tmp_path / "whole.zarr"), CaptureStore.open(tmp_path / "cut.zarr")
    assert b.complete and a.column("position").tolist() == b.column("position").tolist()


@pytest.mark.parametrize("part", [1, 100, 10**9])
def test_a_system_that_writes_less_than_it_was_given(
    part: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row file returns what was written, also once only some rows are kept."""
    codec, real = Codec.named("int8", 32), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:part], at))
    monkeypatch.setattr(spill, "_COPIED_BYTES", 100)
    whole = spill.HostRows(
        rng.integers(-127, 128, (26, 3, codec.code_width), np.int8),
        rng.standard_normal((26, 3, codec.scale_width)).astype(np.float16),
        rng.standard_normal((26, 3)).astype(np.float32),
    )
    file = spill.RowFile(codec, 3, 40, None)
    for start, stop in ((10, 26), (0, 1), (4, 4), (1, 10)):
        file.write(start, whole.part(start, stop))
    index = np.flatnonzero(rng.random(26) < 0.5)
    for want in (whole, whole.chosen(index)):
        for got, expected in zip(file.rows(want.size).arrays, want.arrays, strict=True):
            assert got.dtype == expected.dtype and (got == expected).all()
        if want is whole:
            file.compact(index)
    rows = file.rows(len(index))
    file.close()
    assert (rows.norm == whole.norm[index]).all()


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_what_is_unfinished_when_a_run_stops(
    positions: str, lm: LanguageModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of every token that has been read, those on the host and those on the device."""
    monkeypatch.setattr(staging, "RING_BYTES", 0)
    codec, keep = Codec.named("bf16", lm.d_model), RowRange.parse(positions)
    tap = RowTap(
        LAYERS, codec, keep, rows_per_slot=NEW, sink_norm=dict.fromkeys(LAYERS, np.inf), device=torch.device("cpu")
    )  # fmt: skip
    stop, turns = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), ()), 0
    work = [Request(i, tuple(rng.integers(1, 250, int(rng.integers(1, 30))).tolist()), NEW) for i in range(9)]
    with Runner(lm, slots=5, length=110, tap=tap) as runner:
        generator = Generator(runner, max_new_tokens=NEW, stop=stop, read_last=True, max_prefill_tokens=17)
        assert list(generator.unfinished()) == []
        real: Callable = generator._advance

        def stops(*given: object) -> None:
            nonlocal turns
            turns += 1
            if turns == 45:
                raise KeyboardInterrupt
            real(*given)

        monkeypatch.setattr(generator, "_advance", stops)
        done: list[Completion] = []
        with pytest.raises(KeyboardInterrupt):
            done.extend(generator.run(iter(work)))
        found = list(generator.unfinished())
        assert {each.finish for each in found} == {Finish.PARTIAL}
        assert len(found) >= 3 and len({each.request.id for each in [*found, *done]}) == len(found) + len(
            done
        )
        for each in found:
            tokens = [*each.request.token_ids, *each.generated.tolist()]
            given = len(each.request.token_ids)
            wanted = list(range(keep.first(given), keep.end(given, len(tokens))))
            assert 25 < len(each.generated) < NEW and each.positions.tolist() == wanted
            want = block_output(lm, tokens, 2)[wanted]
            lm.model.set_attn_implementation("nla_engine")
            error = np.linalg.norm(each.rows[2].decode(codec) - want, axis=1) / np.linalg.norm(want, axis=1)
            assert error.max() < 2**-7


def test_staging_does_not_grow_with_length() -> None:
    """The 7B shape, all layers, 512 sequences of up to 30,000 tokens: less than 2 GiB, and what is under way."""
    codec = Codec.named("int8", 3584)
    made = staging.Staging(
        range(28), codec, slots=512, longest=30_000, steps=8, given=8192, device=torch.device("meta")
    )
    tensors = {
        id(t): t for stages in (made.decoding, made.reading) for s in stages.values() for t in (s.exact,)
    }
    size = sum(t.nbytes for t in (*made.all.tensors, *tensors.values()))
    assert size <= 3 << 29 and size + outbox.UNDERWAY_BYTES <= 2 << 30
    assert made.ring >= 16 and made.given_size >= 3900
