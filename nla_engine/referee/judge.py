"""A language model asked, greedily, whether a clause is true of a text. It may err: its answers are kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nla_engine.engine.choose import open_generator
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.slots import default_room
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import RequestError
from nla_engine.models.chat import ChatText
from nla_engine.models.load import LanguageModel
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels

#: What the judge is asked. `following` is FOLLOWING with the next token, or "".
PROMPT = """\
Here is the beginning of a text, up to the last token that was read:

<text>
{context}
</text>
{following}
Someone says of it:

<statement>
{clause}
</statement>

Is the statement true of the text? Answer with one word: yes or no."""
FOLLOWING = '\nThe next token of the text is "{next}".\n'
YES, NO, UNCLEAR = "yes", "no", "unclear"
#: Tokens of an answer, at most.
ANSWER_TOKENS = 8
_VERDICT = re.compile(r"[\W_]*(yes|no)\s*(?:$|[.,;:!?\n*\"'<)\u2013\u2014-])", re.IGNORECASE)
_WAITING_BYTES = 1 << 26


def verdict(answer: str) -> str:
    """yes or no, if the answer begins with this word and what follows is no further word; else unclear."""
    match = _VERDICT.match(answer)
    return match[1].lower() if match else UNCLEAR


def prompt_of(context: str, next_token: str | None, clause: str) -> str:
    """The message to the judge."""
    following = "" if next_token is None else FOLLOWING.replace("{next}", next_token)
    parts = {"context": context, "following": following, "clause": clause}
    return re.sub(r"\{(context|following|clause)\}", lambda match: parts[match[1]], PROMPT)


class Judge:
    """Answers prompts with a loaded model, through its chat template if it has one."""

    def __init__(
        self, lm: LanguageModel, kernels: Kernels = Kernels(), batch_size: int | None = None
    ) -> None:
        if lm.head is None:
            raise RequestError(f"--judge {lm.name}: has no head, so it cannot answer: give a language model")
        self.lm, self.kernels, self.batch_size = lm, kernels, batch_size
        tokenizer = lm.tokenizer
        self._chat = ChatText(tokenizer, replies=True) if tokenizer.chat_template else None
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        )
        self._stop = StopAutomaton(token_bytes(tokenizer, lm.vocab_size), lm.eos_ids, ())

    def harmless(self, text: str) -> str:
        """A text in which no special token of the judge stands: each is broken up by a space behind its beginning."""
        while match := self._special.search(text):
            at = match.start() + 1
            text = f"{text[:at]} {text[at:]}"
        return text

    def answers(self, messages: Sequence[str]) -> list[str]:
        """The greedy answer to each message."""
        prompts = [self._encoded(message) for message in messages]
        if not prompts:
            return []
        lm = self.lm
        length = max(map(len, prompts)) + ANSWER_TOKENS
        if length > lm.max_length:
            raise RequestError(
                f"--judge {lm.name}: a prompt of {length - ANSWER_TOKENS:,} tokens is longer than it can read "
                f"({lm.max_length:,} with the answer): lower --judge-context"
            )
        room = default_room(lm, length, precision=self.kernels.precision, slots=self.batch_size)
        how = {"max_new_tokens": ANSWER_TOKENS, "stop": self._stop}
        order = InOrder(_WAITING_BYTES)
        out: list[str] = []
        generator = open_generator(
            lm, slots=room.slots, blocks=room.blocks, length=length, kernels=self.kernels, how=how
        )
        with generator.runner:
            asked = (order.asked(Request(n, ids, ANSWER_TOKENS)) for n, ids in enumerate(prompts))
            for group in generator.groups(asked):
                for ended in order.add(group):
                    ids = ended.generated[:-1] if ended.finish is Finish.EOS else ended.generated
                    out.append(str(lm.tokenizer.decode(ids.tolist(), skip_special_tokens=False)))
        return out

    def _encoded(self, message: str) -> tuple[int, ...]:
        text = message + "\nAnswer:"
        if self._chat is not None:
            text = self._chat.render({"prompt": message}).text
        return tuple(self.lm.tokenizer.encode(text, add_special_tokens=self._chat is None))
