"""Texts that the AV writes now, from the engine in the trainer's own process.

The engine has a copy of the model. Before texts are written, the trained weights are copied over its own in place: its
merged products and its CUDA graphs read the same memory, so nothing is built again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nla_engine.engine.choose import AnyGenerator, open_generator
from nla_engine.engine.injection import at_scale
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.draws import of_sample
from nla_engine.roundtrip.verbalize import CLOSE_TAG, parse_explanation
from nla_engine.train.pair import TrainedAV


@dataclass(frozen=True)
class Written:
    """ids: every token that was generated; text: what the AR reads; status: as `roundtrip.verbalize` names it"""

    ids: tuple[int, ...]
    text: str
    status: str


class Rollouts:
    """Writes texts with the weights of `av`. lm: the engine's own copy of the base, in the dtype that is served.

    slots: texts at once
    """

    def __init__(
        self,
        lm: LanguageModel,
        av: TrainedAV,
        *,
        new_tokens: int,
        slots: int,
        seed: int,
        kernels: Kernels = Kernels(),
    ) -> None:
        self.kernels = kernels
        self.lm, self.av, self.new_tokens, self.slots, self.seed = lm, av, new_tokens, slots, seed
        self._stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), lm.eos_ids, [CLOSE_TAG.encode()])
        self._targets = dict(lm.model.named_parameters())
        self._generators: dict[Sampling, AnyGenerator] = {}

    def update(self) -> None:
        """Give the engine the weights that the trainer has now."""
        with torch.inference_mode():
            for name, value in self.av.changed():
                self._targets[name].data.copy_(value)
        for generator in list(self._generators.values())[:1]:  # they share one runner
            if isinstance(generator.runner, Runner):
                generator.runner.weights_changed()

    def write(
        self, vectors: torch.Tensor, *, samples: int, temperature: float, first_draw: int = 0
    ) -> list[Written]:
        """`samples` texts of each vector, float32 [n, d], together and in order.

        first_draw: names the random numbers of the first vector's texts; the others follow
        """
        generator = self._open(Sampling(temperature, self.seed))
        prompt = self.av.prompt
        shared = len(prompt.shared)
        tail, places = prompt.token_ids[shared:], tuple(place - shared for place in prompt.places)
        scaled = at_scale(vectors.to(self.lm.device), self.av.sidecar.injection)

        def requests() -> Iterator[Request]:
            for number, vector in enumerate(scaled):
                for sample in range(samples):
                    draw = of_sample(first_draw + number, sample)
                    id_ = number * samples + sample
                    yield Request(
                        id_, tail, self.new_tokens, vector[None], places, again=sample > 0, draw=draw
                    )

        found: list[Any] = [None] * (len(vectors) * samples)
        for ended in generator.run(requests()):
            ids = ended.generated.tolist()
            kept = ids[:-1] if ended.finish is Finish.EOS else ids
            text, status = parse_explanation(self.lm.tokenizer.decode(kept, skip_special_tokens=False))
            found[ended.request.id] = Written(tuple(ids), text, status)
        return found

    def _open(self, sampling: Sampling) -> AnyGenerator:
        """The generator for this way of sampling. The first one opens the engine, the others share it."""
        found = self._generators.get(sampling)
        if found is None:
            how = {"max_new_tokens": self.new_tokens, "stop": self._stop, "sampling": sampling}
            if self._generators:
                first = next(iter(self._generators.values()))
                found = type(first)(first.runner, **how)  # type: ignore[arg-type]
                found.prepare()
            else:
                prompt = self.av.prompt
                found = open_generator(
                    self.lm,
                    slots=self.slots,
                    length=len(prompt.token_ids) + self.new_tokens,
                    prefix=prompt.shared,
                    kernels=self.kernels,
                    injection=self.av.sidecar.injection,
                    how=how,
                )
            self._generators[sampling] = found
        return found

    def close(self) -> None:
        """Release the engine's memory."""
        for generator in list(self._generators.values())[:1]:
            generator.runner.close()
        self._generators.clear()
