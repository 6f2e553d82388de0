"""Every bad input is one line and exit code 2, and what was written before stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
import zarr
from commands import call, capture, check_refused, contents, roundtrip, written
from safetensors.torch import save_file
from store_samples import fill_store
from tiny import MARKER, D, byte_tokenizer, write_prompts, write_sidecar
from tokenizers import normalizers

from nla_engine.codec.rows import Codec

LAYER = 2


@pytest.fixture
def kept(root: Path) -> Iterator[None]:
    """Whatever the test does, the store, the result and the checkpoints keep their bytes."""
    before = contents(root)
    yield
    assert contents(root) == before


CAPTURE_FAULTS: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str]] = {
    "no such layer": (lambda r, t: {"layer": 9}, "layer 9 does not exist: .*base has 4 blocks, 0 to 3"),
    "layer below 0": (lambda r, t: {"layer": -1}, "--layer is .*must be"),
    "layer no number": (
        lambda r, t: {"layer": "1,two"},
        "--layer is '1,two': it must be block numbers from 0 on, ranges such as 5-20, or all, joined",
    ),
    "no prompt file": (lambda r, t: {"prompts": t / "none.jsonl"}, "none.jsonl: no such file"),
    "empty prompt file": (
        lambda r, t: {"prompts": written(t / "p.jsonl", "\n")},
        "p.jsonl: no usable prompt",
    ),
    "prompt not JSON": (
        lambda r, t: {"prompts": written(t / "p.jsonl", '{"prompt": "a"}\n{"prompt": oops}\n')},
        r"p.jsonl, line 2: not JSON, one object per line .*--skip-bad",
    ),
    "prompt in two ways": (
        lambda r, t: {"prompts": written(t / "p.jsonl", '{"prompt": "a", "messages": []}\n')},
        'line 1: has "prompt" and "messages": leave one out',
    ),
    "prompt of nothing": (
        lambda r, t: {"prompts": written(t / "p.jsonl", '{"prompt": ""}\n')},
        "line 1: the prompt is empty",
    ),
    "more new tokens than the model holds": (
        lambda r, t: {"max_new_tokens": 100_000},
        "no room for a prompt beside so many new tokens: lower --max-new-tokens$",
    ),
    "a store without a name": (lambda r, t: {"out": ""}, "--out is '': it must be the name of a store"),
    "a corpus that is sampled": (
        lambda r, t: {"corpus": True, "max_new_tokens": None, "temperature": 1.0},
        "--corpus generates nothing: leave --max-new-tokens and --temperature out",
    ),
    "a corpus that is continued": (lambda r, t: {"corpus": True}, "--corpus generates nothing"),
    "prompt without text": (
        lambda r, t: {"prompts": written(t / "p.jsonl", '{"question": "a"}\n')},
        r'p.jsonl, line 1: no field "prompt" or "messages"',
    ),
    "prompt not UTF-8": (
        lambda r, t: {"prompts": written(t / "p.txt", b"\xff\xfe")},
        "p.txt, line 1: .*UTF-8",
    ),
    "prompts no Parquet": (lambda r, t: {"prompts": written(t / "p.parquet", "no")}, "p.parquet: .*Parquet"),
    "store exists": (lambda r, t: {"out": r / "run.zarr"}, "run.zarr: exists.*--resume .*--overwrite"),
    "file in the way": (
        lambda r, t: {"out": r / "prompts.jsonl", "overwrite": True},
        "prompts.jsonl: a file is in the way",
    ),
    "other directory in the way": (
        lambda r, t: {"out": r / "base", "overwrite": True},
        "base: .*not overwritten",
    ),
    "resumed with other options": (
        lambda r, t: {"out": r / "run.zarr", "resume": True, "max_new_tokens": 5, "temperature": 1.0},
        "run.zarr: cannot be resumed with other options: max_new_tokens was 4, is now 5; temperature",
    ),
    "resumed with other prompts": (
        lambda r, t: {"out": r / "run.zarr", "resume": True, "prompts": write_prompts(t / "p.jsonl", 4)},
        "cannot be resumed with other options: the content of prompts differs",
    ),
    "resume and overwrite": (lambda r, t: {"resume": True, "overwrite": True}, "exclude each other"),
    "no such dtype": (lambda r, t: {"dtype": "float16"}, "'float16' is not supported: use bfloat16 or"),
    "no such codec": (lambda r, t: {"codec": "fp8"}, "--codec is 'fp8': it must be one of"),
    "no such policy": (lambda r, t: {"positions": "some"}, "--positions is 'some': it must be of"),
    "nothing to keep": (lambda r, t: {"max_new_tokens": 0}, "--positions generated keeps nothing"),
    "below zero": (lambda r, t: {"temperature": -1}, "--temperature is -1.0: it must be 0 or more"),
    "seed": (lambda r, t: {"seed": 1 << 70}, r"--seed is \d+: it must be 0 to 2\^63 - 1"),
    "no layer": (
        lambda r, t: {"layer": "3,-1"},
        "--layer is '3,-1': it must be block numbers from 0 on",
    ),
    "a directory without prompts": (lambda r, t: {"prompts": t}, "holds no prompt file .*--prompt-format"),
    "without end": (
        lambda r, t: {"host-memory": "inf"},
        "--host-memory is inf: it must be above 0, and finite",
    ),
    "prompt too long": (lambda r, t: {"max_new_tokens": 500}, "line 1: the prompt has .* the limit is 12"),
    "unknown option": (lambda r, t: {"layers": 2}, "No such option: --layers"),
    "missing option": (lambda r, t: {"layer": None}, "Missing option '--layer'"),
    "no template": (lambda r, t: {"chat": True, "corpus": True}, "--corpus reads text as it is"),
}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("fault", CAPTURE_FAULTS)
def test_capture_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    changes, message = CAPTURE_FAULTS[fault]
    check_refused(call(*capture(root, **{"out": tmp_path / "x.zarr", **changes(root, tmp_path)})), message)
    assert not (tmp_path / "x.zarr").exists()


def changed(directory: Path, to: Path, **sidecar: object) -> Path:
    """A copy of a checkpoint with other sidecar entries."""
    shutil.copytree(directory, to)
    data = yaml.safe_load((to / "nla_meta.yaml").read_text())
    return write_sidecar(to, data | sidecar)


def without_sidecar(root: Path, to: Path) -> Path:
    shutil.copytree(root / "av", to)
    (to / "nla_meta.yaml").unlink()
    return to


def broken_sidecar(root: Path, to: Path) -> Path:
    shutil.copytree(root / "av", to)
    (to / "nla_meta.yaml").write_text("role: [av\n")
    return to


def normalising(root: Path, to: Path) -> Path:
    """An AV whose tokenizer turns the marker into something else before it looks it up."""
    shutil.copytree(root / "av", to)
    tokenizer = byte_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["content"] != MARKER]
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(vocabulary)))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save_pretrained(to)
    return to


def truncated(directory: Path, to: Path, name: str = "model.safetensors") -> Path:
    shutil.copytree(directory, to)
    data = (to / name).read_bytes()
    (to / name).write_bytes(data[: len(data) // 2])
    return to


def with_head(root: Path, to: Path, weight: torch.Tensor) -> Path:
    shutil.copytree(root / "ar", to)
    save_file({"weight": weight}, to / "value_head.safetensors")
    return to


def foreign_group(path: Path) -> Path:
    zarr.open_group(path, mode="w").create_array("x", shape=(3,), dtype="f4")
    return path


def damaged(root: Path, to: Path) -> Path:
    shutil.copytree(root / "run.zarr", to)
    (to / "zarr.json").write_text("{")
    return to


def narrow_store(path: Path) -> Path:
    fill_store(path, Codec.named("int8", 16), [3])
    return path


ROUNDTRIP_FAULTS: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str]] = {
    "wrong width": (
        lambda r, t: {"store": narrow_store(t / "n.zarr")},
        "av is made for vectors of width 64, .*n.zarr holds 16",
    ),
    "wrong layer": (lambda r, t: {"layer": 1}, "--layer 1: this AV and AR were made for layer 2"),
    "AV of another layer": (
        lambda r, t: {"av": changed(r / "av", t / "av", extraction_layer_index=1)},
        "av reads layer 1, .*ar gives layer 2",
    ),
    "AR as AV": (lambda r, t: {"av": r / "ar"}, "ar: is an AR checkpoint, .*swap --av and --ar"),
    "AV as AR": (lambda r, t: {"ar": r / "av"}, "av: is an AV checkpoint, .*swap --av and --ar"),
    "no sidecar": (
        lambda r, t: {"av": without_sidecar(r, t / "av")},
        "nla_meta.yaml: missing; .*is not an NLA",
    ),
    "broken sidecar": (
        lambda r, t: {"av": broken_sidecar(r, t / "av")},
        "nla_meta.yaml: cannot be read as YAML",
    ),
    "marker of two tokens": (
        lambda r, t: {
            "av": changed(r / "av", t / "av", tokens={"injection_char": "ab", "injection_token_id": 7})
        },
        "nla_meta.yaml: the marker 'ab' must encode to the one id 7, .*do not belong together",
    ),
    "marker normalised away": (
        lambda r, t: {"av": normalising(r, t / "av")},
        "the marker .* must encode to the one",
    ),
    "marker twice": (
        lambda r, t: {
            "av": changed(
                r / "av", t / "av", prompt_templates={"av": MARKER + "<concept>{injection_char}</concept>"}
            )
        },
        "must stand once in the prompt, it stands 2 times",
    ),
    "truncated AV": (lambda r, t: {"av": truncated(r / "av", t / "av")}, "model.safetensors: cannot be read"),
    "truncated head": (
        lambda r, t: {"ar": truncated(r / "ar", t / "ar", "value_head.safetensors")},
        "value_head.safetensors: cannot be read",
    ),
    "NaN in the head": (
        lambda r, t: {"ar": with_head(r, t / "ar", torch.full((D, D), torch.nan))},
        "value_head.safetensors: weight holds NaN",
    ),
    "head of another width": (
        lambda r, t: {"ar": with_head(r, t / "ar", torch.zeros(D, D - 1))},
        r"value_head.safetensors: weight has shape \(64, 63\)",
    ),
    "no such AV": (lambda r, t: {"av": t / "none"}, "none: no such directory"),
    "no store": (lambda r, t: {"store": t / "none.zarr"}, "none.zarr"),
    "foreign group": (lambda r, t: {"store": foreign_group(t / "f.zarr")}, "f.zarr"),
    "result in the store": (
        lambda r, t: {"out": r / "run.zarr" / "x.parquet"},
        "x.parquet: lies inside the store .*run.zarr",
    ),
    "result over what is none": (
        lambda r, t: {"out": written(t / "mine.parquet", "{}"), "overwrite": True},
        "mine.parquet: cannot be read as Parquet",
    ),
    "result exists": (
        lambda r, t: {"out": r / "explained.parquet"},
        "explained.parquet: exists; pass --resume .*--overwrite",
    ),
    "resumed with other options": (
        lambda r, t: {"out": r / "explained.parquet", "resume": True, "seed": 5, "limit": 3},
        r"made with other options \(.*limit was not given, is now 3.*seed was 0, is now 5.*--overwrite",
    ),
    "resumed on a foreign file": (
        lambda r, t: {"out": written(t / "mine.parquet", "{}"), "resume": True},
        "mine.parquet: cannot be read as Parquet",
    ),
    "a directory in the way": (
        lambda r, t: {"out": shutil.copytree(r / "base", t / "d.parquet"), "overwrite": True},
        "d.parquet: is a directory",
    ),
    "nothing selected": (lambda r, t: {"where": "position > 999"}, "run.zarr: .*--where 'position > 999'"),
    "where with a fault": (
        lambda r, t: {"where": "position >"},
        "where expression, column 11: it ends too early",
    ),
    "where with no such field": (
        lambda r, t: {"where": "pos > 1"},
        "column 1: there is no field 'pos'.*position",
    ),
    "samples without temperature": (lambda r, t: {"samples": 2}, "--samples above 1 .* give a --temperature"),
    "variance above 1": (lambda r, t: {"variance": 2}, "--variance is 2.0: it must be above 0 and at most 1"),
    "unknown option": (lambda r, t: {"layers": 2}, "No such option: --layers"),
    "missing option": (lambda r, t: {"av": None}, "Missing option '--av'"),
}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("fault", ROUNDTRIP_FAULTS)
def test_roundtrip_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    changes, message = ROUNDTRIP_FAULTS[fault]
    check_refused(
        call(*roundtrip(root, **{"out": tmp_path / "x.parquet", **changes(root, tmp_path)})), message
    )
    assert not list(tmp_path.glob("x.parquet*"))


OTHER_FAULTS: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "export exists": (
        lambda r, t: ["export", r / "run.zarr", "--to", "npy", "--out", written(t / "x.npy", "mine")],
        "x.npy exists: pass --overwrite",
    ),
    "export to what": (
        lambda r, t: ["export", r / "run.zarr", "--to", "csv", "--out", t / "x"],
        "export format 'csv' is unknown: choose one of parquet, nla, datasets, safetensors, npy",
    ),
    "export of nothing": (
        lambda r, t: [
            "export",
            r / "run.zarr",
            "--to",
            "npy",
            "--out",
            t / "x",
            "--where",
            "early and not early",
        ],
        "run.zarr: no row fits",
    ),
    "export of no such layer": (
        lambda r, t: ["export", r / "run.zarr", "--to", "npy", "--out", t / "x", "--layer", 7],
        "layer 7 is not in .*run.zarr: it has 2",
    ),
    "export into the store": (
        lambda r, t: ["export", r / "run.zarr", "--to", "npy", "--out", r / "run.zarr" / "x.npy"],
        "lies inside the store",
    ),
    "export into a damaged store": (
        lambda r, t: ["export", r / "run.zarr", "--to", "npy", "--out", damaged(r, t / "d.zarr") / "x.npy"],
        "x.npy: lies inside the store .*d.zarr",
    ),
    "capture into a store": (
        lambda r, t: capture(r, r / "run.zarr" / "x.zarr"),
        "x.zarr: lies inside the store .*run.zarr",
    ),
    "info of nothing": (lambda r, t: ["info", t / "none"], "none"),
    "info of a foreign group": (lambda r, t: ["info", foreign_group(t / "f.zarr")], "f.zarr"),
    "verify of nothing": (lambda r, t: ["verify", t / "none"], "none"),
    "capture from a directory of checkpoints": (
        lambda r, t: ["capture", r, *capture(r, t / "x")[2:]],
        "has no config.json: give the directory of one checkpoint",
    ),
    "report on what is no table": (
        lambda r, t: ["report", r / "run.zarr", "--explained", r / "prompts.jsonl", "--out", t / "x.html"],
        r"prompts.jsonl: cannot be read as Parquet \(.*\): it is not the table of a round trip$",
    ),
    "demo over someone's store": (
        lambda r, t: ["demo", "--out", r],
        r"run.zarr: exists; choose another --out, or pass --overwrite to replace problems.jsonl",
    ),
    "demo into a file": (
        lambda r, t: ["demo", "--out", written(t / "y", "mine")],
        "y: a file is in the way; choose another --out",
    ),
    "no such command": (lambda r, t: ["narrate"], "No such command 'narrate'"),
    "no argument": (lambda r, t: ["info"], "Missing argument 'STORE'"),
    "demo of one problem": (
        lambda r, t: ["demo", "--problems", 1],
        "'--problems': Input should be greater than or equal to 2",
    ),
}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_other_commands_refuse(fault: str, root: Path, tmp_path: Path) -> None:
    arguments, message = OTHER_FAULTS[fault]
    check_refused(call(*arguments(root, tmp_path)), message)
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("kept")
def test_a_gpu_that_is_not_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (
        capture(root, tmp_path / "x", device="cuda"),
        roundtrip(root, tmp_path / "x.parquet", device="cuda"),
    ):
        check_refused(call(*command), "torch finds no CUDA GPU: pass --device cpu")


@pytest.mark.usefixtures("kept")
def test_a_truncated_base_model(root: Path, tmp_path: Path) -> None:
    model = truncated(root / "base", tmp_path / "cut")
    command = capture(root, tmp_path / "x.zarr")
    check_refused(call("capture", model, *command[2:]), "model.safetensors: cannot be read")


@pytest.mark.parametrize(
    "command",
    [
        ("import", "rows.npy", "--layer", 1, "--out", "s3://bucket/x.zarr"),
        ("export", "a.zarr", "--to", "npy", "--out", "s3://bucket/x.npy"),
    ],
    ids=lambda command: command[0],
)
def test_what_works_on_local_disks_alone_says_so(
    command: tuple[object, ...], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = call(*command)
    assert ran.code == 2 and "has to be on a local disk" in ran.err
    assert not list(tmp_path.iterdir())
