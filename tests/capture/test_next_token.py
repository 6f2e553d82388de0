"""Log-probabilities beside rows are those of log_softmax of plain transformers' float32 logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from commands import call, check_refused, flags
from tiny import byte_tokenizer, language_model, save_model, tiny_model, write_records

from nla_engine.capture.next_token import NextTokenTap
from nla_engine.capture.run import run_capture
from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.following import PromptRows
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError, RequestError, StoreError
from nla_engine.models.load import LanguageModel, load_model, wrap_model
from nla_engine.store import CaptureStore, Finish

K = 3
#: Twelve shared tokens, so that prompts have a prefix; ragged ends.
PROMPTS = [{"prompt": "shared words " + "ab " * (i * 5 % 7) + f"say {i}", "n": i} for i in range(7)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("prompts"), PROMPTS)


def captured(lm: LanguageModel, prompts: Path, out: Path, **changes: Any) -> CaptureStore:
    given = {
        "layer": "1",
        "max_new_tokens": 6,
        "batch_size": 3,
        "device": "cpu",
        "chat": False,
        "next_token": K,
    }
    given |= {"model": lm.name, "prompts": prompts, "out": str(out), **changes}
    run_capture(CaptureOptions(**given), lm=lm)
    return CaptureStore.open(out)


def tiny(architecture: str = "qwen2") -> LanguageModel:
    return wrap_model(tiny_model(architecture), byte_tokenizer(chat=False), name="tiny")


def truth(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """log_softmax of the whole model's logits, float64 [t, V], by transformers alone."""
    lm.model.set_attn_implementation("eager")
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.inference_mode():
        return torch.log_softmax(lm.model(input_ids=ids, use_cache=False).logits[0].double(), -1).numpy()


def check(lm: LanguageModel, store: CaptureStore, close: float = 2e-4, top: int | None = K) -> None:
    """Every row against the truth."""
    position, following = store.column("position"), store.column("next_token_id")
    logprob = store.column("next_logprob")
    assert np.array_equal(np.isnan(logprob), following < 0)
    for sequence in store.iter_sequences():
        own = truth(lm, sequence.tokens)[position[sequence.rows]]
        known = following[sequence.rows] >= 0
        expected = own[known, following[sequence.rows][known]]
        np.testing.assert_allclose(logprob[sequence.rows][known], expected, atol=close)
        if top:
            ids, values = store.column("top_id")[sequence.rows], store.column("top_logprob")[sequence.rows]
            assert ids.shape == values.shape == (len(own), top)
            np.testing.assert_allclose(values, -np.sort(-own)[:, :top], atol=close)
            np.testing.assert_allclose(np.take_along_axis(own, ids.astype(np.int64), 1), values, atol=close)
            assert all(len(set(row)) == top for row in ids.tolist())


