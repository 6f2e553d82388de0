"""The benchmarks: their formulas give the published limits, results survive a file, and the command runs end to end."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nla_engine.bench.__main__ import main
from nla_engine.bench.limits import (
    Hardware,
    ModelSize,
    decode_step_seconds,
    generate_seconds,
    long_seconds,
    patch_seconds,
    prefill_seconds,
)
from nla_engine.bench.report import COLUMNS, Line, Machine, append_csv, read_csv, to_json
from nla_engine.bench.settings import Settings
from nla_engine.bench.shapes import MARKER, SHAPES, character_tokenizer, random_model, twin
from nla_engine.bench.timing import percentiles
from nla_engine.bench.workload import document_lengths, ragged_lengths, texts
from nla_engine.errors import RequestError
from nla_engine.models.load import wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.roundtrip.verbalize import Explanation

CPU = torch.device("cpu")
#: One NVIDIA H200, as measured for docs/performance.md.
H200 = Hardware(copy=4.26e12, flops=782e12)


@pytest.fixture(scope="module")
def size_7b() -> ModelSize:
    """Counted from a model on the meta device: all of its shapes, none of its memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["qwen2.5-7b"].config(), dtype=torch.bfloat16)
    return ModelSize.of(wrap_model(model, None, name="meta"))


# ---- formulas ----


def test_model_size_of_qwen_7b(size_7b: ModelSize) -> None:
    assert size_7b.block_parameters == pytest.approx(233.05e6, rel=1e-4)
    assert size_7b.parameters * size_7b.itemsize == pytest.approx(14.14e9, rel=1e-3)
    assert (size_7b.blocks, size_7b.kv_bytes) == (28, 57_344)


def test_limits_of_generation(size_7b: ModelSize) -> None:
    case_a = 512 * 128 / generate_seconds(size_7b, H200, 512, 64, 128, 512)
    assert case_a == pytest.approx(35_500, rel=2e-3)
    steady = 512 / decode_step_seconds(size_7b, H200, 512, 250)
    assert steady == pytest.approx(47_000, rel=1e-2)
    small = decode_step_seconds(size_7b, H200, 1, 0)
    assert small == pytest.approx(
        14.14e9 / 4.26e12, rel=1e-3
    )  # few sequences: reading the weights is what takes time


def test_limits_count_experts_windows_and_states() -> None:
    """By hand, from the published sizes."""
    from transformers import AutoModelForCausalLM

    sizes = {}
    for name in ("gpt-oss-20b", "qwen3.6-27b", "deepseek-v2-lite"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=torch.bfloat16)
        sizes[name] = ModelSize.of(wrap_model(model, None, name="meta"))
    oss, hybrid, lite = sizes.values()
    assert oss.parameters + 201_088 * 2880 == pytest.approx(20.9e9, rel=2e-3)
    assert oss.blocks * oss.active + 2 * oss.head_parameters == pytest.approx(
        3.6e9 + 201_088 * 2880, rel=0.02
    )
    expert = 3 * 2880 * 2880 + 3 * 2880  # gate, up and down, with their biases
    assert oss.expert_parameters == 32 * expert
    assert oss.parameters - oss.read(1) == pytest.approx(24 * 28 * expert)
    assert oss.read(256) == pytest.approx(oss.parameters)
    per_token = 2 * 8 * 64 * 2 * 12  # of twelve blocks
    assert oss.kept_bytes(2, 250, 0) == 2 * per_token * (250 + 128)
    assert oss.kept_bytes(2, 250, 200) == per_token * (2 * 50 + 200) + per_token * (2 * 50 + 78)
    assert oss.kept_bytes(2, 100, 0) == 2 * per_token * (100 + 100)
    assert hybrid.parameters + 248_320 * 5120 == pytest.approx(26.9e9, rel=3e-3)
    state = 48 * (48 * 128 * 128 * 4 + (2 * 16 + 48) * 128 * 3 * 2)
    assert hybrid.state_bytes == state and hybrid.kv_bytes == 16 * 2 * 4 * 256 * 2
    assert hybrid.kept_bytes(3, 10, 0) == 3 * (10 * hybrid.kv_bytes + 2 * state)
    assert lite.parameters + 102_400 * 2048 == pytest.approx(15.7e9, rel=2e-3)
    assert lite.blocks * lite.active + 2 * lite.head_parameters == pytest.approx(2.66e9, rel=0.01)
    assert lite.kv_bytes == 27 * (512 + 64) * 2 and lite.windowed_bytes == 0
    assert lite.blocks * lite.expert_parameters == 26 * 64 * 3 * 2048 * 1408


