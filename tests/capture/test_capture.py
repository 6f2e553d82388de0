"""Captured rows against transformers' own hidden states: every policy, architecture and batching."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model, write_prompts

from nla_engine.capture import appender, setup
from nla_engine.capture import run as stage
from nla_engine.capture.run import run_capture
from nla_engine.codec.rows import bf16_bits, bf16_values
from nla_engine.config import CaptureOptions
from nla_engine.engine.request import Completion
from nla_engine.errors import EngineError, RequestError, StoreError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.prompts import read_prompts
from nla_engine.store import CaptureStore, Finish, RowFlag
from nla_engine.store.care.verify import verify


def language_model(architecture: str = "qwen2", seed: int = 0) -> LanguageModel:
    return wrap_model(tiny_model(architecture, seed=seed), byte_tokenizer(), name=architecture)


def options(tmp_path: Path, **changes: object) -> CaptureOptions:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    base: dict[str, object] = {
        "model": "in memory",
        "prompts": prompts,
        "layer": (1, 3),
        "out": tmp_path / "run.zarr",
        "max_new_tokens": 9,
        "codec": "bf16",
        "batch_size": 5,
    }
    if changes.get("corpus"):
        del base["max_new_tokens"]
    return CaptureOptions(**{**base, **changes})  # type: ignore[arg-type]


@torch.no_grad()
def block_outputs(lm: LanguageModel, tokens: np.ndarray) -> list[np.ndarray]:
    """Output of every block for one sequence, by transformers alone: hidden_states[K + 1], and for the last block what
    enters the final norm."""
    lm.model.set_attn_implementation("eager")
    entering: list[torch.Tensor] = []
    hook = lm.decoder.norm.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    states = lm.model(
        torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True
    ).hidden_states
    hook.remove()
    return [state[0].numpy() for state in (*states[1:-1], entering[0])]


def check_store(
    lm: LanguageModel, path: Path, positions: str, layers: tuple[int, ...], limit: float
) -> CaptureStore:
    """Every row of the store against the reference; limit: relative L2 of a row."""
    store = CaptureStore.open(path)
    assert store.complete and all(check.ok for check in verify(path))
    seen = 0
    for sequence in store.iter_sequences():
        size, prompt = len(sequence.tokens), sequence.prompt_size
        expected_positions = {
            "generated": range(prompt, size),
            "prompt": range(prompt),
            "all": range(size),
            "last": range(prompt - 1, prompt),
            "last,generated": range(prompt - 1, size),
        }[positions]
        rows = sequence.rows
        assert store.column("position")[rows].tolist() == list(expected_positions)
        assert store.column("token_id")[rows].tolist() == sequence.tokens[list(expected_positions)].tolist()
        following = [*sequence.tokens.tolist(), -1]
        assert store.column("next_token_id")[rows].tolist() == [following[p + 1] for p in expected_positions]
        reference = block_outputs(lm, sequence.tokens)
        for layer in layers:
            got, want = store.layer(layer)[rows], reference[layer][list(expected_positions)]
            error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
            assert error.max(initial=0) <= limit
        seen += rows.stop - rows.start
    assert seen == store.rows > 0
    return store


def equal_but_for_roundings(a: np.ndarray, b: np.ndarray) -> bool:
    """int8 rows of two runs: sums in another order may round a few codes the other way."""
    error = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    return bool(error.max() < 0.01 and (error < 1e-5).mean() > 0.9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_the_block_outputs_of_transformers(architecture: str, tmp_path: Path) -> None:
    lm = language_model(architecture)
    run_capture(options(tmp_path, positions="all", layer=(0, 2, 3)), lm=lm)
    store = check_store(lm, tmp_path / "run.zarr", "all", (0, 2, 3), limit=2**-8)
    for (
        sequence
    ) in store.iter_sequences():  # bfloat16 of the float32 row, up to one unit and to sums in another order
        true = block_outputs(lm, sequence.tokens)[2]
        want, got = bf16_values(bf16_bits(true)), store.layer(2)[sequence.rows]
        noise = 1e-5 * np.abs(true).max()
        assert (np.abs(got - want) <= 2**-7 * np.abs(true) + noise).all() and (got == want).mean() > 0.99


@pytest.mark.parametrize("positions", ["generated", "prompt", "all", "last", "last,generated"])
@pytest.mark.parametrize(("codec", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_policies_and_codecs(positions: str, codec: str, limit: float, tmp_path: Path) -> None:
    lm = language_model()
    run_capture(options(tmp_path, positions=positions, codec=codec, batch_size=3), lm=lm)
    store = check_store(lm, tmp_path / "run.zarr", positions, (1, 3), limit)
    assert set(store.codec_error) == {1, 3}


def test_last_generated_token_has_its_row_and_flags_fit(tmp_path: Path) -> None:
    lm = language_model()
    run_capture(options(tmp_path), lm=lm)
    store = CaptureStore.open(tmp_path / "run.zarr")
    flags = store.column("flags")
    for sequence in store.iter_sequences():
        last = sequence.rows.stop - 1
        assert store.column("token_id")[last] == sequence.tokens[-1]
        assert store.column("next_token_id")[last] == -1
        assert flags[last] & RowFlag.SEQUENCE_END and flags[last] & RowFlag.GENERATED
        assert sequence.source == {"prompt": sequence.source["prompt"], "n": sequence.number}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batching_changes_nothing(batch: int, tmp_path: Path) -> None:
    lm = language_model()
    sampled = {"temperature": 1.0, "seed": 3, "codec": "int8"}
    run_capture(options(tmp_path, out=tmp_path / "a.zarr", batch_size=5, **sampled), lm=lm)
    run_capture(options(tmp_path, out=tmp_path / "b.zarr", batch_size=batch, **sampled), lm=lm)
    a, b = CaptureStore.open(tmp_path / "a.zarr"), CaptureStore.open(tmp_path / "b.zarr")
    assert a.column("token_id").tolist() == b.column("token_id").tolist()
    assert equal_but_for_roundings(a.layer(3)[:], b.layer(3)[:])


def test_a_shared_prefix_changes_nothing(tmp_path: Path) -> None:
    lm = language_model()
    prompts = tmp_path / "prompts.jsonl"
    system = {"role": "system", "content": "You answer with one number and nothing else."}
    records = [{"messages": [system, {"role": "user", "content": "x" * (1 + i % 4)}]} for i in range(9)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    said: list[str] = []
    run_capture(options(tmp_path, prompts=prompts), lm=lm, announce=said.append)
    assert "prompt tokens shared" in said[1]
    check_store(lm, tmp_path / "run.zarr", "generated", (1, 3), limit=2**-8)


def test_corpus_mode_reads_text_and_stops_early(tmp_path: Path) -> None:
    lm = language_model()
    text = tmp_path / "corpus.txt"
    text.write_text("one line of text\nx\n\nanother, somewhat longer line of text, longer than a chunk\n")
    ran = []
    lm.blocks[3].register_forward_hook(lambda *_: ran.append(3))
    run_capture(options(tmp_path, prompts=text, layer=(1,), corpus=True), lm=lm)
    calls_of_calibration = len(ran)
    store = check_store(lm, tmp_path / "run.zarr", "all", (1,), limit=2**-8)
    assert store.sequences == 3 and {s.finish for s in store.iter_sequences()} == {Finish.GIVEN}
    assert (
        len(ran) == calls_of_calibration + 3
    )  # the reference's own three passes: the capture ran no later block
    assert len(lm.blocks) == 4  # and the caller's model is whole


def test_long_prompts_are_read_in_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(setup.MAX_PREFILL_TOKENS, "cpu", 7)
    lm = language_model()
    run_capture(options(tmp_path, positions="all"), lm=lm)
    check_store(lm, tmp_path / "run.zarr", "all", (1, 3), limit=2**-8)


@pytest.mark.parametrize("committed", [0, 1, 6, 11])
def test_interrupted_and_resumed_equals_uninterrupted(committed: int, tmp_path: Path, monkeypatch) -> None:
    lm = language_model()
    sampled = {"temperature": 0.8, "codec": "int8"}
    run_capture(options(tmp_path, out=tmp_path / "whole.zarr", **sampled), lm=lm)
    monkeypatch.setattr(appender, "_TOGETHER", 2)
    real = appender.sequence_rows

    def fail_at(prompt, completion, *rest):
        if completion.request.id == committed:
            raise KeyboardInterrupt
        return real(prompt, completion, *rest)

    monkeypatch.setattr(appender, "sequence_rows", fail_at)
    with pytest.raises(KeyboardInterrupt):
        run_capture(options(tmp_path, **sampled), lm=lm)
    monkeypatch.undo()
    cut = CaptureStore.open(tmp_path / "run.zarr")
    assert (cut.sequences, cut.complete) == (committed, False)  # exactly those before the one that failed
    did: list[int] = []
    run_capture(
        options(tmp_path, resume=True, batch_size=2, **sampled),
        lm=lm,
        progress=lambda done, _: did.append(done),
    )
    assert committed == did[0] and did == sorted(set(did)) and did[-1] == 12
    whole, resumed = CaptureStore.open(tmp_path / "whole.zarr"), CaptureStore.open(tmp_path / "run.zarr")
    assert resumed.complete and all(check.ok for check in verify(tmp_path / "run.zarr"))
    for column in ("token_id", "next_token_id", "position", "sequence", "flags"):
        assert resumed.column(column).tolist() == whole.column(column).tolist()
    assert equal_but_for_roundings(resumed.layer(1)[:], whole.layer(1)[:])


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    lm = language_model()
    first = run_capture(options(tmp_path), lm=lm)
    again = run_capture(options(tmp_path, resume=True), lm=lm)
    assert (again.rows, again.sequences, again.tokens_generated) == (first.rows, first.sequences, 0)


def test_sink_and_nonfinite_rows_come_back_exactly(tmp_path: Path) -> None:
    lm = language_model()
    hidden: dict[str, torch.Tensor] = {}

    def disturb(_module, _inputs, output):
        """Make reads of token '@' sinks and of token '#' NaN, wherever the block is called."""
        tokens = hidden["ids"].reshape(output.shape[:-1])
        output = output.clone()
        output[tokens == ord_id("@")] *= 1000.0
        output[tokens == ord_id("#")] = float("nan")
        return output

    def ord_id(letter: str) -> int:
        return int(lm.tokenizer.encode(letter)[0])

    def remember(_module, inputs):
        hidden["ids"] = inputs[0]

    text = tmp_path / "text.txt"
    text.write_text("a" * 40 + "\n" + "bcd" * 10 + "\nqq@q\nff#\n")
    lm.embedding.register_forward_pre_hook(remember)
    lm.blocks[3].register_forward_hook(disturb)
    summary = run_capture(options(tmp_path, prompts=text, layer=(3,), corpus=True, codec="int8"), lm=lm)
    assert (summary.sink_rows, summary.nonfinite_rows) == (1, 1)
    resumed = options(tmp_path, prompts=text, layer=(3,), corpus=True, codec="int8", resume=True)
    again = run_capture(resumed, lm=lm)
    assert (again.sink_rows, again.nonfinite_rows, again.rows) == (
        1,
        1,
        summary.rows,
    )  # of the store, as its rows
    store = CaptureStore.open(tmp_path / "run.zarr")
    flags, rows = store.column("flags"), store.layer(3)[:]
    sink, bad = np.flatnonzero(flags & RowFlag.SINK), np.flatnonzero(flags & RowFlag.NONFINITE)
    assert store.token_text(store.column("token_id")[[sink[0], bad[0]]]) == ["@", "#"]
    assert np.isnan(rows[bad]).all()
    assert (rows[sink] == bf16_values(bf16_bits(rows[sink]))).all() and np.isfinite(rows[sink]).all()
    assert np.linalg.norm(rows[sink]) > store.sink_norm[3]


def test_a_checkpoint_of_a_pair_is_named(tmp_path: Path) -> None:
    lm, said = language_model(), []
    (tmp_path / "ar").mkdir()
    (tmp_path / "ar" / "nla_meta.yaml").touch()
    run_capture(options(tmp_path, model=str(tmp_path / "ar")), lm=lm, announce=said.append)
    assert "ar is an AV or AR (it has nla_meta.yaml)" in said[0]


#: Most bytes of a sequence of its runs: 9 tokens, their rows of two layers in bf16.
SEQUENCE_BYTES = 9 * (4 + 2 * (2 * 64 + 4))


@pytest.mark.parametrize("sequences", [0.1, 6, 40, 1000])
def test_ended_sequences_are_fetched_within_the_memory_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: float
) -> None:
    """Eight sequences end together, and some of them early: with too little memory they leave one by one."""
    limit, groups = sequences * SEQUENCE_BYTES, []

    def add(self: appender.Appender, group: list[Completion]) -> None:
        assert sum(ended.nbytes for ended in group) <= limit / 4 or len(group) == 1
        groups.append(len(group))
        real(self, group)

    real = appender.Appender.add
    monkeypatch.setattr(appender.Appender, "add", add)
    lm = language_model()
    lm.model.generation_config.eos_token_id = list(range(0, 256, 40))  # so some later ones end first
    write_prompts(tmp_path / "prompts.jsonl", 30)
    run_capture(options(tmp_path, host_memory=limit / 2**30, batch_size=8, temperature=1.0), lm=lm)
    check_store(lm, tmp_path / "run.zarr", "generated", (1, 3), limit=2**-8)
    assert sum(groups) == 30
    assert (max(groups) == 1) == (sequences < 1)
    assert (max(groups) >= 7) == (sequences >= 40)  # with enough memory they leave together


def test_a_row_that_was_never_written_stops_the_run(tmp_path: Path, monkeypatch) -> None:
    from nla_engine.capture import tap

    def lose_one(hidden, dest, stage, sink_norm, **how):
        dest = dest.clone()
        dest[(dest >= 0).nonzero()[-1:]] = -1
        real(hidden, dest, stage, sink_norm, **how)

    real = tap.encode_rows
    lm = language_model()
    calibration = stage.calibrate(lm, read_prompts(options(tmp_path).prompts[0], lm.tokenizer), (1,), CODEC)
    monkeypatch.setattr(stage, "calibrate", lambda *_, **more: calibration)
    monkeypatch.setattr(tap, "encode_rows", lose_one)
    with pytest.raises(EngineError, match="never written"):
        run_capture(options(tmp_path, layer=(1,)), lm=lm)
    assert not CaptureStore.open(tmp_path / "run.zarr").complete


CODEC = stage.Codec.named("bf16", 64)


def test_reference_kernels_take_no_other_way_to_a_row(tmp_path: Path, monkeypatch) -> None:
    """Both its place and its codes come from the reference."""

    def fails(*_: object) -> None:
        raise AssertionError("a kernel was chosen")

    lm = language_model()
    for other in ("nla_engine.capture.tap.row_places", "nla_engine.ops.encode._encode_numba"):
        monkeypatch.setattr(other, fails)
        run_capture(options(tmp_path, kernels="reference", overwrite=True), lm=lm)
        with pytest.raises(AssertionError, match="a kernel was chosen"):
            run_capture(options(tmp_path, out=tmp_path / "other.zarr", overwrite=True), lm=lm)
        monkeypatch.undo()


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    lm = language_model()
    with pytest.raises(RequestError, match="layer 9 does not exist: qwen2 has 4 blocks"):
        run_capture(options(tmp_path, layer=(9,)), lm=lm)
    run_capture(options(tmp_path), lm=lm)
    with pytest.raises(StoreError, match="--resume .* --overwrite"):
        run_capture(options(tmp_path), lm=lm)
    with pytest.raises(StoreError, match="max_new_tokens"):
        run_capture(options(tmp_path, resume=True, max_new_tokens=4), lm=lm)
    with pytest.raises(StoreError, match="weights"):
        run_capture(options(tmp_path, resume=True), lm=language_model(seed=9))
    changed = tmp_path / "changed.jsonl"
    changed.write_text((tmp_path / "prompts.jsonl").read_text().replace('"n": 3', '"n": 33'))
    with pytest.raises(StoreError, match="prompts"):
        run_capture(options(tmp_path, resume=True, prompts=changed), lm=lm)
    before = CaptureStore.open(tmp_path / "run.zarr")
    assert before.complete and before.rows > 0
