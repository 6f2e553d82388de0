"""An AV's prompt as token ids, and the tokens at which vectors enter: from its sidecar, or from the user's own text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nla_engine.errors import CheckpointError, PromptError
from nla_engine.models.chat import ChatText, Reading
from nla_engine.models.injection import Prompt
from nla_engine.models.sidecar import Sidecar
from nla_engine.pair_fields import INJECT


@dataclass(frozen=True)
class Wording:
    """What the user says of a prompt.

    text: the user's message, with INJECT where vectors enter; None: the sidecar's template
    system: the system message; variables: of the chat template; prefill: the beginning of the reply
    """

    text: str | None = None
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""


def verbalizer_prompt(
    sidecar: Sidecar, tokenizer: Any, wording: Wording = Wording(), vectors: int = 1, slots: int = 1
) -> Prompt:
    """The prompt of an AV that has a marker. Checks the whole contract. Errors: CheckpointError, PromptError.

    The marker must stand in it exactly where the vectors enter. One place in the text is for all of them, unless they
    are those of several slots.
    """
    assert sidecar.marker is not None
    alone = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if alone != [sidecar.marker_id]:
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must encode to the one id {sidecar.marker_id}, "
            f"but this tokenizer gives {alone}; the tokenizer and the sidecar do not belong together"
        )
    parts = sidecar.template if wording.text is None else tuple(wording.text.split(INJECT))
    if slots > 1 and len(parts) != vectors + 1:
        raise PromptError(
            f"--slots names {slots} vectors, which need {vectors} places: the prompt has {len(parts) - 1}"
        )
    _check_places(parts, vectors)
    if len(parts) == 2:
        parts = (parts[0], *[""] * (vectors - 1), parts[1])
    text = renderer(tokenizer, wording)(sidecar.marker.join(parts))
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = tuple(i for i, id_ in enumerate(ids) if id_ == sidecar.marker_id)
    if len(places) != vectors:
        wanted = "once" if vectors == 1 else f"{vectors} times"
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must stand {wanted} in the prompt, "
            f"it stands {len(places)} times"
        )
    if wording.text is None:
        _check_neighbours(sidecar, ids, places)
    return Prompt(tuple(ids), places)


def placeholder_prompt(
    text: str, placeholder: str, vectors: int, tokenizer: Any, render: Callable[[str], str]
) -> Prompt:
    """The prompt of a model without a sidecar: each vector enters at the token of a placeholder. PromptError.

    text: with INJECT once per vector, or once for all of them
    placeholder: repeated for each vector, spaces after the last one left out; it must be one token of its own
    render: gives the whole text that the model reads
    """
    parts = text.split(INJECT)
    _check_places(parts, vectors)
    whole = render(text).split(INJECT)
    if len(whole) != len(parts):
        raise PromptError("the chat template changes the places of the vectors: give another prompt")
    run = (placeholder * (vectors if len(parts) == 2 else 1)).rstrip()
    core, before = placeholder.strip(), len(placeholder) - len(placeholder.lstrip())
    made = whole[0]
    spans: list[tuple[int, int]] = []  # of the placeholders without spaces
    room: list[tuple[int, int]] = []  # and what their tokens may reach into
    for after in whole[1:]:
        starts = range(len(made) + before, len(made) + len(run), len(placeholder))
        edges = [len(made), *(start + len(core) for start in starts)]
        spans += [(start, start + len(core)) for start in starts]
        room += zip(edges, [*starts[1:], len(made) + len(run)], strict=False)
        made += run + after
    coded = tokenizer(made, add_special_tokens=False, return_offsets_mapping=True)
    places = _places(coded["offset_mapping"], spans, room)
    if len(places) < len(spans):
        raise PromptError(
            f"the placeholder {placeholder!r} is not one token of its own where vector {len(places) + 1} enters: "
            "give another one, or another prompt"
        )
    return Prompt(tuple(coded["input_ids"]), tuple(places))


def _places(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], room: Sequence[tuple[int, int]]
) -> list[int]:
    """The one token of each span, up to the first span that has none.

    It covers the span, keeps to its room, and is the first token there (some leave out the space that they begin with).
    """
    places: list[int] = []
    token = 0
    for (start, end), (least, most) in zip(spans, room, strict=True):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        if token == len(offsets):
            break
        first, last = offsets[token]
        before = offsets[token - 1][1] if token else 0
        following = offsets[token + 1][0] if token + 1 < len(offsets) else last
        if not (before <= least <= first <= start and end <= last <= most and end <= following):
            break
        places.append(token)
    return places


def renderer(tokenizer: Any, wording: Wording) -> Callable[[str], str]:
    """Gives the text that the model reads for a user's message: in the chat template, or as it stands without one.

    PromptError, here or for a message, says what the template does not take.
    """
    if not tokenizer.chat_template:
        if wording.system is not None or wording.variables:
            raise PromptError("a system message and template options need a chat template, and there is none")
        return lambda message: message + wording.prefill
    chat = ChatText(tokenizer, replies=True, reading=Reading(None, wording.system, wording.variables))

    def rendered(message: str) -> str:
        made = chat.render({"prompt": message})
        if made.notes:
            raise PromptError(f"the prompts {made.notes[0]}: leave it out")
        return made.text + wording.prefill

    return rendered


def _check_places(parts: Sequence[str], vectors: int) -> None:
    """PromptError unless the texts lie around so many places, or around one that is for all."""
    if len(parts) not in (2, vectors + 1):
        held = "does not hold" if len(parts) == 1 else f"holds {len(parts) - 1} times"
        raise PromptError(f"the prompt {held} {INJECT}, which says where a vector enters; vectors: {vectors}")


def _check_neighbours(sidecar: Sidecar, ids: list[int], places: tuple[int, ...]) -> None:
    for name, at, expected in (
        ("left", places[0] - 1, sidecar.left_id),
        ("right", places[-1] + 1, sidecar.right_id),
    ):
        actual = ids[at] if 0 <= at < len(ids) else None
        if expected is not None and actual != expected:
            raise CheckpointError(
                f"{sidecar.path}: the marker's {name} neighbour is token {actual}, the sidecar says {expected}"
            )