def test_limit_of_replies_of_different_lengths(size_7b: ModelSize) -> None:
    """Step by step: whoever has tokens left takes part, with the tokens that it has so far."""
    left = [5, 1, 3, 3, 8]
    total = prefill_seconds(size_7b, H200, 500)
    for step in range(8):
        batch = sum(length > step for length in left)
        total += decode_step_seconds(size_7b, H200, batch, 100 + step)
    assert long_seconds(size_7b, H200, 100, left) == pytest.approx(total)
    equal = long_seconds(size_7b, H200, 100, [7] * 40)
    assert equal == pytest.approx(generate_seconds(size_7b, H200, 40, 100, 7, 40), rel=0.01)


def test_limits_of_the_other_work(size_7b: ModelSize) -> None:
    corpus = 1 / prefill_seconds(size_7b, H200, 1, blocks=21)
    av = 2048 / generate_seconds(size_7b, H200, 2048, 125, 120, 512, shared=111)
    ar = 1 / prefill_seconds(size_7b, H200, 140, blocks=21)
    assert corpus == pytest.approx(80_000, rel=2e-3)
    assert av == pytest.approx(400, rel=1.5e-2)
    assert ar == pytest.approx(571, rel=2e-3)
    assert 1 / (1 / av + 1 / ar) == pytest.approx(229, rel=2.5e-2)
    patched = 1 / patch_seconds(size_7b, H200, 1, blocks=7)
    assert patched == pytest.approx(782e12 / (2 * (7 * 233.05e6 + 152_064 * 3584)), rel=1e-4)
    assert patched > 150_000


# ---- work of known size ----


def test_a_character_is_a_token() -> None:
    tokenizer = character_tokenizer(500)
    text = texts([37])[0]
    assert len(tokenizer.encode(text)) == len(text) == 37
    assert len(tokenizer.encode(MARKER)) == 1
    ids = list(range(1, 500))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert len(tokenizer) == 500
    assert b"".join(token_bytes(tokenizer, 500)).decode() == tokenizer.decode(range(500))


def test_ragged_lengths() -> None:
    lengths = ragged_lengths(512, 16, 2048)
    assert (min(lengths), max(lengths), len(lengths)) == (16, 2048, 512)
    assert abs(sorted(lengths)[256] - (16 * 2048) ** 0.5) < 3, "half of them below the geometric mean"
    assert lengths != sorted(lengths) and lengths == ragged_lengths(512, 16, 2048)


def test_document_lengths() -> None:
    lengths = document_lengths(256, 741, 2048)
    assert abs(sum(lengths) / 256 - 741) < 1
    assert min(lengths) >= 16 and max(lengths) <= 2048
    assert lengths == document_lengths(256, 741, 2048)


def test_twin_shares_weights_not_modules() -> None:
    lm = random_model("tiny", CPU, torch.float32)
    other = twin(lm)
    assert other.blocks[0] is not lm.blocks[0]
    assert all(a is b for a, b in zip(lm.model.parameters(), other.model.parameters(), strict=True))
    assert lm.eos_ids == ()


# ---- results ----


def test_percentiles() -> None:
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_csv_round_trip(tmp_path: Path) -> None:
    machine = Machine("2026-01-02T03:04:05+00:00", "abc1234", "a GPU, with a comma", "torch 2.11")
    theirs = Line("generate", "theirs", "tok/s", [50.0])
    ours = Line("generate", "ours", "tok/s", [100.0, 110.0, 120.0], limit=220.0)
    ours.compare(None, Line("generate", "slower", "tok/s", [40.0]), theirs)
    path = tmp_path / "new" / "results.csv"
    append_csv(path, machine, "a-model", [ours])
    append_csv(path, machine, "a-model", [theirs])
    first, second = read_csv(path)
    assert (first["case"], second["case"]) == ("a-model: ours", "a-model: theirs")
    assert list(first) == COLUMNS
    assert (first["gpu"], first["p20"], first["p50"], first["p80"]) == (
        "a GPU, with a comma",
        104.0,
        110.0,
        116.0,
    )
    assert (first["limit"], first["limit_fraction"]) == (220.0, 0.5)
    assert (first["baseline"], first["baseline_p50"], first["ratio"]) == ("theirs", 50.0, 2.2)
    assert second["limit"] is second["ratio"] is None
    assert to_json(machine, [ours])["lines"][0]["ratio"] == 2.2
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read_csv(path)


