"""An AV's prompt as token ids, and the tokens at which vectors enter: from its sidecar, or from the user's own text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nla_engine.errors import CheckpointError, PromptError
from nla_engine.models.chat import ChatText, Reading
from nla_engine.models.injection import Prompt
from nla_engine.models.sidecar import Sidecar

#: Stands in a prompt of the user's for a vector, or for all vectors of a prompt if it stands there once.
INJECT = "<INJECT>"


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


def verbalizer_prompt(sidecar: Sidecar, tokenizer: Any, wording: Wording = Wording()) -> Prompt:
    """The prompt of an AV that has a marker. Checks the whole contract. Errors: CheckpointError, PromptError.

    The marker must stand in the prompt exactly where vectors enter; a prompt of the sidecar's has one place.
    """
    assert sidecar.marker is not None
    alone = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if alone != [sidecar.marker_id]:
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must encode to the one id {sidecar.marker_id}, "
            f"but this tokenizer gives {alone}; the tokenizer and the sidecar do not belong together"
        )
    parts = sidecar.template if wording.text is None else tuple(wording.text.split(INJECT))
    if len(parts) < 2:
        raise PromptError(f"the prompt does not hold {INJECT}, which says where the vector enters")
    text = rendered(sidecar.marker.join(parts), tokenizer, wording)
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = tuple(i for i, id_ in enumerate(ids) if id_ == sidecar.marker_id)
    if len(places) != len(parts) - 1:
        wanted = "once" if len(parts) == 2 else f"{len(parts) - 1} times"
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must stand {wanted} in the prompt, "
            f"it stands {len(places)} times"
        )
    if wording.text is None:
        _check_neighbours(sidecar, ids, places[0])
    return Prompt(tuple(ids), places)


def placeholder_prompt(
    text: str, placeholder: str, vectors: int, tokenizer: Any, wording: Wording = Wording()
) -> Prompt:
    """The prompt of a model without a sidecar: `placeholder` stands for each vector, one token each. PromptError.

    text: with INJECT once per vector, or once for all of them
    """
    parts = text.split(INJECT)
    if len(parts) not in (2, vectors + 1):
        raise PromptError(f"the prompt holds {INJECT} {len(parts) - 1} times, for {vectors} vectors")
    if len(parts) == 2:
        parts = [parts[0], *[""] * (vectors - 1), parts[1]]
    whole = rendered(INJECT.join(parts), tokenizer, wording).split(INJECT)
    if len(whole) != vectors + 1:
        raise PromptError("the chat template changes the places of the vectors: give another prompt")
    spans, end = [], 0
    for part in whole[:-1]:
        start = end + len(part)
        end = start + len(placeholder)
        spans.append((start, end))
    coded = tokenizer(placeholder.join(whole), add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    places: list[int] = []
    for start, end in spans:  # a token may leave out the space that it begins with
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if len(inside) != 1 or offsets[inside[0]][0] < start or offsets[inside[0]][1] != end:
            raise PromptError(
                f"the placeholder {placeholder!r} is not one token of its own where vector {len(places) + 1} enters: "
                "give another one, or another prompt"
            )
        places.append(inside[0])
    if len({ids[place] for place in places}) != 1:
        raise PromptError(
            f"the placeholder {placeholder!r} is not the same token everywhere: give another one"
        )
    return Prompt(tuple(ids), tuple(places))


def rendered(message: str, tokenizer: Any, wording: Wording) -> str:
    """The text that the model reads: a user's message in the chat template, or as it stands if there is none."""
    if not tokenizer.chat_template:
        if wording.system is not None or wording.variables:
            raise PromptError("a system message and template options need a chat template, and there is none")
        return message + wording.prefill
    chat = ChatText(tokenizer, replies=True, reading=Reading(None, wording.system, wording.variables))
    made = chat.render({"prompt": message})
    if made.notes:
        raise PromptError(f"the prompts {made.notes[0]}: leave it out")
    return made.text + wording.prefill


def _check_neighbours(sidecar: Sidecar, ids: list[int], place: int) -> None:
    for name, offset, expected in (("left", -1, sidecar.left_id), ("right", 1, sidecar.right_id)):
        at = place + offset
        actual = ids[at] if 0 <= at < len(ids) else None
        if expected is not None and actual != expected:
            raise CheckpointError(
                f"{sidecar.path}: the marker's {name} neighbour is token {actual}, the sidecar says {expected}"
            )
