"""Training data as integer arrays: conversations for the base, (position, explanation) rows for AV and AR.

Everything runs on the CPU. `build_rows` can run in several processes, each with its own share of the problems.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from string import Formatter

import numpy as np
from tokenizers import Tokenizer

from nla_engine.demo.checkpoint_layout import AV_TEMPLATE, ar_prompt
from nla_engine.demo.explanations import WORDINGS, Reading, explain, wrap
from nla_engine.demo.problems import RESULT_NAMES, Problem, follow_ups
from nla_engine.demo.tokenizer import END_TOKEN, PAD_TOKEN, START_TOKEN

_OPENING = f"{START_TOKEN}user\n"
_HEADER = f"{END_TOKEN}\n{START_TOKEN}assistant\n"


def reply_places(problem: Problem) -> list[str]:
    """For each character of the reply, where it stands, in words."""
    names = {"a": "the first number", "b": "the second number", "r": f"the {RESULT_NAMES[problem.operation]}"}
    values = {"a": problem.a, "b": problem.b, "r": problem.result}
    places: list[str] = []
    seen: set[str] = set()
    previous = "the start"
    for literal, field, _, _ in Formatter().parse(problem.phrasing.reply):
        places += [previous if previous == "the start" else f"the words after {previous}"] * len(literal)
        if field is None:
            continue
        text = str(values[field])
        previous = names[field] + (" again" if field in seen else "")
        seen.add(field)
        for index, character in enumerate(text, 1):
            kind = "the sign" if character == "-" else f"digit {index} of {len(text)}"
            places.append(f"{kind} of {previous}")
    return places


def readings(problem: Problem, pieces: list[str], ends: list[int]) -> list[Reading]:
    """What has been read at each position of the rendered conversation.

    pieces: the text of each token. ends: for each token the index of its last character in the rendered text.
    """
    question, reply = problem.question, problem.reply
    question_end = len(_OPENING) + len(question)
    header_end = question_end + len(_HEADER)
    places = reply_places(problem)
    out = []
    for index, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
        next_piece = pieces[index + 1] if index + 1 < len(pieces) else None
        if end < len(_OPENING):
            out.append(Reading("opening", "the start", piece, None))
        elif end < question_end - 1:
            out.append(Reading("question", question[: end + 1 - len(_OPENING)], piece, None))
        elif end < header_end:
            if end == question_end - 1:
                place = "the end of the question"
            elif end <= question_end + len(END_TOKEN):
                place = "the end of the user turn"
            else:
                place = "the start of the reply"
            out.append(Reading("header", place, piece, next_piece))
        else:
            spot = end - header_end
            place = places[spot] if spot < len(reply) else "the end"
            out.append(Reading("reply", place, piece, next_piece))
    return out


@dataclass(frozen=True)
class Conversation:
    """A first turn, tokenised: ids of the whole (ending with `<|im_end|>`), size of the prompt, readings."""

    ids: list[int]
    prompt_size: int
    readings: list[Reading]


def conversation(backend: Tokenizer, problem: Problem) -> Conversation:
    """Tokenise question and reply; the reply's tokens are the same whether given or generated."""
    text = f"{_OPENING}{problem.question}{_HEADER}{problem.reply}{END_TOKEN}"
    encoding = backend.encode(text, add_special_tokens=False)
    ends = [stop - 1 for _, stop in encoding.offsets]
    pieces = [text[start:stop] for start, stop in encoding.offsets]
    header_end = len(_OPENING) + len(problem.question) + len(_HEADER)
    prompt_size = sum(end < header_end for end in ends)
    return Conversation(encoding.ids, prompt_size, readings(problem, pieces, ends))