def test_commit_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLA_COMMIT", "fedcba9")
    assert Machine.here(CPU).commit == "fedcba9"


ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tables.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_pages_are_those_of_the_results(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0
    assert len(tables.FIGURES) == 6


def test_tables(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = ("theirs", "generate", "two: case")
    monkeypatch.setattr(tables, "FIGURES", (tables.Figure("ours", "GPU", "generate", "one: case", (peer,)),))
    old = Machine("2026-01-01T00:00:00+00:00", "aaa", "GPU", "torch")
    new = Machine("2026-01-02T00:00:00+00:00", "bbb", "GPU", "torch")
    results, readme, page = (
        tmp_path / name for name in ("benchmarks/results", "README.md", "docs/benchmarks.md")
    )
    append_csv(results / "a.csv", new, "one", [Line("generate", "case", "tok/s", [2000.0], limit=4000.0)])
    append_csv(results / "b.csv", old, "one", [Line("generate", "case", "tok/s", [1000.0])])
    page.parent.mkdir()
    for path in (readme, page):
        path.write_text(f"before\n{tables.START}\nstale\n{tables.END}\nafter\n")
    arguments = ["--root", str(tmp_path)]
    assert tables.main(arguments) == 2
    assert "no result of suite generate on GPU is called 'two: case'" in capsys.readouterr().err
    append_csv(results / "b.csv", old, "two", [Line("generate", "case", "tok/s", [3000.0])])
    assert tables.main([*arguments, "--check"]) == 1 and "stale" in readme.read_text()
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert "| generate | case | 2,000 tok/s | 50% |  | bbb |" in text
    assert "1,000" not in text and "stale" not in text
    assert "## one, GPU\n\nMeasured 2026-01-02" in text and "## two, GPU\n\nMeasured 2026-01-01" in text
    assert "| ours | GPU | 2,000 tok/s | 50% | theirs: 3,000 tok/s |" in readme.read_text()
    for path in (readme, page):
        assert path.read_text().startswith("before\n") and path.read_text().endswith("\nafter\n")
    assert tables.main([*arguments, "--check"]) == 0
    page.write_text("no table")
    assert tables.main(arguments) == 2


# ---- the command ----


def run(arguments: str) -> int:
    return main([*arguments.split(), "--device", "cpu"])


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, object_file, store = tmp_path / "out.csv", tmp_path / "out.json", tmp_path / "store"
    code = run(
        "generate kernels --shape tiny --requests 5 --prompt-tokens 6 --new-tokens 4 --repeats 2 --baseline hf "
        f"--csv {table} --json {object_file} --store {store}"
    )
    result = result_of(capsys)
    assert not result["failed"] and not result["skipped"] and code == 0
    assert result == json.loads(object_file.read_text())
    lines = {line["case"]: line for line in result["lines"]}
    assert any(case.startswith("encode int8 1024 x 64") for case in lines)
    (cut,) = (line for case, line in lines.items() if case.startswith("choose 4 ") and "top-k" in case)
    assert cut["baseline"].endswith(", sampled") and cut["unit"] == "GB/s"
    assert lines["gate and up 2048 x 2 x 96 x 64, two launches"]["unit"] == "TFLOP/s"
    assert "HF generate static cache, no capture B=5 6+4" in lines
    assert lines["5 x 6+4 layer 2 to disk"]["baseline"].startswith("HF generate ")
    job = lines["5 x 6+4 no tap"]
    assert job["unit"] == "tok/s" and job["repeats"] == 2
    assert 0 < job["p20"] <= job["p50"] <= job["p80"] < job["limit"]
    assert "5 x 6+4 layer 2 to disk" in lines and "steady B=4 context 24 layer 2" in lines
    assert "5 x 4-64 (mean 25)+4 layer 2 to disk" in lines and "1 x 6+4 layer 2" in lines
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    assert [row[COLUMNS.index("case")] for row in rows] == [f"tiny: {case}" for case in lines]
    assert list(store.iterdir()) == []  # captured data is removed


def test_other_suites(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        "corpus verbalize reconstruct patch roundtrip store prompts --shape tiny --requests 5 --new-tokens 3 "
        "--repeats 1 --baseline hf"
    )
    result = result_of(capsys)
    assert result["failed"] == [] and code == 0
    compared = {line["suite"] for line in result["lines"] if line["ratio"]}
    assert compared == {"corpus", "verbalize", "reconstruct", "patch", "roundtrip", "store", "prompts"}
    lines = {line["case"]: line["p50"] for line in result["lines"]}
    av, ar, both = (
        lines[f"5 {case}"]
        for case in ("vectors 111+14+3 B=4", "texts 140 tokens 3 blocks", "vectors 125+3 and 20")
    )
    assert lines["5 vectors 125+3 and 20: longer than AV and AR in turn"] == pytest.approx(
        100 * ((1 / both) / (1 / av + 1 / ar) - 1), rel=0.01, abs=0.1
    )


def test_what_does_not_fit_the_time_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store --shape tiny --time-limit 0.000001") == 0
    result = result_of(capsys)
    assert result["lines"] == [] and len(result["skipped"]) == 11


def test_a_failed_case_is_reported_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it(*_: object) -> None:
        raise OSError("no such thing")

    monkeypatch.setattr("nla_engine.bench.suites.store.CaptureStore.open", break_it)
    assert run("store --shape tiny --repeats 1") == 1
    result = result_of(capsys)
    assert [entry["error"] for entry in result["failed"]] == ["OSError: no such thing"] * 5
    assert len(result["lines"]) == 6


def test_wrong_work_has_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nla_engine.bench.suites.verbalize.Verbalizer.explain",
        lambda self, rows, **options: [Explanation(0, "", "ok", 1)],
    )
    assert run("verbalize --shape tiny --repeats 1 --requests 3") == 1
    result = result_of(capsys)
    assert "explanations instead of 3" in result["failed"][0]["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "store --shape none",
        "store --repeats 0",
        "store --batch-size 0",
        "store --baseline vllm",
        "store --repeats many",
    ],
)
def test_wrong_requests(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_results_that_could_not_be_kept_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_engine.bench.__main__.run_suites", lambda *_: pytest.fail("it has begun"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "mine"}')
    for option, fault in (
        (f"--csv {prompts}", f"--csv {prompts}: its columns are not date,commit"),
        (f"--csv {tmp_path}", f"--csv {tmp_path}: cannot be written: Is a directory"),
        (f"--csv {prompts}/x.csv", "cannot be written"),
        (f"--json {prompts}/x.json", "cannot be written"),
        (f"--profile {prompts}", "no directory to write to"),
        (f"--store {prompts}/x", "no directory to write to"),
        (f"--plot {prompts}", "no directory to write to"),
    ):
        assert run(f"kernels --shape tiny {option}") == 2
        assert fault in capsys.readouterr().err
    assert prompts.read_text() == '{"prompt": "mine"}' and list(tmp_path.iterdir()) == [prompts]


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nla_engine.bench.suites.store._zarr_write", interrupt)
    assert run(f"store kernels codec --shape tiny --repeats 1 --csv {tmp_path / 'out.csv'}") == 1
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["interrupted"] and not result["failed"] and "before anything" not in err
    assert [line["case"].split()[0] for line in result["lines"]] == ["write", "read"]
    assert [name.split(":")[0] for name in result["skipped"]] == ["store", "kernels", "codec"]
    assert len(read_csv(tmp_path / "out.csv")) == 2


def test_options_change_the_sizes() -> None:
    settings = Settings(("store",), CPU, torch.float32, requests=3, batch_sizes=(16, 8), new_tokens=5)
    sizes = settings.sizes
    assert (sizes.requests, sizes.documents, sizes.vectors, sizes.new) == (3, 3, 3, 5)
    assert (sizes.batches, sizes.slots) == ((8, 16), 16)
    with pytest.raises(RequestError, match="new-tokens"):
        Settings(("store",), CPU, torch.float32, new_tokens=0)
