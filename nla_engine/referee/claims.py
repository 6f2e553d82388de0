"""What a text says that a rule can check: quoted strings, numbers, names, the token read, the next token.

Reads model-written, untrusted text of any wording: it searches, never raises, and every length is bounded. It does not
judge whether a claim is true (`truth`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

READ, NEXT, QUOTE, NUMBER, NAME = "read", "next", "quote", "number", "name"
KINDS = (QUOTE, NUMBER, NAME, READ, NEXT)
#: Tokens that texts name in parentheses, and the tokens that are meant.
LABELS = {
    "newline": re.compile(r"\r?\n[\r\n]*"),
    "start of turn": re.compile(r"<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>"),
    "end of turn": re.compile(r"<\|im_end\|>|<end_of_turn>|<\|eot_id\|>"),
    "end of text": re.compile(r"<\|endoftext\|>|<\|end_of_text\|>|<eos>|</s>"),
}
#: Words in the sentence before a token that say that it comes next; the same right behind it.
COMING = re.compile(
    r"next|follow|about to|upcoming|\bcom(?:e|es|ing)\b|predict|expect|anticipat|continu|will be",
    re.IGNORECASE,
)
COMING_AFTER = re.compile(
    r"\s*(?:is |are |should |will |to )?(?:be |come )?(?:comes? |coming )?(?:next|follow|expected|predicted)"
)
#: What may stand between two tokens that are said in the same way.
AND = re.compile(r"\s*(?:,|or|and|, or|, and)\s*")
#: "digit 2 of 4" and "a 4-digit number" count; they name no number.
COUNTERS = re.compile(
    r"\b(?:digit|token|step|position|part|line|paragraph|place|column|turn)s?\s+[0-9]{1,6}\s+(?:out )?of\s+[0-9]{1,6}\b"
    r"|\b[0-9]{1,6}[-\s](?:digit|token|step|word|line|sentence|character)s?\b"
)
_READ = re.compile(
    r"\btokens?\b|\bjust read\b|\b(?:last|final|current) (?:word|character|digit|symbol)\b"
    r"|\bend(?:s|ing)? (?:in|with)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"\"([^\"\n]{1,200})\"|“([^”\n]{1,200})”|«([^»\n]{1,200})»|`([^`\n]{1,200})`"
    r"|(?<!\w)'([^'\n]{1,200})'(?!\w)|(?<!\w)‘([^’\n]{1,200})’(?!\w)"
)
_LABEL = re.compile(rf"\(({'|'.join(LABELS)})\)")
_NUMBER = re.compile(
    r"(?<![0-9])(?<![0-9][.,])(?<![A-WYZa-wyz_])"
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,5}|[0-9]{1,18})(?:\.[0-9]{1,18})?"
    r"(?![0-9])(?![.,][0-9])(?![A-WYZa-wyz_])"
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_OPENS = re.compile(r"(?:^|[.!?:\n\"“«`(\[*]|^\s*[-•])\s*$")
#: Characters before a word in which the beginning of its sentence is looked for.
_LEAD = 120


@dataclass(frozen=True)
class Claim:
    """One claim. text: its words, without quotation marks; start, end: the characters that say it, with them.

    label: whether `text` is a name of LABELS
    """

    kind: str
    text: str
    start: int
    end: int
    label: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Equal for claims that say the same in the same way."""
        return self.kind, self.text.replace(",", "") if self.kind == NUMBER else plain(self.text)


def claims_of(text: str) -> list[Claim]:
    """Everything that a text says by these rules, in its order."""
    quoted = list(_of_strings(text))
    rest = _blanked(text, [(claim.start, claim.end) for claim in quoted])
    return sorted([*quoted, *_numbers(rest), *_names(rest)], key=lambda claim: (claim.start, claim.end))


def quoted_spans(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of each quoted string, its marks included."""
    return [match.span() for match in _QUOTED.finditer(text)]


def numbers_in(text: str) -> frozenset[str]:
    """The numbers of a text, without thousands separators. Counters such as "digit 2 of 4" name none."""
    return frozenset(claim.key[1] for claim in _numbers(text))


def names_in(text: str) -> frozenset[str]:
    """Runs of words with capital letters that do not open a sentence, in a text of any origin."""
    return frozenset(claim.text for claim in _names(text))


def words_in(text: str) -> frozenset[str]:
    """The words and numbers of a text, as written."""
    return frozenset(match[0] for match in _WORD.finditer(text))


def plain(text: str) -> str:
    """A text with every space as one, and none around it."""
    return " ".join(text.split())


def _of_strings(text: str) -> Iterator[Claim]:
    """Quoted strings and labels: what they are said to be depends on the sentence before them."""
    done, kind = 0, QUOTE
    found = sorted([*_QUOTED.finditer(text), *_LABEL.finditer(text)], key=lambda match: match.start())
    for match in found:
        start, end = match.span()
        if start < done:
            continue  # a label inside a quoted string
        label = match.re is _LABEL
        words = next(group for group in match.groups() if group is not None)
        if not label:
            words = (
                words.replace("\\n", "\n")
                .replace("\\t", "\t")
                .removeprefix("...")
                .removesuffix("...")
                .strip("…")
            )
        lead = re.split(r"[.!?;\n]", text[max(done, start - _LEAD) : start])[-1]
        if COMING_AFTER.match(text, end):
            kind = NEXT
        elif not (done and AND.fullmatch(lead)):  # 'followed by "7" or "8"': as before
            kind = NEXT if COMING.search(lead) else READ if _READ.search(lead) else QUOTE
        done = end
        if words and not (label and kind == QUOTE):
            yield Claim(kind, words, start, end, label)


def _numbers(text: str) -> Iterator[Claim]:
    counters = _blanked(text, [match.span() for match in COUNTERS.finditer(text)])
    for match in _NUMBER.finditer(counters):
        yield Claim(NUMBER, match[0], *match.span())


def _names(text: str) -> Iterator[Claim]:
    """Neighbouring words with capital letters, a single space between them; not the first word of a sentence."""
    run: list[re.Match[str]] = []
    for match in _WORD.finditer(text):
        opens = _OPENS.search(text[max(0, match.start() - 8) : match.start()]) if match.start() else True
        named = match[0][0].isupper() and len(match[0]) > 1 and not opens
        if run and not (named and text[run[-1].end() : match.start()] == " "):
            yield _name(text, run)
            run = []
        if named:
            run.append(match)
    if run:
        yield _name(text, run)


def _name(text: str, run: list[re.Match[str]]) -> Claim:
    start, end = run[0].start(), run[-1].end()
    return Claim(NAME, text[start:end], start, end)


def _blanked(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with spans replaced by as many control characters, which no rule reads and which separate."""
    parts, done = [], 0
    for start, end in spans:
        parts += [text[done:start], "\0" * (end - start)]
        done = end
    return "".join([*parts, text[done:]])
