"""What a store records of the run that makes it: where rows come from, and what a resumed run must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nla_engine.capture.load import CLOCK, prompts_rendering
from nla_engine.capture.reply_limits import context_size
from nla_engine.config import CaptureOptions
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.ops.sampling import sampling_of
from nla_engine.options import MAX
from nla_engine.provenance import describe_run
from nla_engine.sites import RESID_POST

#: Options that a resumed run must have in common where they are not what is usual: older stores lack them.
_ADDED: dict[str, Any] = {
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "system": None,
    "prefill": None,
    "replies": 1,
    "stop": [],
    "template_option": None,
    "max_tokens": None,
    "long": "refuse",
    "per_document": None,
    "min_position": 0,
    "skip_special": False,
    "tokens": None,
    "every": 1,
    "skip_first": False,
    "skip_sinks": False,
    "next_token": None,
    "sites": [RESID_POST],
}


@dataclass(frozen=True)
class Recorded:
    """Of one run. described: the model, by `LanguageModel.describe`; devices: where it runs, in words."""

    options: CaptureOptions
    lm: LanguageModel
    prompts: PromptSet
    layers: tuple[int, ...]
    described: Mapping[str, Any]
    devices: str

    def unchanging(self) -> dict[str, Any]:
        """Options and fingerprints that must be the same when a store is resumed."""
        given = self.options.to_dict()
        always = ("max_new_tokens", "positions", "codec", "temperature", "seed")
        same: dict[str, Any] = {key: given[key] for key in always}
        same |= {key: given[key] for key, usual in _ADDED.items() if given[key] != usual}
        if given["max_new_tokens"] == MAX:
            same["context"] = context_size(self.lm)
        same["layer"] = list(self.layers)
        same["prompts"] = self.prompts.fingerprint()
        return same | {key: self.described[key] for key in ("weights", "tokenizer", "dtype")}

    def provenance(self, library: str | None) -> dict[str, Any]:
        """What a new store records of the model and of the run that made it. library: the attention of transformers'
        own generation, if that runs it."""
        options, prompts = self.options, self.prompts
        attention = "nla_engine slot attention, softmax in float32"
        if library is not None:
            attention = f"transformers' own generation, {library} attention"
        return {
            **self.described,
            **describe_run(),
            "attention": attention,
            "device": self.devices,
            "chat_template": prompts_rendering(options, self.lm),
            **({CLOCK: prompts.clock.isoformat()} if prompts.clock else {}),
            "sampling": str(sampling_of(options)),
            "options": options.to_dict() | {"layer": list(self.layers)},
            "skipped_prompts": len(prompts.skipped),
            "sequences_asked": len(prompts),
        }
