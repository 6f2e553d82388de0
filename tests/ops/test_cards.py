"""Which code a card runs, and what is chosen and said on it: with stand-in cards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
from commands import call

from nla_engine import extension
from nla_engine.capture import setup
from nla_engine.codec.rows import Codec
from nla_engine.config import RoundtripOptions
from nla_engine.errors import RequestError
from nla_engine.models import load as models
from nla_engine.ops import (
    attention,
    backends,
    cards,
    encode,
    fp8,
    gate,
    gated_linear,
    norm,
    places,
    rotary,
    sampling,
)
from nla_engine.ops.cards import HOPPER, Card, runs
from nla_engine.roundtrip import pair

GPU = torch.device("cuda", 0)
#: What CMakeLists.txt asks for, and what it once did.
EVERY = "sm_80 compute_80 sm_86 sm_89 sm_90a sm_100 sm_120 compute_120"
HOPPER_ALONE = "sm_90a"
OLD_NVCC = "sm_80 compute_80 sm_86 sm_89 sm_90a"
ASKED = (cards._card, backends.cuda_fault, backends.triton_fault, fp8.fp8_fault)


@pytest.mark.parametrize(
    ("code", "run", "not_run"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_80", [(8, 0), (8, 7), (9, 0), (11, 0), (12, 1), (13, 0)], [(7, 5)]),
        ("compute_120", [(12, 0), (12, 1), (13, 0)], [(11, 0)]),
        ("gfx942", [], [(9, 4), (9, 0)]),
    ],
)
def test_which_code_a_card_runs(
    code: str, run: list[tuple[int, int]], not_run: list[tuple[int, int]]
) -> None:
    assert all(runs(capability, [code]) for capability in run)
    assert not any(runs(capability, [code]) for capability in not_run)


def test_what_is_built_by_default_runs_on_every_card_from_ampere_on() -> None:
    every = [
        (8, 0),
        (8, 6),
        (8, 7),
        (8, 9),
        (9, 0),
        (10, 0),
        (10, 3),
        (11, 0),
        (12, 0),
        (12, 1),
        (13, 0),
        (20, 5),
    ]
    for built in (EVERY, OLD_NVCC):
        assert all(runs(capability, built.split()) for capability in every), built
        assert not runs((7, 5), built.split())


@dataclasses.dataclass
class StandIn:
    """What the machine is taken to be: its card, what the extension was built for, what CUDA and Triton say."""

    capability: tuple[int, int] = HOPPER
    name: str = "NVIDIA Stand-In"
    built: str | None = EVERY
    gated: bool = True
    cuda: str = ""
    triton: str = ""
    shared: int = 227 * 1024

    @property
    def card(self) -> Card:
        return Card(0, self.name, self.capability, self.shared)

    def module(self) -> SimpleNamespace | None:
        if self.built is None:
            return None
        tiles = [(128, 128)] if self.gated else []
        return SimpleNamespace(
            cuda=bool(self.built),
            cuda_architectures=self.built,
            gated_tiles=tiles,
            cuda_fault=lambda number: self.cuda,
        )

    def try_triton(self, device: torch.device) -> None:
        if self.triton:
            raise RuntimeError(self.triton + "\nand more")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """stand(capability=..., built=...): from here on this machine has such a card."""

    def install(**given: object) -> StandIn:
        machine = StandIn(**given)  # type: ignore[arg-type]
        for asked in ASKED:
            asked.cache_clear()
        for module in (cards, backends, encode, gated_linear, fp8, models):
            monkeypatch.setattr(module, "card_of", lambda device: machine.card)
        monkeypatch.setattr(extension, "_import", lambda: (machine.module(), "not built"))
        monkeypatch.setattr(backends, "_try_triton", machine.try_triton)
        return machine

    yield install
    for asked in ASKED:
        asked.cache_clear()


#: machine; rows are encoded by; Triton's kernels run; the gated product's do; dtype; what is said
CHOICES = [
    ({"capability": (8, 0)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (8, 6)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (8, 9)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (9, 0)}, "cuda", True, True, torch.bfloat16, []),
    ({"capability": (10, 0)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (11, 0)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (12, 1)}, "cuda", True, False, torch.bfloat16, []),
    ({"capability": (13, 0)}, "cuda", True, False, torch.bfloat16, []),
    (
        {"capability": (7, 5), "name": "Tesla T4"}, "torch", False, False, torch.float32,
        [
            r"GPU 0 \(Tesla T4, compute capability 7\.5\): Triton needs compute capability 8\.0: everything .* torch",
            r"GPU 0 .*: the extension is compiled for sm_80 .* compute_120: rows .* NLA_CUDA_ARCH=75$",
        ],
    ),
    (
        {"capability": (7, 5), "built": "sm_75"}, "cuda", False, False, torch.float32,
        [r"Triton needs compute capability 8\.0"],
    ),
    (
        {"capability": (12, 0), "built": HOPPER_ALONE}, "torch", True, False, torch.bfloat16,
        [r"the extension is compiled for sm_90a: rows are encoded by plain torch.* NLA_CUDA=1 NLA_CUDA_ARCH=120$"],
    ),
    ({"capability": (8, 6), "built": "sm_89"}, "torch", True, False, torch.bfloat16, [r"NLA_CUDA_ARCH=86$"]),
    ({"capability": (12, 0), "built": OLD_NVCC, "gated": False}, "cuda", True, False, torch.bfloat16, []),
    (
        {"built": OLD_NVCC, "gated": False}, "cuda", True, False, torch.bfloat16,
        [r"GPU 0 .*: the extension has no gated product for Hopper.*nvcc 12\.5"],
    ),
    ({"built": ""}, "torch", True, False, torch.bfloat16, [r"^the compiled extension has no CUDA part.*NLA_CUDA=1$"]),
    ({"built": None}, "torch", True, False, torch.bfloat16, [r"^the compiled extension is missing \(not built\)"]),
    (
        {"cuda": "CUDA driver version is insufficient for CUDA runtime version"},
        "torch", True, False, torch.bfloat16,
        [r"GPU 0 .* does not load \(CUDA driver version is insufficient .*\): rows .*; update the NVIDIA driver"],
    ),
    (
        {"triton": "Failed to find C compiler"}, "cuda", False, True, torch.bfloat16,
        [r"Triton does not run \(Failed to find C compiler\): everything .* plain torch.*needs a C compiler"],
    ),
    (
        {"capability": (0, 0), "name": "AMD Instinct MI300X"}, "torch", False, False, torch.bfloat16,
        [r"^GPU 0 \(AMD Instinct MI300X\): the Triton kernels are tested on NVIDIA", r"the CUDA part is for NVIDIA"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "encoder", "triton", "gated", "dtype", "said"), CHOICES, ids=str)
def test_what_is_chosen_and_said(
    stand, machine: dict, encoder: str, triton: bool, gated: bool, dtype: torch.dtype, said: list[str]
) -> None:
    stand(**machine)
    assert encode.backend(GPU) == encoder
    assert backends.has_triton(GPU) == triton
    assert gated_linear.has_kernel(GPU) == gated
    assert models.pick_dtype(None, GPU) == dtype
    lines = backends.shortfall(GPU)
    assert len(lines) == len(said)
    for line, pattern in zip(lines, said, strict=True):
        assert re.search(pattern, line), line
        assert "\n" not in line
    assert backends.shortfall(torch.device("cpu")) == []
    assert encode.backend("cpu") == "numba" and not backends.has_triton(torch.device("cpu"))
    if encoder == "torch":
        with pytest.raises(RequestError, match="encode backend 'cuda' is not available"):
            encode.backend(GPU, "cuda")


def test_every_op_asks_before_it_takes_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """has_triton decides, not whether a tensor lies on a GPU."""
    taken: list[str] = []
    x, index = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    calls = {
        norm: (norm.rms_norm, "rms_norm_triton", (x, x[0], 1e-6)),
        gate: (gate.gate, "gate_triton", (x, "silu")),
        places: (places.row_places, "row_places_triton", (index, index, index, index, 1)),
        rotary: (
            rotary.rotate_and_store,
            "rotate_and_store_triton",
            (x, x, x, x, x, index, index, index, None),
        ),
        sampling: (sampling.advance, "advance_triton", (x, index, None, None)),
        attention: (attention.attend, "attend_triton", (x, None, None, None)),
    }
    for module, (run, kernel, arguments) in calls.items():
        monkeypatch.setattr(module, "has_triton", lambda device: True)
        monkeypatch.setattr(module, kernel, lambda *_, name=kernel: taken.append(name))
        run(*arguments)
    assert taken == [kernel for _, kernel, _ in calls.values()]


def test_a_row_that_is_too_wide_for_a_cards_shared_memory_is_encoded_by_torch(stand) -> None:
    wide, usual = Codec.named("int8", 1 << 15), Codec.named("int8", 8192)
    stand(capability=(8, 9), shared=99 * 1024)
    assert encode.backend(GPU, None, wide) == "torch" and encode.backend(GPU, None, usual) == "cuda"
    stand(capability=HOPPER)
    assert encode.backend(GPU, None, wide) == "cuda"


def test_a_driver_that_is_not_there_is_a_fault_and_no_crash() -> None:
    module = extension.load()
    if module is None or not module.cuda or torch.cuda.is_available():
        pytest.skip("needs the CUDA part, and a machine without a driver")
    assert "driver" in module.cuda_fault(0)
    assert "driver" in module.cuda_fault(0)  # the first call leaves nothing behind
    assert extension.architectures()


# ---- number formats ----


def test_bfloat16_is_not_emulated(stand) -> None:
    stand(capability=(7, 0), name="Tesla V100")
    with pytest.raises(
        RequestError, match=r"bfloat16: GPU 0 \(Tesla V100.* does not compute in it: use float32"
    ):
        models.pick_dtype("bfloat16", GPU)
    assert models.pick_dtype("float32", GPU) == torch.float32
    stand(capability=(8, 6))
    assert models.pick_dtype("bfloat16", GPU) == torch.bfloat16
    assert models.pick_dtype(None, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    "machine", [{"capability": (8, 6)}, {"capability": (0, 0)}, {"triton": "no compiler"}], ids=str
)
def test_fp8_is_refused_by_name_where_it_is_not_multiplied(stand, monkeypatch, machine: dict) -> None:
    stand(**machine)
    assert not fp8.has_fp8(GPU)
    with pytest.raises(RequestError, match="fp8.*use --precision full"):
        fp8.check_fp8(GPU)
    fp8.check_fp8(torch.device("cpu"))
    monkeypatch.setattr(pair, "pick_device", lambda name: GPU)
    options = RoundtripOptions(store="s", av="av", ar="ar", out="o.parquet", precision="fp8")
    with pytest.raises(RequestError, match="use --precision full"):
        pair.load_pair(options, lambda text: None)


@pytest.mark.parametrize("fault", ["", "refused", "wrong"])
def test_the_product_in_fp8_is_tried_once(stand, monkeypatch, fault: str) -> None:
    """torch refuses products scaled row by row on some cards of 8.9 and more."""
    stand(capability=(12, 0))
    calls = []

    def product(x: fp8.Quantised, w: fp8.Quantised, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(fault)
        if fault == "refused":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nmore")
        scale = fp8.Quantised(x.codes, torch.ones_like(x.scale)) if fault else x
        return fp8.scaled_linear_reference(scale, w, bias, torch.bfloat16)

    monkeypatch.setattr(fp8, "_scaled_product", product)
    monkeypatch.setattr(fp8, "quantise_triton", fp8.quantise_reference)
    monkeypatch.setattr(fp8, "triton_fault", lambda device: "")
    here = torch.device("cpu")  # for the tensors: the card is the stand-in
    assert fp8.fp8_fault(here) == (said := fp8.fp8_fault(here))
    assert len(calls) == 1
    expected = {
        "": "^$",
        "refused": "no product in fp8 scaled row by row .*NOT_SUPPORTED",
        "wrong": "differs from",
    }
    assert re.search(expected[fault], said) and "\n" not in said


# ---- the card ----


def properties(**given: object) -> SimpleNamespace:
    known = {
        "name": "NVIDIA H100",
        "major": 9,
        "minor": 0,
        "shared_memory_per_block": 49152,
        "multi_processor_count": 132,
    }
    return SimpleNamespace(**{**known, **given})


def test_a_card_is_asked_for_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cards.ASSUMED, raising=False)
    ask = cards._card.__wrapped__
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: properties(shared_memory_per_block_optin=9)
    )
    assert (
        ask(3) == Card(3, "NVIDIA H100", (9, 0), 9, 132)
        and str(ask(3)) == "GPU 3 (NVIDIA H100, compute capability 9.0)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties())
    assert ask(0).shared_bytes == 49152
    monkeypatch.setattr(torch.version, "hip", "6.4")  # which calls a gfx90a 9.0
    assert not ask(0).nvidia and ask(0).bfloat16 and str(ask(0)) == "GPU 0 (NVIDIA H100)"


def test_an_older_card_can_be_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: properties(shared_memory_per_block_optin=227 << 10),
    )
    for name, capability, kib in (
        ("8.6", (8, 6), 99),
        ("7.5", (7, 5), 64),
        ("8.0", (8, 0), 163),
        ("9.0", HOPPER, 227),
    ):
        monkeypatch.setenv(cards.ASSUMED, name)
        assert cards._card.__wrapped__(0) == Card(0, "NVIDIA H100", capability, kib << 10, 132)
    for name in ("9.1", "12.0", "hopper", "86", "0.0"):
        monkeypatch.setenv(cards.ASSUMED, name)
        with pytest.raises(
            RequestError, match=rf"NLA_ASSUME_CAPABILITY is '{name}'.*no higher than that of GPU 0"
        ):
            cards._card.__wrapped__(0)


def test_a_card_that_torch_is_not_compiled_for_is_refused(stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", "sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split)
    for name in ("is_available", "device_count", "current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: 0 if name == "current_device" else 1)
    for capability in ((8, 9), (9, 0), (10, 3), (12, 1), (13, 0), (0, 0)):
        stand(capability=capability)
        assert models.pick_device("cuda") == GPU
    stand(capability=(7, 0), name="Tesla V100")
    with pytest.raises(
        RequestError, match=r"Tesla V100.*: torch \S+ is compiled for sm_80.*or pass --device cpu"
    ):
        models.pick_device(None)


def test_a_run_starts_with_what_it_goes_without(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in (setup, pair):
        monkeypatch.setattr(stage, "shortfall", lambda device: [f"on this {device.type} nothing is fast"])
    for arguments in (
        commands.capture(root, tmp_path / "run.zarr"),
        commands.roundtrip(root, tmp_path / "explained.parquet"),
    ):
        ran = call(*arguments)
        assert ran.code == 0 and "on this cpu nothing is fast" in " ".join(ran.err.split())


def test_version_says_what_each_gpu_goes_without(stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine = stand()
    assert call("--version").out.splitlines()[1:] == [
        f"{machine.card}: runs the CUDA part and the Triton kernels"
    ]
    stand(capability=(12, 0), built=HOPPER_ALONE)
    assert re.fullmatch(r"nla_engine \S+\nGPU 0 .*NLA_CUDA_ARCH=120\n", call("--version").out)
    stand(built=None)
    assert re.fullmatch(r"nla_engine \S+\nthe compiled extension is missing .*\n", call("--version").out)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    stand()
    assert re.fullmatch(r"nla_engine \S+\n", call("--version").out)
