"""The bytes of each token of a vocabulary: joined, they are the text that the tokenizer decodes.

They show tokens without the model, and find stop strings across token borders. A tokenizer may strip a space from the
start of a text, as Llama 2's does. Here the token keeps it: its bytes do not depend on where it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from nla_engine.errors import CheckpointError
from nla_engine.options import regular_expression

_BYTE_FALLBACK = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
#: About how many tokens are compared with what the tokenizer decodes them to.
_TRIED = 2000

#: Characters of the beginning, and of the end, that an excerpt shows.
_SHOWN = 500

_Read = Callable[[bytes], bytes]


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes of ids 0..vocab_size-1; b"" for ids that the tokenizer does not know.

    Raises CheckpointError for a tokenizer whose decoding is not known here.
    """
    names = _names(tokenizer, vocab_size)
    for read in _readings(tokenizer):
        out = [b"" if name is None else read(name) for name in names]
        if (wrong := _contradicted(tokenizer, out)) is None:
            return out
    raise CheckpointError(
        f"the tokenizer {type(tokenizer).__name__} decodes token {wrong} to {tokenizer.decode([wrong] * 3)[-80:]!r} "
        "where it stands three times, not to what its vocabulary and decoder say: it is not supported"
    )


def special_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """bool [vocab_size]: whether the tokenizer calls a token special, such as BOS, EOS or the borders of a turn."""
    ids = {*tokenizer.all_special_ids}
    ids |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = np.zeros(vocab_size, bool)
    special[[id_ for id_ in ids if id_ < vocab_size]] = True
    return special


def excerpt(text: str) -> str:
    """A text for people, safe in a terminal: its beginning and end if it is long, control characters as escapes."""
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} ... {len(text) - 2 * _SHOWN:,} characters ... {text[-_SHOWN:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def matching_tokens(texts: Sequence[bytes], pattern: str) -> np.ndarray:
    """bool [vocab_size]: whether a regular expression is found anywhere in a token's text, as --where has it.

    texts: of each token, as `token_bytes` gives them; a part of a character is U+FFFD
    """
    search = regular_expression(pattern).search
    return np.array([search(text.decode(errors="replace")) is not None for text in texts], bool)


def _names(tokenizer: Any, vocab_size: int) -> list[bytes | None]:
    """The vocabulary's entry for each id, None where it has none: ids may have gaps."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found = [backend.id_to_token(id_) for id_ in range(vocab_size)]
    else:
        known = {id_: name for name, id_ in tokenizer.get_vocab().items()}
        known |= {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
        found = [known.get(id_) for id_ in range(vocab_size)]
    return [name.encode() if isinstance(name, str) else name for name in found]


def _readings(tokenizer: Any) -> list[_Read]:
    """How to read an entry: the one way that the tokenizer names, else every known way, to be tried in turn."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [_sentencepiece, _byte_level, bytes]
    if backend.decoder is None:  # without one the library puts a space between any two tokens
        raise CheckpointError("the tokenizer has no decoder (tokenizer.json): it is not supported")
    return [_chained(_flat([json.loads(backend.decoder.__getstate__())]))]


def _flat(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for step in steps:
        out += _flat(step["decoders"]) if step["type"] == "Sequence" else [step]
    return out


def _chained(steps: list[dict[str, Any]]) -> _Read:
    """Decoders of the `tokenizers` library, applied in turn to one token."""
    reads: list[_Read] = []
    whole = False  # true once the steps work on the whole text
    for step in steps:
        kind = step["type"]
        if kind == "Fuse" or (kind == "Strip" and whole and step["stop"] == 0):
            whole = True
        elif kind == "ByteLevel":
            reads.append(_byte_level)
            whole = True
        elif kind == "ByteFallback":
            reads.append(_byte_fallback)
        elif kind == "Metaspace":
            reads.append(_replacing(step["replacement"], " "))
        elif kind == "Replace" and len(step["pattern"].get("String", "")) == 1:
            reads.append(_replacing(step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and not whole:
            reads.append(_stripping(step["content"].encode(), step["start"], step["stop"]))
        else:
            raise CheckpointError(
                f"the tokenizer's decoder has the step {json.dumps(step)}: it is not supported"
            )

    def read(piece: bytes) -> bytes:
        for each in reads:
            piece = each(piece)
        return piece

    return read


def _contradicted(tokenizer: Any, texts: list[bytes]) -> int | None:
    """The first of some sampled ids that the tokenizer decodes to another text; None if there is none."""
    tried = [id_ for id_, text in enumerate(texts) if text]
    for id_ in tried[:: len(tried) // _TRIED + 1]:
        try:
            text = texts[id_].decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        decoded = tokenizer.decode([id_] * 3, clean_up_tokenization_spaces=False)
        if not decoded.endswith(text * 2):  # the first may stand without its spaces
            return id_
    return None


@cache
def _byte_of_letter() -> dict[str, int]:
    """The inverse of GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(piece: bytes) -> bytes:
    letters = _byte_of_letter()
    try:
        return bytes(letters[letter] for letter in piece.decode())
    except (KeyError, UnicodeDecodeError):
        return piece


def _byte_fallback(piece: bytes) -> bytes:
    match = _BYTE_FALLBACK.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece


def _sentencepiece(piece: bytes) -> bytes:
    return _byte_fallback(_replacing("\u2581", " ")(piece))


def _replacing(pattern: str, content: str) -> _Read:
    old, new = pattern.encode(), content.encode()
    return lambda piece: piece.replace(old, new)


def _stripping(content: bytes, start: int, stop: int) -> _Read:
    """Removes `content` up to `start` times from the beginning and up to `stop` times from the end."""

    def read(piece: bytes) -> bytes:
        for _ in range(start):
            piece = piece.removeprefix(content)
        for _ in range(stop):
            piece = piece.removesuffix(content)
        return piece

    return read
