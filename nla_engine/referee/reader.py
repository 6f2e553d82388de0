"""A language model that explains the text before a row, and never sees the row's vector.

It is shown explanations of other sequences, so that it writes in the style that the AR reads. Knows no score.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.engine.choose import open_generator
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.slots import default_room
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import CheckpointError, PromptError
from nla_engine.models.av_prompt import Wording, renderer
from nla_engine.models.load import LanguageModel
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.verbalize import CLOSE_TAG, OPEN_TAG, parse_explanation

#: Tokens of the text that an example shows, at most.
EXAMPLE_CONTEXT = 100
#: Tokens of a row's text that must fit beside the examples: with less room, there are fewer examples.
_LEAST_CONTEXT = 128
_WAITING_BYTES = 1 << 28
_TASK = (
    "A language model has read the text below. Describe in words what it holds in mind at the last token: what the "
    "text is, where in it that token stands, which token it is and what may come next. Write about {words} words."
)


@dataclass(frozen=True)
class Example:
    """A text up to a row, the row's explanation, and the number of its sequence."""

    context: str
    explanation: str
    sequence: int


class Reader:
    """Writes explanations of texts, greedily. words: how many it is asked for; most: tokens of its longest."""

    def __init__(self, lm: LanguageModel, kernels: Kernels, words: int, most: int) -> None:
        if lm.head is None:
            raise CheckpointError(
                f"--reader {lm.name}: has no head and writes nothing: give a language model"
            )
        self.lm, self.kernels, self.words, self.most = lm, kernels, words, most
        try:
            self._render = renderer(lm.tokenizer, Wording(prefill=OPEN_TAG))
        except PromptError as error:
            raise CheckpointError(f"--reader {lm.name}: {error}") from error
        names = {*lm.tokenizer.all_special_tokens, *lm.tokenizer.get_added_vocab()}
        self._special = sorted((name for name in names if len(name) > 1), key=len, reverse=True)

    def fitting(self, examples: Sequence[Example]) -> int:
        """How many of the examples there is room for. CheckpointError if there is none for a text at all."""
        for count in range(len(examples), -1, -1):
            room = self._room(examples[:count])
            if room >= _LEAST_CONTEXT or (count == 0 and room > 0):
                return count
        raise CheckpointError(
            f"--reader {self.lm.name}: {self.lm.max_length} positions do not hold its task and {self.most} tokens of "
            "an answer: give a model with more, or none"
        )

    def prompt(self, tokens: Sequence[str], examples: Sequence[Example]) -> list[int]:
        """The prompt for a text, given token by token; the beginning of a text without room is left out."""
        kept = len(tokens)
        while True:
            ids = self._encoded("".join(tokens[len(tokens) - kept :]), examples)
            over = len(ids) + self.most - self.lm.max_length
            if over <= 0 or kept <= 1:
                return ids
            kept = max(kept - over, 1)

    def write(
        self, prompts: Callable[[], Iterator[list[int]]], batch_size: int | None
    ) -> Generator[tuple[str, str, int], None, None]:
        """(text, status, tokens) for each prompt, in order. prompts: called twice, to measure and to read them."""
        shared, longest = _measured(prompts())
        if not longest:
            return
        lm, length, kernels = self.lm, longest + self.most, self.kernels
        room = default_room(lm, length, len(shared), precision=kernels.precision, slots=batch_size)
        order = InOrder(_WAITING_BYTES)

        def requests() -> Iterator[Request | None]:
            for number, ids in enumerate(prompts()):
                while order.is_full:
                    yield None
                yield order.asked(Request(number, tuple(ids[len(shared) :]), self.most))

        stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), lm.eos_ids, [CLOSE_TAG.encode()])
        how: dict[str, Any] = {"max_new_tokens": self.most, "stop": stop, "sampling": Sampling()}
        generator = open_generator(
            lm,
            slots=room.slots,
            blocks=room.blocks,
            length=length,
            prefix=shared,
            kernels=kernels,
            how=how,
        )
        with generator.runner:
            for group in generator.groups(requests()):
                for ended in order.add(group):
                    ids = ended.generated[:-1] if ended.finish is Finish.EOS else ended.generated
                    text = str(lm.tokenizer.decode(ids.tolist(), skip_special_tokens=False))
                    words, status = parse_explanation(OPEN_TAG + text)
                    if status == "unclosed" and ended.finish is not Finish.LENGTH:
                        status = "ok"  # ended by itself, without the tag
                    yield words, status, len(ended.generated)

    def _room(self, examples: Sequence[Example]) -> int:
        return self.lm.max_length - self.most - len(self._encoded("", examples))

    def _encoded(self, text: str, examples: Sequence[Example]) -> list[int]:
        shown = [
            f"Text:\n{self._plain(each.context)}\n\nDescription:\n{OPEN_TAG}{self._plain(each.explanation)}{CLOSE_TAG}"
            for each in examples
        ]
        task = _TASK.format(words=self.words)
        rendered = self._render("\n\n".join([task, *shown, f"Text:\n{self._plain(text)}\n\nDescription:\n"]))
        special = not self.lm.tokenizer.chat_template
        ids: list[int] = self.lm.tokenizer.encode(rendered, add_special_tokens=special)
        return ids

    def _plain(self, text: str) -> str:
        """Special tokens of the reader's, such as the ends of turns, are told in words and not acted on."""
        for name in self._special:
            text = text.replace(name, f"{name[0]} {name[1:]}")
        return text


def _measured(prompts: Iterator[list[int]]) -> tuple[tuple[int, ...], int]:
    """What all prompts begin with, at least one token less than the shortest, and the tokens of the longest."""
    shared: np.ndarray | None = None
    longest = 0
    for ids in prompts:
        own = np.asarray(ids[:-1])
        longest = max(longest, len(ids))
        if shared is None:
            shared = own
            continue
        size = min(len(shared), len(own))
        other = np.flatnonzero(shared[:size] != own[:size])
        shared = shared[: other[0] if len(other) else size]
    return () if shared is None else tuple(shared.tolist()), longest
