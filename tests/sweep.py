"""Run a small model of every family of causal language models in transformers, and of those that see images, and write
docs/models.md.

`make sweep`, or with names of configurations, which are run alone: the page keeps its other rows. Ends with 1 if a
family is refused that is not in REFUSED, runs although it is, gives an error of Python, or is wrong.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_runs import outcome
from small_families import configurations, seeing, small_model

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
_STATES = "not one vector of"
_POSITIONS = "differs in a prompt from its own forward"
#: Families without a small model, and a part of the library's own message.
UNBUILT = {
    "BltConfig": "not small",
    "Dots3NoteConfig": "adapter_in_dim must match",
    "Dots3NoteTextConfig": "not small",
    "Gemma3nConfig": "requires the timm library",
    "Gemma4AssistantConfig": "must be 0",
    "GitConfig": "not small",
    "MusicgenConfig": "has no attribute 'dropout'",
    "MusicgenMelodyConfig": "has no attribute 'dropout'",
    "Phi4MultimodalConfig": "not small",
    "ZambaConfig": "tie_weights_keys",
}
#: Families that see images without a small model, or with none that reads text.
UNSEEN = {
    *("Apertus1p5Config", "ChameleonConfig", "DeepseekOcr2Config", "DiffusionGemmaConfig"),
    *("Ernie4_5_VLMoeConfig", "EvollaConfig", "FastVlmConfig", "Florence2Config", "Glm5NextConfig"),
    *("Granite4VisionConfig", "HYV4VLConfig", "HunYuanVLConfig", "IdeficsConfig", "Inkling2Config"),
    *("Inkling2LoopConfig", "InklingConfig", "JanusConfig", "Kosmos2Config", "Kosmos2_5Config"),
    *("Mistral4Config", "Molmo2Config", "MuseGlimmerConfig", "MuseSparkConfig", "PI0Config"),
    *("NemotronH_Omni_Reasoning_V3_Config", "PerceptionLMConfig", "Qwen2_5OmniThinkerConfig"),
    *("Step3p7Config", "T5Gemma2Config", "UnlimitedOcrConfig"),
}
#: Families that the engine's slots run, and the library does not: parts of models, whose own code needs the whole's
#: configuration.
PARTS = {"Qwen3OmniMoeThinkerConfig"}
_ENCODER = ("cannot be run by transformers' own generation", "an encoder-decoder")
#: Families that do not run, and a part of the message that says why; behind it what that means.
REFUSED = {
    "Blip2Config": ("not enough values to unpack", "reads an image first"),
    "BlipConfig": (_POSITIONS, "reads an image first"),
    "CamembertConfig": (_POSITIONS, "generation counts positions otherwise than the model's own forward"),
    "CpmAntConfig": (_STATES, "puts tokens of its own before the prompt"),
    "Data2VecTextConfig": (_POSITIONS, "generation counts positions otherwise than the model's own forward"),
    "DeepseekV4Config": (_STATES, "several residual streams"),
    "DoryConfig": ("cannot be run by transformers' own generation", "runs some blocks several times"),
    "Gemma3nTextConfig": (_STATES, "several residual streams"),
    "Gemma4UnifiedAssistantConfig": (
        "cannot be run by transformers' own generation",
        "drafts for another model, alone it does not generate",
    ),
    "HYV4Config": (_STATES, "several residual streams"),
    "HrmTextConfig": ("in no list of their own, or in several", "runs two lists of blocks in turns"),
    "Inkling2LoopTextConfig": ("which is its row is ambiguous", "runs some blocks several times"),
    "InstructBlipConfig": ("not enough values to unpack", "reads an image first"),
    "InstructBlipVideoConfig": ("not enough values to unpack", "reads a video first"),
    "PPFormulaNetConfig": _ENCODER,
    "Pix2StructConfig": _ENCODER,
    "ProphetNetConfig": (_STATES, "several streams of predictions"),
    "Qwen4ExpConfig": (_STATES, "several residual streams"),
    "Qwen4ExpTextConfig": (_STATES, "several residual streams"),
    "RobertaConfig": (_POSITIONS, "generation counts positions otherwise than the model's own forward"),
    "RobertaPreLayerNormConfig": (
        _POSITIONS,
        "generation counts positions otherwise than the model's own forward",
    ),
    "RwkvConfig": (_STATES, "its code mixes the sequences of a batch"),
    "UdopConfig": _ENCODER,
    "VisionEncoderDecoderConfig": _ENCODER,
    "XLMConfig": (
        "in no list of their own, or in several",
        "has no blocks, but lists of attentions and of MLPs",
    ),
    "XLMRobertaConfig": (_POSITIONS, "generation counts positions otherwise than the model's own forward"),
    "XLMRobertaXLConfig": (_POSITIONS, "generation counts positions otherwise than the model's own forward"),
    "XLNetConfig": (_STATES, "reads the sequence in permuted order, with a token of its own at the end"),
    "XmodConfig": ("Input language unknown", "needs to be told a language"),
}


#: What else there is to say of a family that runs.
NOTED = {"MoshiConfig": "up to its window: behind it its cache keeps less than its own forward reads"}


#: Outcome and reason by model type.
Found = dict[str, tuple[str, str]]


def family_outcome(config: type[Any], rng: np.random.Generator, *, both: bool = True) -> tuple[str, str]:
    """(fast | library | not, why not). AssertionError if rows or tokens are wrong, or a known exception is none.

    both: what is fast must be right by the library too
    """
    name = config.__name__
    if name in UNBUILT:
        why = _why_unbuilt(config)
        assert why, f"{name}: can be built now: take it out of UNBUILT"
        assert UNBUILT[name] in why, f"{name}: cannot be built for another reason: {why}"
        return "not tried", "no small model of it can be made"
    if name in UNSEEN:
        assert _why_unbuilt(config) or outcome(config, rng)[0] == "not", (
            f"{name}: runs now: take it out of UNSEEN"
        )
        return "not tried", "no small model of it can be made"
    way, why = outcome(config, rng)
    if way == "fast" and both and name not in PARTS:
        assert outcome(config, rng, "library") == ("library", ""), f"{name}: by the library alone"
    if way != "not":
        assert name not in REFUSED, f"{name}: runs now: take it out of REFUSED"
        return way, NOTED.get(name, "")
    assert why.endswith("is not supported") or "positions" in why, f"{name}: {why}"
    part, reason = REFUSED.get(name, ("no such family is known to be refused", ""))
    assert part in why, f"{name}: {why}"
    return way, reason


def _why_unbuilt(config: type[Any]) -> str:
    """The library's message where no small model can be made; empty if one can."""
    try:
        small_model(config)
    except Exception as error:  # the library raises many types
        return str(error)
    return ""


