"""Rows chosen while they are captured: against a capture of all of them, filtered afterwards in numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer, tiny_model, write_records

from nla_engine.capture import appender, calibrate, run
from nla_engine.capture.audit import audit
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.outbox import Outbox
from nla_engine.capture.run import run_capture
from nla_engine.capture.spill import Piece
from nla_engine.capture.staging import Rows
from nla_engine.config import CaptureOptions
from nla_engine.errors import RequestError, StoreError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import matching_tokens, special_tokens, token_bytes
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.care.verify import verify

COLUMNS = ("token_id", "next_token_id", "position", "sequence", "flags")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def _many_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has no sinks: here every row somewhat above the median is one."""
    monkeypatch.setattr(calibrate, "SINK_FACTOR", 1.05)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one token to about 80, with special tokens; the last ones without a digit."""
    rng = np.random.default_rng()
    pieces = ["a", "bc ", "<|im_start|>", "<|im_end|>", "37", "\n", "é"]
    texts = ["x" + "".join(rng.choice(pieces, rng.integers(0, 40))) for _ in range(9)]
    return write_records(
        tmp_path_factory.mktemp("prompts"), [{"prompt": t} for t in [*texts, "7", "no digit", "x"]]
    )


def options(prompts: Path, out: Path, **changes: object) -> CaptureOptions:
    base: dict[str, object] = {"model": "in memory", "prompts": prompts, "layer": (0, 1, 3), "out": str(out)}
    base |= {"batch_size": 5, "max_new_tokens": 12, "temperature": 1.0, "positions": "all", "chat": False}
    return CaptureOptions(**{**base, **changes})  # type: ignore[arg-type]


def filtered(whole: CaptureStore, choice: dict) -> np.ndarray:
    """The rows that a choice without --per-document leaves, int64 [n]."""
    position, flags = whole.column("position"), whole.column("flags")
    kept = np.ones(whole.rows, bool)
    if "tokens" in choice:
        kept[:] = False
        kept[whole.where(f"token matches '{choice['tokens']}'")] = True
    kept &= position % choice.get("every", 1) == 0
    kept &= position >= choice.get("min_position", 0)
    if choice.get("skip_first"):
        kept &= position != 0
    if choice.get("skip_special"):
        kept &= ~special_tokens(byte_tokenizer(), 259)[whole.column("token_id")]
    if choice.get("skip_sinks"):
        kept &= (flags & RowFlag.SINK == 0) | (flags & RowFlag.NONFINITE != 0)
    return np.flatnonzero(kept)


def same_rows(some: CaptureStore, whole: CaptureStore, rows: np.ndarray) -> None:
    """Check that `some` holds these rows of `whole` and no others, bit for bit, and all of its sequences."""
    assert some.layers == whole.layers and some.sequences == whole.sequences
    for name in COLUMNS:
        assert some.column(name).tolist() == whole.column(name)[rows].tolist(), name
    for layer in some.layers:
        assert (some.layer(layer)[:] == whole.layer(layer)[rows]).all()
        assert some.layer(layer).norm().tolist() == whole.layer(layer).norm()[rows].tolist()
    for a, b in zip(some.iter_sequences(), whole.iter_sequences(), strict=True):
        assert (a.tokens.tolist(), a.source, a.finish) == (b.tokens.tolist(), b.source, b.finish)


CHOICES = [
    {"tokens": "[0-9]"},
    {"every": 5, "skip_first": True},
    {"skip_sinks": True},
    {"tokens": "[a-z0-9]", "every": 3, "min_position": 4, "skip_special": True, "skip_sinks": True},
]


@pytest.mark.parametrize(
    ("positions", "codec"),
    [("all", "int8"), ("generated", "bf16"), ("last,generated", "int4"), ("prompt", "int8")],
)
def test_chosen_rows_are_those_of_a_whole_run(
    positions: str, codec: str, lm: LanguageModel, prompts: Path, tmp_path: Path
) -> None:
    given: dict[str, object] = {"positions": positions, "codec": codec}
    if positions == "generated":
        given |= {"chat": True, "system": "Say."}
    said: list[str] = []
    run_capture(options(prompts, tmp_path / "all.zarr", **given), lm=lm, announce=said.append)
    assert ("prompt tokens shared" in said[-1]) == (positions == "generated")
    whole = CaptureStore.open(tmp_path / "all.zarr")
    partly = 0
    for number, choice in enumerate(CHOICES):
        out = tmp_path / f"{number}.zarr"
        summary = run_capture(options(prompts, out, **given, **choice), lm=lm)
        some, rows = CaptureStore.open(out), filtered(whole, choice)
        same_rows(some, whole, rows)
        assert summary.rows == len(rows) and all(check.ok for check in verify(out))
        assert {name: some.provenance["options"][name] for name in choice} == choice
        partly += 0 < len(rows) < whole.rows
    assert partly >= 2, "the choices choose"
    assert (some.row_sizes() == 0).any() or positions != "prompt", "some sequences have no row"
    assert all(check.ok for check in audit(some, lm))


@pytest.mark.parametrize("long", [{}, {"long": "windows", "max_tokens": 9}])
def test_drawn_rows_are_among_those_left_and_sinks_go_last(
    long: dict, lm: LanguageModel, prompts: Path, tmp_path: Path
) -> None:
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    prompts = write_records(tmp_path, [{"text": text} for text in texts])
    given = {"corpus": True, "chat": None, "max_new_tokens": 0, "temperature": 0, **long}
    choice = {"tokens": "[^3]", "every": 2, "skip_first": True}
    run_capture(options(prompts, tmp_path / "all.zarr", **given), lm=lm)
    run_capture(options(prompts, tmp_path / "drawn.zarr", **given, **choice, per_document=3), lm=lm)
    run_capture(
        options(prompts, tmp_path / "less.zarr", **given, **choice, per_document=3, skip_sinks=True), lm=lm
    )
    whole, drawn, less = (CaptureStore.open(tmp_path / f"{name}.zarr") for name in ("all", "drawn", "less"))
    left = filtered(whole, choice)
    place = {
        (s, p): row
        for row, (s, p) in enumerate(zip(whole.column("sequence"), whole.column("position"), strict=True))
    }
    rows = np.array(
        [place[key] for key in zip(drawn.column("sequence"), drawn.column("position"), strict=True)]
    )
    assert set(rows) <= set(left)
    same_rows(drawn, whole, rows)
    document = np.array(
        [
            sequence.source["nla_window"]["document"] if long else sequence.number
            for sequence in whole.iter_sequences()
        ]
    )
    owners = document[whole.column("sequence")]
    most = np.minimum(np.bincount(owners[left], minlength=12), 3)
    assert np.bincount(owners[rows], minlength=12).tolist() == most.tolist()
    same_rows(less, drawn, filtered(drawn, {"skip_sinks": True}))
    assert less.rows < drawn.rows


@pytest.mark.parametrize("given", [{"positions": "generated"}, {"max_new_tokens": 0, "temperature": 0}])
def test_only_chosen_rows_leave_the_device(
    given: dict, lm: LanguageModel, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all rows wait for the end of their sequences, or the choice is known from the start. Sinks leave it too:
    they are few, and are left out on the host."""
    moved: list[int] = []
    send = Outbox.send

    def counted(self: Outbox, rows: Rows, pieces: Sequence[Piece]) -> None:
        assert all(piece.size == piece.held.most for piece in pieces), "rows leave before the end"
        moved.append(len(rows.norm))
        send(self, rows, pieces)

    def calibrated(*given: object, **more: object) -> object:
        out = calibrate.calibrate(*given, **more)  # type: ignore[arg-type]
        moved.clear()
        return out

    monkeypatch.setattr(Outbox, "send", counted)
    monkeypatch.setattr(run, "calibrate", calibrated)
    tokens = {"tokens": "[a-z0-9]"}
    stored = []
    for number, more in enumerate(({}, tokens, {**tokens, "skip_sinks": True})):
        out = tmp_path / f"{number}.zarr"
        stored.append(run_capture(options(prompts, out, **given, **more), lm=lm).rows)
        assert sum(moved) == 3 * stored[min(number, 1)]
    assert 0 < stored[2] < stored[1] < stored[0]


