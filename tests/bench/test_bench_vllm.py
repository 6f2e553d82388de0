"""vLLM as a peer of the benchmarks: what it is asked to do and what becomes of its answer. A stand-in plays it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_engine.bench.__main__ import main
from nla_engine.bench.vllm_peer import _visible

STAND_IN = """
import json, os, pathlib, sys, time
from types import SimpleNamespace as Some

__version__ = "9.8.7"
seen = pathlib.Path(__file__).parent / "seen.jsonl"

def note(**what):
    with seen.open("a") as file:
        print(json.dumps(what), file=file)

class LLM:
    def __init__(self, model, **options):
        if os.environ.get("STAND_IN") == "fails":
            raise ValueError("no room\\nfor the cache")
        if os.environ.get("STAND_IN") == "has another process that fails":
            print("(EngineCore pid=7) ERROR [core.py:9] ModuleNotFoundError: No module named 'sampler'")
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        config = json.loads(pathlib.Path(model, "config.json").read_text())
        note(visible=os.environ["CUDA_VISIBLE_DEVICES"], config=config, **options)

    def generate(self, prompts, sampling, use_tqdm):
        note(prompts=[prompt["prompt_token_ids"] for prompt in prompts], sampling=[vars(each) for each in sampling])
        time.sleep(0.01)
        less = os.environ.get("STAND_IN") == "stops early"
        assert len(prompts) == len(sampling)
        return [Some(outputs=[Some(token_ids=[1] * (each.max_tokens - less))]) for each in sampling]

class SamplingParams(Some):
    pass
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose vLLM notes what it is asked."""
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(STAND_IN)
    (site / "vllm-9.8.7.dist-info").mkdir()
    (site / "vllm-9.8.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 9.8.7\n"
    )
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def run(
    python: Path, suites: str, capsys: pytest.CaptureFixture[str], *more: str, repeats: int = 2
) -> tuple[int, dict[str, Any]]:
    options = "--shape tiny --device cpu --requests 3 --prompt-tokens 6 --new-tokens 4"
    code = main([*suites.split(), *options.split(), "--repeats", str(repeats), "--vllm", str(python), *more])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_same_work(python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(python, "generate verbalize", capsys, "--csv", str(tmp_path / "out.csv"))
    assert code == 0 and result["failed"] == []
    lines = {line["case"]: line for line in result["lines"]}
    job = lines["vLLM 9.8.7 3 x 6+4 B=3, no capture"]
    assert 0 < job["p50"] < 3 * 4 / 0.01 and job["repeats"] == 2
    assert lines["3 x 6+4 layer 2 to disk"]["baseline"] == job["case"]
    av = lines["vLLM 9.8.7 token ids 111+14+4 B=3, prefix cached"]
    assert 0 < av["p50"] < 3 / 0.01
    assert lines["3 vectors 111+14+4 B=3"]["ratio"] == pytest.approx(
        lines["3 vectors 111+14+4 B=3"]["p50"] / av["p50"], rel=1e-3
    )
    assert (tmp_path / "out.csv").read_text().count("vLLM") == 4, "two lines, and two that name them"

    seen = [json.loads(line) for line in (tmp_path / "site" / "vllm" / "seen.jsonl").read_text().splitlines()]
    engines = [entry for entry in seen if "config" in entry]
    assert [entry["enable_prefix_caching"] for entry in engines] == [False, True]
    for engine in engines:
        assert engine["visible"] == "", "figures of a CPU"
        assert engine["config"]["architectures"] == ["Qwen2ForCausalLM"]
        assert (engine["config"]["hidden_size"], engine["config"]["num_hidden_layers"]) == (64, 4)
        assert (engine["load_format"], engine["dtype"], engine["max_num_seqs"]) == ("dummy", "float32", 3)
    runs = [entry for entry in seen if "prompts" in entry]
    assert len(runs) == 2 * (1 + 2), "a warm-up and two repeats each"
    assert all(each["ignore_eos"] and each["max_tokens"] == 4 for r in runs for each in r["sampling"])
    for number, (size, shared) in enumerate([(6, 0)] * 3 + [(125, 111)] * 3):
        prompts = runs[number]["prompts"]
        assert [len(ids) for ids in prompts] == [size] * 3
        assert (
            len({tuple(ids[:shared]) for ids in prompts}) == 1 and len({tuple(ids) for ids in prompts}) == 3
        )
        assert all(0 <= i < 512 for ids in prompts for i in ids)
    assert runs[3]["prompts"][0][:111] == runs[4]["prompts"][0][:111], "cached by the warm-up"
    assert len({json.dumps(entry["prompts"]) for entry in runs}) == len(runs), "no prompt is met twice"


def test_each_long_reply_has_its_own_length(
    python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(python, "long", capsys)
    assert code == 0 and result["failed"] == []
    peer, *ours = result["lines"]
    assert peer["case"].startswith("vLLM 9.8.7 3 x 12+") and len(ours) == 4
    assert all((line["baseline"] == peer["case"]) == ("to disk" in line["case"]) for line in ours)
    seen = [json.loads(line) for line in (tmp_path / "site" / "vllm" / "seen.jsonl").read_text().splitlines()]
    warm_up, *repeats = (entry for entry in seen if "prompts" in entry)
    for entry in repeats:
        lengths = [each["max_tokens"] for each in entry["sampling"]]
        assert len(set(lengths)) == 3 and round(sum(lengths) / 3) == 40
    assert [each["max_tokens"] for each in warm_up["sampling"]] == [min(new, 64) for new in lengths]
    assert all([len(ids) for ids in entry["prompts"]] == [12] * 3 for entry in (warm_up, *repeats))
    (engine,) = (entry for entry in seen if "config" in entry)
    assert engine["max_model_len"] == 12 + max(lengths)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fails", "RuntimeError: vLLM ended with 1: ValueError: no room"),
        ("has another process that fails", "ModuleNotFoundError: No module named 'sampler'"),
        ("stops early", "vLLM gave 9 tokens to 3 requests"),
    ],
)
def test_what_vllm_did_not_do_is_named(
    how: str, message: str, python: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN", how)
    code, result = run(python, "generate", capsys, repeats=1)
    assert code == 1
    (failure,) = result["failed"]
    assert failure["case"].startswith("vLLM 9.8.7") and message in failure["error"]
    assert any(line["case"] == "3 x 6+4 layer 2 to disk" for line in result["lines"]), "the others go on"


def test_vllm_gets_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_visible(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")] == ["", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [_visible(torch.device(name)) for name in ("cuda:0", "cuda:1")] == ["5", "3"]


@pytest.mark.parametrize("what", ["nothing there", "no interpreter", "no vLLM"])
def test_without_vllm_nothing_is_measured(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "python"
    if what == "no interpreter":
        path.write_text("no program")
        path.chmod(0o755)
    elif what == "no vLLM":
        path = Path(sys.executable)
    assert main(["generate", "--shape", "tiny", "--device", "cpu", "--vllm", os.fspath(path)]) == 2
    assert f"error: --vllm {path}: " in capsys.readouterr().err