def model_type(config: type[Any]) -> str:
    """The name in config.json."""
    return str(config.model_type)


def on_page() -> Found:
    """Outcome and reason by model type, as docs/models.md has them."""
    rows = re.findall(
        r"^\| `([^`]+)` \| ([a-z ]+) \| (.*?) ?\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: (way, why) for name, way, why in rows}


def page(found: Found) -> str:
    """docs/models.md. found: outcome and reason by model type."""
    text = PAGE.read_text(encoding="utf-8")
    head = text[: text.index("## Families")]
    parts = (
        ("Families", "families of causal language models", configurations()),
        ("Families that see images", "other families that see images", seeing()),
    )
    for title, what, configs in parts:
        rows = {model_type(each): found[model_type(each)] for each in configs if model_type(each) in found}
        table = "\n".join(f"| `{name}` | {way} | {why} |" for name, (way, why) in sorted(rows.items()))
        fast, library = (sum(each == way for each, _ in rows.values()) for way in ("fast", "library"))
        run = "is run" if library == 1 else "are run"
        head += (
            f"## {title}\n\nOf the {len(rows)} {what} in transformers {transformers.__version__}, {fast} "
            f"are fast and\n{library} {run} by the library. `make sweep` made this table.\n\n"
            f"| `model_type` | | |\n|---|---|---|\n{table}\n\n"
        )
    return head[:-1]


def main(names: list[str]) -> int:
    """Sweep over the named configurations, or all."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found, failed = on_page() if names else {}, 0
    for config in [*configurations(), *seeing()]:
        if names and config.__name__ not in names:
            continue
        began = time.monotonic()
        try:
            way, why = family_outcome(config, np.random.default_rng(0))
        except Exception as error:  # a family that breaks does not end the sweep
            failed += 1
            way, why = "WRONG", f"{type(error).__name__}: {' '.join(str(error).split())}"
            if names:
                traceback.print_exc()
        found[model_type(config)] = (way, why)
        print(f"{config.__name__:32s} {time.monotonic() - began:5.1f} s  {way} {why}", flush=True)
    if failed:
        print(f"{failed} families are not as they should be; docs/models.md was not written", file=sys.stderr)
    else:
        PAGE.write_text(page(found), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
