"""AV: vectors -> texts. Vectors enter at given tokens of a prompt, and the model generates the text."""

from __future__ import annotations

import collections.abc
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.engine.generator import Watch
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.split_load import load_on
from nla_engine.models.av_prompt import Wording, verbalizer_prompt
from nla_engine.models.load import LanguageModel
from nla_engine.models.map_files import Maps, find_maps
from nla_engine.models.sidecar import SIDECAR, Given, Sidecar, read_sidecar
from nla_engine.models.source import Source, find_source
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.writer import Asked, Limits, Writer

OPEN_TAG, CLOSE_TAG = "<explanation>", "</explanation>"


@dataclass(frozen=True)
class Explanation:
    """What the AV wrote. status: ok | unclosed (cut by the length limit) | untagged (no opening tag: kept whole)."""

    id: int
    text: str
    status: str
    n_tokens: int


def parse_explanation(text: str) -> tuple[str, str]:
    """(explanation, status) of what the AV wrote."""
    _, opened, rest = text.partition(OPEN_TAG)
    if not opened:
        return text.strip(), "untagged"
    inside, closed, _ = rest.partition(CLOSE_TAG)
    return inside.strip(), "ok" if closed else "unclosed"


class Verbalizer:
    """A loaded AV checkpoint. slots: how many vectors enter its prompt, each at a marker of its own."""

    def __init__(
        self,
        lm: LanguageModel,
        sidecar: Sidecar,
        *,
        kernels: Kernels = Kernels(),
        wording: Wording = Wording(),
        maps: Maps = Maps(),
        slots: int = 1,
    ) -> None:
        self.lm, self.sidecar, self.kernels, self.maps = lm, sidecar, kernels, maps
        maps.check_width(sidecar, lm.d_model)
        self.injection = sidecar.injection
        self.writer = Writer(lm, self.injection, kernels, [CLOSE_TAG.encode()], maps)
        self.prompt = verbalizer_prompt(sidecar, lm.tokenizer, wording, self.writer.places(slots), slots)
        self.prefill = wording.prefill  # the text begins with it

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        remote_code: bool = False,
        kernels: Kernels = Kernels(),
        given: Given = Given(),
        wording: Wording = Wording(),
        base: str | None = None,
        source: Source | None = None,
        ranks: Ranks | None = None,
    ) -> Verbalizer:
        """From a directory or Hub id. CheckpointError names what is wrong with it.

        base: of an adapter; source: what `find_source` gave for both, if that was asked already; ranks: the group
        that shares the weights
        """
        source = source or find_source(name, base=base, flag="--av-base", remote_code=remote_code)
        sidecar = read_sidecar(source.having(SIDECAR), "av", given)
        maps = find_maps(source, sidecar, given)
        lm = load_on(ranks, source, device=device, dtype=dtype, remote_code=remote_code)
        return cls(lm, sidecar, kernels=kernels, wording=wording, maps=maps, slots=given.slots)

    def __repr__(self) -> str:
        layer = "layer not stated" if self.sidecar.layer is None else f"layer {self.sidecar.layer}"
        return (
            f"<Verbalizer {self.lm.name}: AV for {layer}, vectors of width {self.sidecar.d_model}, "
            f"on {self.lm.device}>"
        )

    @property
    def room(self) -> int:
        """Most tokens in an explanation: the model's positions after the prompt."""
        return self.lm.max_length - len(self.prompt.token_ids)

    def fingerprint(self) -> str:
        """Of all that an explanation depends on: weights, sidecar, maps and prompt, which may change with the day."""
        prompt = hashlib.sha256(repr(self.prompt).encode()).hexdigest()[:16]
        return "-".join((self.lm.fingerprint(), self.sidecar.fingerprint(), prompt, *self.maps.fingerprint()))

    def move(self, device: torch.device) -> None:
        """Move the weights to another device."""
        self.lm.move(device)

    def explain(
        self,
        vectors: Iterable[tuple[int, np.ndarray | torch.Tensor] | None],
        *,
        samples: int = 1,
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(),
        batch_size: int | None = None,
        watch: Watch = lambda tally: None,
        draws: Callable[[int], int] = lambda id_: id_,
    ) -> collections.abc.Generator[Explanation, None, None]:
        """Explain (id, float32 [d]) pairs, [slots, d] if there are several; `samples` explanations of each come
        together, in the same order.

        Vectors must be finite and not zero. For ids, scaling, reading ahead and `watch` see `Writer.write`.
        draws: what names the random numbers of an id's texts
        """
        prompt = self.prompt
        for text in self.writer.write(
            (
                None
                if each is None
                else Asked(each[0], prompt, each[1][None] if each[1].ndim == 1 else each[1], draws(each[0]))
                for each in vectors
            ),
            Limits.of([prompt]),
            samples=samples,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            batch_size=batch_size,
            watch=watch,
        ):
            words, status = parse_explanation(self.prefill + text.text)
            yield Explanation(text.id, words, status, text.n_tokens)
