"""AV: vectors -> explanations. A vector replaces one token of a fixed prompt, and the model generates the text."""

from __future__ import annotations

import collections.abc
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch

from nla_engine.engine.generator import Generator, Watch
from nla_engine.engine.injection import Injection
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import default_slots
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import CheckpointError
from nla_engine.models.chat import reads_clock
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.models.sidecar import SIDECAR, Given, Sidecar, read_sidecar, verbalizer_prompt
from nla_engine.models.source import Source, find_source
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling

OPEN_TAG, CLOSE_TAG = "<explanation>", "</explanation>"
#: Finished explanations that may wait for an earlier one, in bytes (a text is small).
_WAITING_BYTES = 1 << 28
#: Vectors scaled to the injection norm at once.
_SCALED_AT_ONCE = 256
#: Explanations are short, so more lanes fit than in capture; a matrix product then costs less per lane.
_MOST_SLOTS = 1024


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
    """A loaded AV checkpoint."""

    def __init__(self, lm: LanguageModel, sidecar: Sidecar, *, kernels: Kernels = Kernels()) -> None:
        self.lm, self.sidecar, self.kernels = lm, sidecar, kernels
        if lm.d_model != sidecar.d_model:
            raise CheckpointError(
                f"{sidecar.path}: d_model is {sidecar.d_model}, the model's width is {lm.d_model}"
            )
        ids, place = verbalizer_prompt(sidecar, lm.tokenizer)
        self.injection = Injection(tuple(ids), place, sidecar.injection_scale)

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
        base: str | None = None,
        source: Source | None = None,
    ) -> Verbalizer:
        """From a directory or Hub id. CheckpointError names what is wrong with it.

        base: of an adapter; source: what `find_source` gave for both, if that was asked already
        """
        source = source or find_source(name, base=base, flag="--av-base", remote_code=remote_code)
        sidecar = read_sidecar(source.having(SIDECAR), "av", given)
        lm = load_model(name, device=device, dtype=dtype, source=source, remote_code=remote_code)
        return cls(lm, sidecar, kernels=kernels)

    @property
    def room(self) -> int:
        """Most tokens in an explanation: the model's positions after the prompt."""
        return self.lm.max_length - len(self.injection.token_ids)

    def fingerprint(self) -> str:
        """Of everything that an explanation depends on: weights, sidecar, and a prompt that changes with the day."""
        parts = [self.lm.fingerprint(), self.sidecar.fingerprint()]
        if reads_clock(self.lm.tokenizer):
            parts.append(
                hashlib.sha256(str((self.injection.prefix, self.injection.tail)).encode()).hexdigest()[:16]
            )
        return "-".join(parts)

    def move(self, device: torch.device) -> None:
        """Move the weights to another device."""
        self.lm.move(device)

    @cached_property
    def _stop(self) -> StopAutomaton:
        lm = self.lm
        return StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), lm.eos_ids, [CLOSE_TAG.encode()])

    def explain(
        self,
        vectors: Iterable[tuple[int, np.ndarray | torch.Tensor]],
        *,
        samples: int = 1,
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(),
        batch_size: int | None = None,
        watch: Watch = lambda tally: None,
    ) -> collections.abc.Generator[Explanation, None, None]:
        """Explain (id, float32 [d]) pairs; `samples` explanations of each come together, in the same order.

        Their ids are id * samples, id * samples + 1 and so on, and seed their random numbers. The prompt is read once
        for all of them. Vectors must be finite and not zero. They are scaled here, and read lazily, some ahead of
        free slots. watch: as of `Generator.groups`
        """
        lm, injection, kernels = self.lm, self.injection, self.kernels
        prefix, tail = injection.prefix, injection.tail
        length = len(prefix) + len(tail) + max_new_tokens
        slots = batch_size or default_slots(lm, length, len(prefix), _MOST_SLOTS, kernels.precision)
        order = InOrder(_WAITING_BYTES)

        def requests() -> Iterator[Request | None]:
            for id_, vector in self._at_scale(vectors):
                for sample in range(samples):
                    while order.is_full:
                        yield None
                    request = Request(id_ * samples + sample, tail, max_new_tokens, vector, sample > 0)
                    yield order.asked(request)

        with Runner(lm, slots=slots, length=length, prefix=prefix, kernels=kernels) as runner:
            generator = Generator(runner, max_new_tokens=max_new_tokens, stop=self._stop, sampling=sampling)
            generator.prepare()
            for group in generator.groups(requests(), watch=watch):
                for ended in order.add(group):
                    text, status = parse_explanation(self._written(ended))
                    yield Explanation(ended.request.id, text, status, len(ended.generated))

    def _written(self, ended: Completion) -> str:
        """The generated text, with special tokens except the one that ended it."""
        ids = ended.generated[:-1] if ended.finish is Finish.EOS else ended.generated
        return str(self.lm.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _at_scale(
        self, vectors: Iterable[tuple[int, np.ndarray | torch.Tensor]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same pairs with scaled vectors on the model's device, in blocks."""
        pairs = iter(vectors)
        while group := list(islice(pairs, _SCALED_AT_ONCE)):
            block = torch.stack([torch.as_tensor(vector) for _, vector in group]).to(self.lm.device)
            yield from zip([id_ for id_, _ in group], self.injection.scaled(block), strict=True)
