"""AR: vectors reconstructed from texts, per second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nla_engine.bench import baselines
from nla_engine.bench.limits import prefill_seconds
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.shapes import twin
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import texts
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel
from nla_engine.models.sidecar import Sidecar
from nla_engine.ops.backends import Kernels
from nla_engine.ops.fp8 import has_fp8
from nla_engine.roundtrip.reconstruct import Reconstructor

_TEMPLATE = ("<text>", "</text> <i>")
#: Tokens of the template around the explanation; with the 120 that an AV writes, 140.
AROUND = len("".join(_TEMPLATE))
_BRIEF_TEXTS = 256


def run(session: Session) -> None:
    """One case, then the same in fp8 and the baseline."""
    count, prompt = session.sizes.vectors, session.sizes.ar_prompt
    case = f"{count} texts {prompt} tokens {session.layer + 1} blocks"
    line = session.measure(
        "reconstruct",
        case,
        "vectors/s",
        _reconstructed(session, count, prompt),
        limit=limit(session, prompt),
        detail=lambda p50: f"{p50 * prompt:,.0f} tok/s",
    )
    if has_fp8(session.device):
        session.measure(
            "reconstruct",
            f"{case} fp8",
            "vectors/s",
            _reconstructed(session, count, prompt, "fp8"),
            against=line,
        )
    if session.settings.baseline == "hf":
        batch = min(baselines.AR_BATCH, count)
        theirs = session.measure(
            "reconstruct",
            f"HF dense B={batch} {prompt} tokens",
            "vectors/s",
            baselines.reconstructor(session, batch, prompt, random_head(session.lm.d_model)),
        )
        if line is not None:
            line.compare(theirs)


def limit(session: Session, prompt: int) -> float:
    """Vectors per second: prompts read through blocks 0..K. The head is left out, since it reads one token."""
    return 1 / prefill_seconds(session.size, session.hardware, prompt, session.layer + 1)


def reconstructor_of(lm: LanguageModel, layer: int, precision: str = "full") -> Reconstructor:
    """A model's weights, truncated after the tapped block, as an AR with a random head."""
    sidecar = Sidecar(
        path=Path("bench-ar"),
        role="ar",
        d_model=lm.d_model,
        layer=layer,
        injection=Injection(),
        template=_TEMPLATE,
        marker=None,
        marker_id=None,
        left_id=None,
        right_id=None,
        suffix_ids=(),
    )
    # Of a model over several GPUs no other runner is open, and a copy here would be unknown to the other ranks.
    own = twin(lm) if lm.ranks is None else lm
    return Reconstructor(
        own.truncated(layer), sidecar, random_head(lm.d_model), kernels=Kernels(precision=precision)
    )


def random_head(width: int) -> torch.Tensor:
    """A value head, float32 [d, d]."""
    return torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5


@contextmanager
def _reconstructed(session: Session, count: int, prompt: int, precision: str = "full") -> Iterator[Prepared]:
    reconstructor = reconstructor_of(session.lm, session.layer, precision)
    written = texts([prompt - AROUND] * count)

    def reconstruct() -> None:
        expect("vectors", len(reconstructor.reconstruct(written)), count)

    yield Prepared(
        lambda: count / seconds(reconstruct, session.device),
        lambda: reconstructor.reconstruct(written[:_BRIEF_TEXTS]),
    )