def _id(backend: Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None, token
    return int(found)


def pad(rows: list[list[int]], value: int, width: int | None = None) -> np.ndarray:
    """int16 [len(rows), width], right-padded with `value`; width defaults to the longest row."""
    width = width or max(map(len, rows))
    out = np.full((len(rows), width), value, dtype=np.int16)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def build_rows(
    tokenizer_json: str, problems: list[Problem], prompt_share: float, seed: int
) -> dict[str, np.ndarray]:
    """Rows of all reply positions and a random `prompt_share` of prompt positions, each with one explanation.

    Returns int16 arrays: sequences [S, L] and explanations [N, E] (tagged, ending with EOS) and ar_prompts
    [N, A], all right-padded; ar_last [N] (index of the last real token); int32 row_sequence [N]; int16
    row_position [N].
    """
    backend = Tokenizer.from_str(tokenizer_json)
    end_id, pad_id = _id(backend, END_TOKEN), _id(backend, PAD_TOKEN)
    rng = random.Random(seed)
    sequences: list[list[int]] = []
    owners, positions, texts = [], [], []
    for problem in problems:
        talk = conversation(backend, problem)
        for position, reading in enumerate(talk.readings):
            if position >= talk.prompt_size or rng.random() < prompt_share:
                owners.append(len(sequences))
                positions.append(position)
                texts.append(explain(problem, reading, rng.randrange(WORDINGS)))
        sequences.append(talk.ids)
    wrapped = backend.encode_batch([wrap(text) for text in texts], add_special_tokens=False)
    explanations = [[*encoding.ids, end_id] for encoding in wrapped]
    prompts = [encoding.ids for encoding in backend.encode_batch([ar_prompt(text) for text in texts])]
    return {
        "sequences": pad(sequences, pad_id),
        "row_sequence": np.array(owners, dtype=np.int32),
        "row_position": np.array(positions, dtype=np.int16),
        "explanations": pad(explanations, pad_id),
        "ar_prompts": pad(prompts, pad_id),
        "ar_last": np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int16),
    }


def join_rows(parts: list[dict[str, np.ndarray]], pad_id: int) -> dict[str, np.ndarray]:
    """Concatenate the shares of several processes: pad to the largest width, shift sequence indices."""
    joined: dict[str, np.ndarray] = {}
    starts = np.cumsum([0] + [len(part["sequences"]) for part in parts])
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if name == "row_sequence":
            arrays = [array + start for array, start in zip(arrays, starts[:-1], strict=True)]
        if arrays[0].ndim == 2:
            width = max(array.shape[1] for array in arrays)
            arrays = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=pad_id) for a in arrays]
        joined[name] = np.concatenate(arrays)
    return joined


def base_conversations(
    backend: Tokenizer, problems: list[Problem], seed: int, follow_share: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Conversations for the base model, a share of them with a second turn about the same numbers.

    Returns ids int16 [S, L] and replies bool [S, L] (True where the token is the assistant's).
    """
    rng = random.Random(seed)
    segments: list[str] = []
    counts: list[int] = []
    for problem in problems:
        turns = [(problem.question, problem.reply)]
        if rng.random() < follow_share:
            turns.append(rng.choice(follow_ups(problem)))
        for index, (question, reply) in enumerate(turns):
            segments.append(("\n" if index else "") + f"{_OPENING}{question}{_HEADER}")
            segments.append(f"{reply}{END_TOKEN}")
        counts.append(2 * len(turns))
    encoded = iter(backend.encode_batch(segments, add_special_tokens=False))
    ids, replies = [], []
    for count in counts:
        parts = [next(encoded).ids for _ in range(count)]
        ids.append([token for part in parts for token in part])
        replies.append([index % 2 for index, part in enumerate(parts) for _ in part])
    return pad(ids, _id(backend, PAD_TOKEN)), pad(replies, 0).astype(bool)


def sample_texts(problems: list[Problem], seed: int) -> list[str]:
    """Texts for the tokenizer's training: conversations and explanations as they will be encoded."""
    rng = random.Random(seed)
    texts = [AV_TEMPLATE.replace("{injection_char}", "")] * len(problems)
    for problem in problems:
        question, reply = rng.choice(follow_ups(problem))
        texts += [f"{_OPENING}{problem.question}{_HEADER}{problem.reply}{END_TOKEN}", question, reply]
        # Positions need tokens, which do not exist yet: characters stand in for them here.
        text = f"{_OPENING}{problem.question}{_HEADER}{problem.reply}"
        for reading in rng.sample(readings(problem, list(text), list(range(len(text)))), 6):
            explanation = explain(problem, reading, rng.randrange(WORDINGS))
            texts += [wrap(explanation), ar_prompt(explanation)]
    return texts
