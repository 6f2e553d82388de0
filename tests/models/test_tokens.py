"""The bytes of tokens joined are the text that the tokenizer decodes, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nla_engine.errors import CheckpointError
from nla_engine.models.tokens import token_bytes

BAR = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [*"abc.,'!<>0Ax", "é", "(가)", "㈎", "\n", "🙂", f"{BAR}ab", f"{BAR}", f"a{BAR}b"]


def byte_fallback(decoder: Any, normalizer: Any = None, unigram: bool = False) -> PreTrainedTokenizerFast:
    """Pieces, single bytes, and runs of spaces as added tokens that are normalised, as Gemma has them."""
    vocab = {t: i for i, t in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *LETTERS])}
    model: Any = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    if unigram:
        model = models.Unigram([(t, -float(i)) for t, i in vocab.items()], unk_id=0, byte_fallback=True)
    core = Tokenizer(model)
    core.normalizer, core.decoder = normalizer, decoder
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(BAR * n, normalized=True, special=False) for n in (4, 2)])
    core.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é«", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)


def byte_level() -> PreTrainedTokenizerFast:
    """With added tokens whose letters stand for bytes too: the library decodes those as bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("é", normalized=False), AddedToken("Ġ ", normalized=False), "\u0120\u0120"]
    )
    return tokenizer


def with_holes(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Fewer tokens than the highest id."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 7, "Ġ": 300}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


GEMMA = decoders.Sequence([decoders.Replace(BAR, " "), decoders.ByteFallback(), decoders.Fuse()])
LLAMA = decoders.Sequence(
    [decoders.Replace(BAR, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
KINDS = {
    "byte level": lambda t: byte_level(),
    "byte level without a chat template": lambda t: byte_tokenizer(chat=False),
    "byte level, then fused": lambda t: byte_fallback(
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    ),
    "Gemma": lambda t: byte_fallback(GEMMA, normalizers.Replace(" ", BAR)),
    "Llama 2": lambda t: byte_fallback(LLAMA, normalizers.Prepend(BAR)),
    "Metaspace": lambda t: byte_fallback(decoders.Metaspace(), unigram=True),
    "Metaspace, no prefix": lambda t: byte_fallback(decoders.Metaspace(prepend_scheme="never")),
    "ids with holes": with_holes,
    "the bundled models'": lambda t: bundled(),
}


def bundled() -> Any:
    import nla_engine

    return AutoTokenizer.from_pretrained(Path(nla_engine.__file__).parent / "demo" / "trio" / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_a_row_are_what_the_tokenizer_decodes(kind: str, rng, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](tmp_path)
    highest = max(tokenizer.get_vocab().values())
    texts = token_bytes(tokenizer, highest + 40)
    assert len(texts) == highest + 40 and not any(texts[highest + 1 :])
    known = [i for i in range(highest + 1) if tokenizer.convert_ids_to_tokens(i) is not None]
    assert all(texts[i] for i in known) and sum(map(bool, texts)) == len(known)
    whole = [i for i in known if _is_text(texts[i])]
    if kind in ("Llama 2", "Metaspace"):  # which take spaces off the very start of a text
        first = [tokenizer.convert_tokens_to_ids("<s>")]
        assert tokenizer.decode([tokenizer.convert_tokens_to_ids(f"{BAR}ab")]) == "ab"
    else:
        first = []
    for _ in range(200):
        ids = first + rng.choice(whole, 12).tolist()
        expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert b"".join(texts[i] for i in ids).decode() == expected


def _is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", ["byte level", "Gemma", "Llama 2", "Metaspace"])
def test_text_comes_back_from_its_tokens(kind: str, tmp_path: Path) -> None:
    """Characters of several tokens, too; Metaspace here has no bytes."""
    tokenizer = KINDS[kind](tmp_path)
    text = "abc\n 가x <tool call>   🙂" if kind != "Metaspace" else "abc.x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_bytes(tokenizer, len(tokenizer))
    joined = b"".join(texts[i] for i in ids).decode().lstrip(" ")
    assert (
        joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False) and "가" in joined
    ) or kind == "Metaspace"
    assert joined.replace(" ", "") == text.replace(" ", "")


class Python:
    """A tokenizer without a `tokenizers` backend."""

    def __init__(self, vocab: dict[Any, int], decoded: dict[int, str]) -> None:
        self.vocab, self.decoded = vocab, decoded
        self.added_tokens_decoder = {300: "<end>"}

    def get_vocab(self) -> dict[Any, int]:
        return self.vocab

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join({300: "<end>", **self.decoded}[i] for i in ids).removeprefix(" ")


def test_tokenizers_in_python_are_read_as_they_decode() -> None:
    pieces = Python({f"{BAR}a": 0, "<0x0A>": 5}, {0: " a", 5: "\n"})
    assert token_bytes(pieces, 6) == [b" a", b"", b"", b"", b"", b"\n"]
    letters = Python({"Ġa": 0, "Ċ": 1}, {0: " a", 1: "\n"})
    assert token_bytes(letters, 301)[:2] == [b" a", b"\n"] and token_bytes(letters, 301)[300] == b"<end>"
    assert token_bytes(Python({b"\xc3": 0, b" a": 1}, {0: "\ufffd", 1: " a"}), 2) == [b"\xc3", b" a"]
    with pytest.raises(
        CheckpointError, match=r"Python decodes token 0 to 'bbb' where .* not to what its vocabulary"
    ):
        token_bytes(Python({"a": 0}, {0: "b"}), 1)


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Replace(Regex("a+"), "b"), decoders.Fuse()]), "Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
        (None, "has no decoder"),
    ],
)
def test_what_is_not_known_is_not_guessed(decoder: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"{reason}.*not supported"):
        token_bytes(byte_fallback(decoder), 300)


def test_a_space_in_front_of_each_token_is_taken_off_it() -> None:
    """Strip before Fuse works on each token."""
    tokenizer = byte_fallback(decoders.Sequence([decoders.Strip("a", 1, 1), decoders.Fuse()]))
    texts = token_bytes(tokenizer, len(tokenizer))
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("b", f"a{BAR}b", "c")]
    assert b"".join(texts[i] for i in ids).decode() == tokenizer.decode(ids) == f"b{BAR}bc"


def test_pre_tokenizers_do_not_matter() -> None:
    tokenizer = byte_fallback(GEMMA)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert np.array_equal(token_bytes(tokenizer, 300), token_bytes(byte_fallback(GEMMA), 300))