@pytest.mark.parametrize(
    ("positions", "kernels"),
    [
        *((positions, "reference") for positions in ("generated", "prompt", "last", "last,generated")),
        ("all", "fused"),
    ],
)
def test_rows_of_replies_and_prompts(prompts: Path, tmp_path: Path, positions: str, kernels: str) -> None:
    lm = tiny()
    store = captured(lm, prompts, tmp_path / "s.zarr", positions=positions, kernels=kernels)
    assert store.rows >= len(PROMPTS) and store.next_token == K
    check(lm, store)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.3, "seed": 5},  # the distribution is that of temperature 1
        {"temperature": 0.7, "top_k": 2, "top_p": 0.5, "replies": 2},  # and before anything is cut
        {"temperature": 1.5, "replies": 3, "positions": "all"},
        {"stop": ("a", "e", "i"), "temperature": 2.0, "max_new_tokens": 20},
        {"tokens": "[a-m]", "every": 2, "positions": "all", "skip_sinks": True},
        {"codec": "int4", "layer": "0,3"},
        {"next_token": 0, "positions": "all"},
    ],
    ids=lambda how: "-".join(how),
)
def test_samples_stops_and_choices_of_rows(prompts: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    lm = tiny()
    store = captured(lm, prompts, tmp_path / "s.zarr", **how)
    check(lm, store, top=how.get("next_token", K))
    if "stop" in how:
        assert Finish.STOP in {sequence.finish for sequence in store.iter_sequences()}
    if how.get("next_token") == 0:
        assert not {"top_id", "top_logprob"} & set(store.arrays("rows"))


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_sequences_that_step_back_and_are_read_again(positions: str) -> None:
    lm, new, slots, keep = tiny(), 24, 4, RowRange.parse(positions)
    rng = np.random.default_rng()
    work = [Request(i, tuple(rng.integers(0, 200, rng.integers(1, 9)).tolist()), new) for i in range(9)]
    stop = StopAutomaton([b""] * lm.vocab_size, ())
    tap = NextTokenTap(K, keep, rows_per_slot=40, device=lm.device)
    told, most = {}, []
    given: Any = {"tap": RowTap((1,), Codec.named("bf16", lm.d_model), keep, rows_per_slot=40,
                                sink_norm={1: np.inf}, device=lm.device)}  # fmt: skip
    with Runner(lm, slots=slots, length=40, blocks=12, block=4, **given) as runner:
        generator = Generator(
            runner, max_new_tokens=new, stop=stop, read_last=True, max_prefill_tokens=16, following=tap
        )
        watch = lambda tally: most.append(tally().stepped_back)  # noqa: E731
        for group in generator.groups(iter(work), watch=watch):
            told |= {each.request.id: each for each in group}
    assert max(most) > 0 and sorted(told) == list(range(9))
    for each in told.values():
        tokens = np.array([*each.request.token_ids, *each.generated])
        own, found = truth(lm, tokens)[each.positions], each.next_tokens
        known = each.positions + 1 < len(tokens)
        expected = own[known, tokens[each.positions[known] + 1]]
        np.testing.assert_allclose(found.next_logprob[known], expected, atol=2e-4)
        assert np.isnan(found.next_logprob[~known]).all() and known.sum() == len(known) - 1
        np.testing.assert_allclose(found.top_logprob, -np.sort(-own)[:, :K], atol=2e-4)


@pytest.mark.parametrize(
    "family",
    [
        ("CohereConfig", {"logit_scale": 0.0625}),
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("Gemma2Config", {"final_logit_softcapping": 1.5, "head_dim": 16}),
    ],
    ids=lambda family: family[0],
)
def test_what_a_family_scales_or_caps(prompts: Path, tmp_path: Path, family: Any) -> None:
    lm = language_model(family[0], **family[1])
    check(lm, captured(lm, prompts, tmp_path / "s.zarr", positions="all"))


@pytest.mark.parametrize(("bytes_", "most"), [(1 << 28, 2048), (4 * 259 * 5, 7)])
def test_a_corpus_runs_the_whole_model(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_: int, most: int
) -> None:
    """Logits of some tokens at a time, and documents that are read in several passes."""
    monkeypatch.setattr("nla_engine.capture.next_token._LOGIT_BYTES", bytes_)
    monkeypatch.setattr("nla_engine.capture.setup.MAX_PREFILL_TOKENS", {"cpu": most})
    lm, said = tiny("gemma3_text"), []
    out = tmp_path / "s.zarr"
    how = {"layer": "1", "corpus": True, "next_token": K, "device": "cpu"}
    options = CaptureOptions(model="tiny", prompts=prompts, out=str(out), **how)  # type: ignore[arg-type]
    run_capture(options, lm=lm, announce=said.append)
    assert any("the whole model runs, for the next tokens" in line for line in said)
    check(lm, CaptureStore.open(out))


def test_bfloat16_within_its_rounding(prompts: Path, tmp_path: Path) -> None:
    lm = wrap_model(tiny_model("qwen2").bfloat16(), byte_tokenizer(chat=False), name="tiny")
    store = captured(lm, prompts, tmp_path / "s.zarr", positions="all")
    wide = wrap_model(tiny_model("qwen2").bfloat16().float(), byte_tokenizer(chat=False), name="wide")
    apart: list[float] = []
    for sequence in store.iter_sequences():
        own = truth(wide, sequence.tokens)[:-1]
        expected = np.take_along_axis(own, sequence.tokens[1:, None].astype(np.int64), 1)[:, 0]
        apart += np.abs(store.column("next_logprob")[sequence.rows][:-1] - expected).tolist()
    assert np.median(apart) < 0.5, "the logits of this model spread over some tens"


@pytest.mark.real
def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Chats of SmolLM2-135M-Instruct, float32: prompts behind a shared system message, replies that end early."""
    questions = ("What is the capital of France? Answer in one word.", "Name a colour.", "Say hello.")
    prompts = write_records(tmp_path, [{"prompt": question} for question in questions])
    out = tmp_path / "s.zarr"
    given = {
        "prompts": prompts,
        "layer": 20,
        "out": out,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
    }
    given |= {"positions": "last,generated", "next_token": K, "max_new_tokens": 12}
    ran = call("capture", smollm2, *flags(given))
    assert ran.code == 0 and "prompt tokens shared" in ran.err
    check(load_model(smollm2, device="cpu", dtype="float32"), CaptureStore.open(out), close=2e-3)


def test_any_reader_sees_plain_arrays(prompts: Path, tmp_path: Path) -> None:
    store = captured(tiny(), prompts, tmp_path / "s.zarr")
    rows = zarr.open_group(tmp_path / "s.zarr", mode="r")["rows"]
    shapes = {
        "next_logprob": ("float32", ("row",)),
        "top_id": ("int32", ("row", "rank")),
        "top_logprob": ("float32", ("row", "rank")),
    }
    for name, (kind, dimensions) in shapes.items():
        assert (rows[name].dtype, rows[name].metadata.dimension_names) == (kind, dimensions)
        assert np.array_equal(rows[name][:], store.column(name), equal_nan=name == "next_logprob")
    assert "next_logprob" in store.fields and "top_id" not in store.fields
    logprob = store.column("next_logprob")
    assert (
        store.where("next_logprob < -1.5 or next_logprob >= -0.1").tolist()
        == np.flatnonzero((logprob < -1.5) | (logprob >= -0.1)).tolist()
    )
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(tmp_path / "s.zarr", group="rows", consolidated=False)
    assert opened["top_logprob"].dims == ("row", "rank")
    from nla_engine.store.views.labelled import open_dataset

    view = open_dataset(store)
    assert view["top_id"].shape == (store.rows, K) and view["next_logprob"].dims == ("row",)
    pandas = pytest.importorskip("pandas")
    frame = store.to_pandas(["next_logprob", "top_id"])
    assert (
        isinstance(frame, pandas.DataFrame)
        and frame["top_id"][2].tolist() == store.column("top_id")[2].tolist()
    )
    pytest.importorskip("polars")
    for lazy in (False, True):
        polars = store.to_polars(["top_logprob", "next_logprob"], lazy=lazy)
        polars = polars.collect() if lazy else polars
        np.testing.assert_array_equal(
            np.array(polars["top_logprob"].to_list(), np.float32), store.column("top_logprob")
        )


def test_a_store_without_them_is_as_before(prompts: Path, tmp_path: Path) -> None:
    store = captured(tiny(), prompts, tmp_path / "s.zarr", next_token=None)
    assert store.next_token is None and "next_token" not in store.attributes
    assert "next_token" not in store.options
    with pytest.raises(StoreError, match="there is no field 'next_logprob'"):
        store.column("next_logprob")


def test_a_run_resumes_with_the_same_choice(prompts: Path, tmp_path: Path) -> None:
    whole = captured(tiny(), prompts, tmp_path / "whole.zarr", positions="all")
    out = tmp_path / "part.zarr"
    with pytest.raises(Enough):
        stopped(tiny(), prompts, out)
    part = CaptureStore.open(out)
    assert 0 < part.sequences < len(PROMPTS)
    for other in (None, 2):
        with pytest.raises(StoreError, match="next_token was 3, is now"):
            captured(tiny(), prompts, out, positions="all", next_token=other, resume=True)
    store = captured(tiny(), prompts, out, positions="all", resume=True)
    check(tiny(), store)
    for name in ("next_logprob", "top_logprob"):
        np.testing.assert_allclose(store.column(name), whole.column(name), atol=1e-4)


class Enough(Exception):
    """Ends a run in its middle."""


def stopped(lm: LanguageModel, prompts: Path, out: Path) -> None:
    from nla_engine.store import StoreWriter

    append, seen = StoreWriter.append_many, []

    def few(self: StoreWriter, sequences: Any, **how: Any) -> None:
        append(self, sequences, **how)
        seen.extend(sequences)
        if len(seen) >= 2:
            self.wait_until_copied()
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "append_many", few)
        captured(lm, prompts, out, positions="all", batch_size=2)


def test_a_value_that_was_never_written_stops_the_run(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = NextTokenTap._keep

    def loses(self: NextTokenTap, logits: Any, slot: Any, position: Any, following: Any) -> None:
        keep(self, logits, slot, torch.where(position == 17, 10_000, position), following)

    monkeypatch.setattr(NextTokenTap, "_keep", loses)
    with pytest.raises(
        EngineError, match="next tokens: [1-9] rows of sequences that ended were never written"
    ):
        captured(tiny(), prompts, tmp_path / "s.zarr", positions="all")


def test_the_staging_refuses_too_many_rows() -> None:
    tap = NextTokenTap(1, RowRange.parse("all"), rows_per_slot=4, device=torch.device("cpu"))
    tap.allocate(2)
    tap.open([0], [2], [4])
    with pytest.raises(EngineError, match="more rows to keep than its slot has room for"):
        tap.open([1], [2], [5])
    assert tap.of_prompts([], 0) == PromptRows()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_token": -1}, "--next-token is -1: it must be 0 to 1024"),
        ({"next_token": 1025}, "--next-token is 1025: it must be 0 to 1024"),
        ({"next_token": 260}, "--next-token is 260: .* has 259 tokens: lower it"),
    ],
)
def test_what_is_refused(prompts: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model(tmp_path / "base")
    out = tmp_path / "s.zarr"
    given = {"prompts": prompts, "layer": 1, "out": out, "device": "cpu", **change}
    check_refused(call("capture", tmp_path / "base", *flags(given)), message)
    assert not out.exists()


def test_a_model_without_a_head_is_refused(prompts: Path, tmp_path: Path) -> None:
    lm = tiny()
    lm.head = None
    with pytest.raises(RequestError, match="--next-token: tiny has no head"):
        captured(lm, prompts, tmp_path / "s.zarr", corpus=True, max_new_tokens=0)


def test_verify_reads_them_again(prompts: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    out = tmp_path / "s.zarr"
    given = {"prompts": prompts, "layer": 1, "out": out, "device": "cpu", "next_token": 2, "positions": "all"}
    assert call("capture", tmp_path / "base", *flags({**given, "max_new_tokens": 5})).code == 0
    ran = call("verify", out, "--model", tmp_path / "base", "--device", "cpu")
    assert ran.code == 0 and "next tokens have the model's log-probabilities" in ran.out
    assert "log-probability of the token behind each row, and the 2 likeliest tokens" in call("info", out).out
    assert call("info", out, "--json").json["next_token"] == 2


@pytest.mark.parametrize("wrong", ["next_logprob", "top_id", "top_logprob"])
def test_verify_finds_values_of_another_row(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """One row of each sequence has the value of the row before."""
    import dataclasses

    from nla_engine.capture.audit import audit

    collect = NextTokenTap.collect

    def shifted(self: NextTokenTap, *given: Any) -> Any:
        found = []
        for each in collect(self, *given):
            values = getattr(each, wrong).copy()
            values[2] = values[1]
            found.append(dataclasses.replace(each, **{wrong: values}))
        return found

    monkeypatch.setattr(NextTokenTap, "collect", shifted)
    lm = tiny()
    checks = {check.name: check.ok for check in audit(captured(lm, prompts, tmp_path / "s.zarr"), lm)}
    assert [name for name, ok in checks.items() if not ok] == [
        "next tokens have the model's log-probabilities"
    ]