def test_an_interrupted_run_chooses_the_same(
    lm: LanguageModel, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SINK_FACTOR", 8)  # far from every norm: no last bit decides
    choice = {"tokens": "[a-z7]", "every": 2, "skip_first": True, "skip_sinks": True, "layer": "all"}
    run_capture(options(prompts, tmp_path / "whole.zarr", **choice), lm=lm)
    real = appender.sequence_rows

    def fails(prompt, completion, *rest):
        if completion.request.id == 6:
            raise KeyboardInterrupt
        return real(prompt, completion, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(appender, "_TOGETHER", 1)
        patch.setattr(appender, "sequence_rows", fails)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(prompts, tmp_path / "cut.zarr", **choice), lm=lm)
    assert CaptureStore.open(tmp_path / "cut.zarr").sequences == 6
    others = {"tokens": "[a-z8]", "every": 3, "skip_first": False, "skip_sinks": False, "layer": "0-2"}
    for name, other in others.items():
        with pytest.raises(StoreError, match=f"other options: {name} was"):
            run_capture(
                options(prompts, tmp_path / "cut.zarr", resume=True, **{**choice, name: other}), lm=lm
            )
    again = {**choice, "layer": "0-3", "resume": True, "batch_size": 2, "host_memory": 1e-6}
    run_capture(options(prompts, tmp_path / "cut.zarr", **again), lm=lm)
    whole, cut = CaptureStore.open(tmp_path / "whole.zarr"), CaptureStore.open(tmp_path / "cut.zarr")
    order, again_order = (np.argsort(each.column("sequence"), kind="stable") for each in (whole, cut))
    for name in ("position", "token_id", "sequence"):
        assert whole.column(name)[order].tolist() == cut.column(name)[again_order].tolist()
    for layer in whole.layers:
        a, b = whole.layer(layer)[order], cut.layer(layer)[again_order]
        np.testing.assert_allclose(a, b, rtol=0.01, atol=0.1)


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("all", (0, 1, 2, 3)),
        ("1-2", (1, 2)),
        ("3,0-1", (0, 1, 3)),
        (["2", "0-0, 2"], (0, 2)),
        (["all", "1"], (0, 1, 2, 3)),
        (3, (3,)),
        (np.int64(1), (1,)),
        (range(2), (0, 1)),
    ],
)
def test_layers(
    given: object, layers: tuple[int, ...], lm: LanguageModel, prompts: Path, tmp_path: Path
) -> None:
    """Names of layers are numbers in the store, in its options and in the summary."""
    said: list[str] = []
    read = {"positions": "last", "max_new_tokens": 1}
    summary = run_capture(
        options(prompts, tmp_path / "a.zarr", layer=given, **read), lm=lm, announce=said.append
    )
    run_capture(options(prompts, tmp_path / "b.zarr", layer=layers, **read), lm=lm)
    a, b = CaptureStore.open(tmp_path / "a.zarr"), CaptureStore.open(tmp_path / "b.zarr")
    assert a.layers == layers and summary.layers == list(layers)
    assert a.options["layer"] == a.provenance["options"]["layer"] == list(layers)
    same_rows(a, b, np.arange(b.rows))
    dry = options(prompts, tmp_path / "c.zarr", layer=given, dry_run=True, **read)
    estimate = estimate_capture(dry, lm=lm)
    assert estimate.layers == list(layers) and f"{estimate.rows} rows" in said[-1]
    assert estimate.bytes == b.codec.row_bytes * b.rows * len(layers)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("", "'': it must be block numbers from 0 on, ranges such as 5-20, or all, joined by commas"),
        ((), "'': it must be block numbers"),
        ("3-", "'3-': it must be"),
        ("-3", "'-3': it must be"),
        ("1,,2", "'1,,2': it must be"),
        ("every", "'every': it must be"),
        ("all,x", "'all,x': it must be"),
        ((1, 2.5), "'1,2.5': it must be"),
        (True, "'True': it must be"),
        ("³", "'³': it must be"),
        ("1,5-2", "'1,5-2': 5-2 ends before it begins"),
        ("0-99999999", "no model has as many blocks as 0-99999999"),
    ],
)
def test_layers_that_are_none(given: object, fault: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        options(prompts, tmp_path / "x.zarr", layer=given)
    assert str(refused.value).startswith("--layer is ") and fault in str(refused.value)


def test_choices_that_can_keep_nothing(lm: LanguageModel, prompts: Path, tmp_path: Path) -> None:
    for choice, fault in [
        ({"layer": "2-4"}, "layer 4 does not exist: tiny has 4 blocks, 0 to 3"),
        ({"tokens": "xyz"}, "--tokens 'xyz' matches no token of tiny"),
        ({"tokens": "im_", "skip_special": True}, "'im_' matches special tokens alone: leave --skip-special"),
        ({"every": 500}, "no row would be left of any prompt: change --positions or --every"),
        ({"positions": "prompt", "tokens": "Q"}, "would be left of any prompt: change --positions or --tokens"),
        ({"tokens": "("}, r"--tokens is '\(': it must be a regular expression: missing \)"),
        ({"tokens": "a{99999999999}"}, "must be a regular expression: the repetition number is too large"),
        ({"tokens": ""}, "--tokens is '': it must be a regular expression: this is empty"),
        ({"tokens": "\udcff"}, "--tokens is .*: it must be text in UTF-8"),
        ({"every": 0}, "--every is 0: it must be 1 or more"),
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=fault):
            run_capture(options(prompts, tmp_path / "x.zarr", **{"skip_first": True} | choice), lm=lm)
        assert not (tmp_path / "x.zarr").exists()


def test_a_run_that_happens_to_keep_nothing(lm: LanguageModel, prompts: Path, tmp_path: Path) -> None:
    run_capture(options(prompts, tmp_path / "all.zarr", positions="generated"), lm=lm)
    seen = set(CaptureStore.open(tmp_path / "all.zarr").column("token_id").tolist())
    names = byte_tokenizer().convert_ids_to_tokens(range(256))
    other = next(
        name for id_, name in enumerate(names) if id_ not in seen and name.isascii() and name.isupper()
    )
    summary = run_capture(
        options(prompts, tmp_path / "none.zarr", positions="generated", tokens=other), lm=lm
    )
    store = CaptureStore.open(tmp_path / "none.zarr")
    assert (summary.rows, store.rows, store.sequences, store.complete) == (0, 0, 12, True)
    assert all(check.ok for check in [*verify(tmp_path / "none.zarr"), *audit(store, lm)])


def test_a_dry_run_expects_the_rows_that_come(lm: LanguageModel, prompts: Path, tmp_path: Path) -> None:
    read = {"max_new_tokens": 0, "temperature": 0}
    for choice, given in (
        ({"tokens": "[a-z]", "every": 2, "skip_first": True}, read),
        ({"skip_sinks": True}, read),
        ({"every": 3, "tokens": "[^7]", "skip_sinks": True}, {}),
    ):
        taken = options(prompts, tmp_path / "x.zarr", overwrite=True, **given, **choice)
        summary = run_capture(taken, lm=lm)
        dry = options(prompts, tmp_path / "none.zarr", dry_run=True, **given, **choice)
        estimate = estimate_capture(dry, lm=lm)
        assert estimate.rows >= summary.rows and ("skip_sinks" in choice or estimate.rows == summary.rows)
        assert abs(estimate.rows_expected - summary.rows) <= (0.3 * summary.rows if not given else 0)


def test_tokens_match_by_their_text(lm: LanguageModel) -> None:
    texts = token_bytes(lm.tokenizer, lm.vocab_size)
    found = matching_tokens(texts, "[0-9]")
    assert [texts[id_] for id_ in np.flatnonzero(found)] == [str(digit).encode() for digit in range(10)]
    halves = np.flatnonzero(matching_tokens(texts, "^\ufffd$"))
    assert [texts[id_][0] for id_ in halves].count(0xC3) == 1 and len(halves) == 128
