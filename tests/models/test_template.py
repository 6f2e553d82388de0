"""Templates of sidecars: holes, braces, literal markers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import MARKER, write_sidecar

from nla_engine.errors import CheckpointError
from nla_engine.models.sidecar import Given, read_sidecar

AV = {
    "role": "av",
    "d_model": 8,
    "extraction": {"injection_scale": 150},
    "tokens": {"injection_char": MARKER, "injection_token_id": 258},
}


def read(tmp_path: Path, sidecar: dict[str, Any], role: str, **given: Any) -> Any:
    return read_sidecar(write_sidecar(tmp_path, sidecar), role, Given(**given))


FILLED = {
    "doubled braces": ("{{x}} {injection_char} {{}}", {}, ("{x} ", " {}")),
    "the layer": ("at {layer}: {injection_char}", {}, ("at 7: ", "")),
    "a value that is given": ("{depth_pct}% {injection_char}", {"depth_pct": "57"}, ("57% ", "")),
    "a value with braces": ("{a} {injection_char}", {"a": "{injection_char}"}, ("{injection_char} ", "")),
    "a literal marker": (f"x {MARKER} {{{{y}}}}", {}, ("x ", " {y}")),
}


@pytest.mark.parametrize("name", FILLED)
def test_templates_are_filled_as_str_format_fills_them(tmp_path: Path, name: str) -> None:
    template, values, expected = FILLED[name]
    sidecar = {**AV, "extraction_layer_index": 7, "prompt_templates": {"av": template}}
    read_one = read(tmp_path, sidecar, "av", values=tuple(values.items()))
    assert read_one.template == expected
    assert MARKER.join(expected) == template.format(injection_char=MARKER, layer=7, **values)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{injection_char} {depth_pct}",
            r"hole {depth_pct} without a value: pass --template-value depth_pct=",
        ),
        ("{injection_char} {layer}", "hole {layer} without a value"),
        ("{injection_char} {injection_char.__class__}", "more than a name"),
        ("{injection_char} {0}", "more than a name"),
        ("{injection_char} {}", "more than a name"),
        ("{injection_char!r}", "more than a name"),
        ("{injection_char:>9}", "more than a name"),
        ("{injection_char} {a[0]}", "more than a name"),
        ("{injection_char} {x", "braces that do not close"),
        ("{injection_char} x}", "braces that do not close"),
        ("{injection_char} {injection_char}", "it holds it 2 times"),
        ("none", "it holds it 0 times"),
        (f"{MARKER} {MARKER}", "it holds it 0 times"),
        (7, "is not a text"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, {**AV, "prompt_templates": {"av": template}}, "av")


def test_the_layer_that_is_read_fills_a_template_where_the_sidecar_tells_none(tmp_path: Path) -> None:
    sidecar = {**AV, "prompt_templates": {"av": "{layer}: {injection_char}"}}
    assert read(tmp_path, sidecar, "av", layer=7).template == ("7: ", "")
    assert read(tmp_path, sidecar, "av", values=(("layer", "8"),)).template == ("8: ", "")
    found = [read(tmp_path, sidecar, "av", layer=layer).fingerprint() for layer in (7, 8)]
    assert found[0] != found[1]
    told = {**sidecar, "extraction_layer_index": 5}
    assert read(tmp_path, told, "av", layer=7).template == ("5: ", ""), "then --layer 7 is refused later"
    with pytest.raises(CheckpointError, match="hole {layer} without a value: pass --layer$"):
        read(tmp_path, sidecar, "av")
    with pytest.raises(CheckpointError, match="--template-value layer=8, but layer 5 is read: leave it out"):
        read(tmp_path, told, "av", values=(("layer", "8"),))


@pytest.mark.parametrize(("layer", "depth"), [(0, 4), (20, 71), (27, 96)])
def test_the_depth_of_a_layer_is_chosen_as_the_trainers_of_all_layers_choose_it(
    tmp_path: Path, layer: int, depth: int
) -> None:
    sidecar = {**AV, "n_layers": 28, "prompt_templates": {"av": "{depth_pct}%: {injection_char}"}}
    depths = [4, 10, 17, 25, 32, 40, 47, 55, 63, 71, 80, 90, 96]
    told = {**sidecar, "depth_percentages": depths}
    assert read(tmp_path, told, "av", layer=layer).template == (f"{depth}%: ", "")
    given = read(tmp_path, told, "av", layer=layer, values=(("depth_pct", "57"),))
    assert given.template == ("57%: ", "")
    for lacking in (sidecar, {**told, "n_layers": None}, {**told, "depth_percentages": []}):
        with pytest.raises(CheckpointError, match="without a value: pass --template-value depth_pct=VALUE"):
            read(tmp_path, lacking, "av", layer=layer)
