"""The bytes that each token of a vocabulary stands for.

Needed to show tokens without the model and to recognise stop strings across token borders. Knows no model.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes of ids 0..vocab_size-1; b"" for ids that the tokenizer does not know."""
    known = min(len(tokenizer), vocab_size)
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    read = _read_byte_level if _is_byte_level(tokenizer) else _read_sentencepiece
    out = []
    for id_, name in enumerate(names):
        if id_ in added:
            out.append(added[id_].encode())
        else:
            out.append(b"" if name is None else read(name))
    return out + [b""] * (vocab_size - known)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@cache
def _byte_of_letter() -> dict[str, int]:
    """The inverse of GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _read_byte_level(name: str) -> bytes:
    letters = _byte_of_letter()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.encode()


def _read_sentencepiece(name: str) -> bytes:
    match = _BYTE_FALLBACK.fullmatch(name)
    return bytes([int(match[1], 16)]) if match else name.replace("\u2581", " ").encode()
