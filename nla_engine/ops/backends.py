"""What a device computes with: the extension's CUDA part, Triton kernels or plain torch, and why with no better one.

Checked once, before a kernel is chosen: first the card, then CUDA and Triton themselves. A fault is one line that names
the card, what is not used and what to do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from nla_engine import extension
from nla_engine.errors import RequestError, first_line
from nla_engine.fields import KERNELS, PRECISIONS
from nla_engine.ops.cards import HOPPER, Card, card_of, runs
from nla_engine.ops.triton_module import MISSING, tl, triton

#: The oldest cards that Triton supports.
_TRITON = (8, 0)
_ENCODED_BY_TORCH = "rows are encoded by plain torch, slower"


@dataclass(frozen=True)
class Kernels:
    """What computes, chosen once and passed to every part of a run.

    name: one of `fields.KERNELS`. precision: of the products of fused blocks, one of `config.PRECISIONS`; full is the
    dtype of the weights, fp8 keeps quantised weights beside them. Raises RequestError for other values.
    """

    name: str = "auto"
    precision: str = "full"

    def __post_init__(self) -> None:
        for what, word, known in (
            ("kernels", self.name, KERNELS),
            ("precision", self.precision, PRECISIONS),
        ):
            if word not in known:
                raise RequestError(f"{what} '{word}' is unknown: use {' or '.join(known)}")
        if self.precision == "fp8" and (self.reference or self.library):
            raise RequestError(f"--precision fp8 has no {self.name} kernels: leave one of the two out")

    def __str__(self) -> str:
        return f"--kernels {self.name} --precision {self.precision}"

    @property
    def reference(self) -> bool:
        """Whether only transformers' own modules and plain torch may compute."""
        return self.name == "reference"

    @property
    def library(self) -> bool:
        """Whether transformers' own forward and caches run, without the engine's slots and attention."""
        return self.name == "library"

    def plain(self, device: torch.device) -> bool:
        """Whether blocks, attention and choosing are plain torch on this device."""
        return self.reference or self.library or (self.name == "auto" and not has_triton(device))


@functools.cache
def cuda_fault(device: torch.device) -> str:
    """Why the extension's CUDA part is not used on a CUDA device; empty if it is."""
    if missing := extension.why_missing():
        return missing
    card = card_of(device)
    return code_fault(card, extension.architectures()) or _load_fault(card)


def code_fault(card: Card, built: tuple[str, ...]) -> str:
    """Why a CUDA part compiled for these architectures is not used on a card; empty if it is."""
    if not card.nvidia:
        return f"{card}: the CUDA part is for NVIDIA cards: {_ENCODED_BY_TORCH}"
    if runs(card.capability, built):
        return ""
    major, minor = card.capability
    return (
        f"{card}: the extension is compiled for {' '.join(built) or 'no card'}: {_ENCODED_BY_TORCH}; put nvcc on "
        f"PATH and reinstall nla-engine with NLA_CUDA=1 NLA_CUDA_ARCH={major}{minor}"
    )


def _load_fault(card: Card) -> str:
    module = extension.load()
    assert module is not None
    fault = module.cuda_fault(card.number)
    if not fault:
        return ""
    return (
        f"{card}: the extension's CUDA part does not load ({fault}): {_ENCODED_BY_TORCH}; update the NVIDIA driver, or "
        "reinstall nla-engine with NLA_CUDA=1 and an nvcc that is no newer than it"
    )


def has_triton(device: torch.device) -> bool:
    """Whether ops run their Triton kernels on a device; elsewhere they run their references in torch."""
    return device.type == "cuda" and not triton_fault(device)


@functools.cache
def triton_fault(device: torch.device) -> str:
    """Why Triton kernels are not used on a CUDA device; empty if they are."""
    card = card_of(device)
    slower = "everything is computed by plain torch, slower"
    if not card.nvidia:
        return f"{card}: the Triton kernels are tested on NVIDIA cards only: {slower}"
    if card.capability < _TRITON:
        return f"{card}: Triton needs compute capability {_TRITON[0]}.{_TRITON[1]}: {slower}"
    if MISSING:
        return f"{card}: {MISSING}: {slower}; install a torch for CUDA (pip install torch), which brings it"
    try:
        _try_triton(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, no Python headers, a card that is newer than Triton
        return (
            f"{card}: Triton does not run ({first_line(error)}): {slower}; it needs a C compiler, Python's headers "
            "and a version that knows the card"
        )
    return ""


def _try_triton(device: torch.device) -> None:
    """Compile and launch a kernel. Raises whatever goes wrong."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _trial_kernel[(1,)](out)
    if int(out) != 1:
        raise RuntimeError("a kernel wrote nothing")


@triton.jit
def _trial_kernel(out):  # int32 [1]
    tl.store(out, 1)


def shortfall(device: torch.device) -> list[str]:
    """What a run on this device lacks, one line each, for the start of the run and for --version. Empty for a CPU."""
    if device.type != "cuda":
        return []
    lines = [triton_fault(device), cuda_fault(device)]
    module = extension.load()
    if not lines[1] and card_of(device).capability == HOPPER and not getattr(module, "gated_tiles", ()):
        lines.append(
            f"{card_of(device)}: the extension has no gated product for Hopper, so it takes two launches, slower; put "
            "nvcc 12.5 or later on PATH and reinstall nla-engine with NLA_CUDA=1"
        )
    return [line for line in lines if line]
