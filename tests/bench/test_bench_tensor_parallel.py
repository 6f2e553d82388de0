"""The bench of models over several GPUs: its shapes and limits, and a run over two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nla_engine.bench import hf_split
from nla_engine.bench.__main__ import main
from nla_engine.bench.hf_split import last_error, write_empty_checkpoint
from nla_engine.bench.limits import Hardware, decode_step_seconds
from nla_engine.bench.shapes import find_shape
from nla_engine.bench.suites.tensor_parallel import whole_size
from nla_engine.engine.split import Split
from nla_engine.models.weights import check_checkpoint

H100 = Hardware(copy=3.0e12, flops=790e12)


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama3-70b", 70.55), ("qwen2.5-72b", 72.71), ("gemma3-27b", 27.01)]
)
def test_shapes_are_the_published_ones_and_can_be_split(shape: str, billions: float) -> None:
    config = find_shape(shape).config()
    size = whole_size(shape, torch.bfloat16)
    tied = bool(config.tie_word_embeddings)
    whole = size.parameters + (0 if tied else size.head_parameters)  # and the embedding
    assert whole == pytest.approx(billions * 1e9, rel=2e-3)
    split = Split(shape, config, 3, 4)
    model = split.empty_model(torch.bfloat16, headless=False)
    quarter = split.weight_bytes(model)
    embedding = size.head_parameters * 2
    assert quarter == pytest.approx((whole * 2 - embedding) / 4 + embedding, rel=1e-3)


def test_the_limit_of_llama_70b_on_four_gpus() -> None:
    size = whole_size("llama3-70b", torch.bfloat16)
    assert 256 / decode_step_seconds(size, H100.times(4), 256, 250) == pytest.approx(18_700, rel=0.03)


def test_the_suite_runs_over_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    command = "tensor-parallel --shape tiny --device cpu --repeats 1 --requests 5 --new-tokens 3"
    assert main(command.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["failed"]
    cases = [line["case"] for line in result["lines"]]
    assert cases == [
        "2 GPUs steady B=4 context 24 no tap",
        "2 GPUs steady B=4 context 24 layer 2",
        "2 GPUs tap cost B=4",
        "2 GPUs AV 5 vectors 125+3 B=4",
        "2 GPUs AR 5 texts 140 tokens 3 blocks",
    ]


def test_one_gpu_is_too_few() -> None:
    assert (
        main(["tensor-parallel", "--shape", "tiny", "--device", "cpu", "--gpus", "1", "--repeats", "1"]) == 2
    )


def test_the_checkpoint_for_transformers_has_no_data_but_is_whole(tmp_path) -> None:
    config = find_shape("tiny").config()
    write_empty_checkpoint(tmp_path, config, torch.float32)
    check_checkpoint(tmp_path, headless=False, remote_code=False)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(weight.any() for name, weight in model.named_parameters() if "norm" not in name)


def test_the_error_of_a_job_is_its_own() -> None:
    assert last_error("x\n[rank1]: ValueError: why\nmore\n") == "[rank1]: ValueError: why"
    assert last_error("") == "nothing said"


def test_a_baseline_that_fails_is_reported_with_its_reason(tmp_path: Path) -> None:
    """Here of a directory without a job; its processes have ended."""
    with pytest.raises(RuntimeError, match=r"transformers' own failed: FileNotFoundError.*job\.json"):
        hf_split.run(tmp_path, tmp_path / "rates.json", 2, 100.0)
    with pytest.raises(RuntimeError, match="was not done after 0 s"):
        hf_split.run(tmp_path, tmp_path / "rates.json", 1, 0.0)
