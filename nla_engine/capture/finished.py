"""A part of a run that is finished already: its job, started once more, has nothing to do."""

from __future__ import annotations

from pathlib import Path

from nla_engine.capture.load import prompts_without_model
from nla_engine.capture.summary import CaptureSummary
from nla_engine.config import CaptureOptions
from nla_engine.store import CaptureStore
from nla_engine.store.objects import place
from nla_engine.store.swap import exists

#: Options that change no row, or that are compared in another form.
_FREE = (
    "prompts",
    "out",
    "layer",
    "batch_size",
    "device",
    "kernels",
    "resume",
    "ray",
    "ray_workers",
    "ray_units",
    "keep_partial",
    "host_memory",
    "trust_remote_code",
)


def finished_part(options: CaptureOptions) -> CaptureSummary | None:
    """The summary of a finished part, if the same prompts and options made it. Loads no weights.

    None: there is work to do, or a question that needs the model; then the run goes on as any that resumes.
    """
    if options.part is None or not options.continues or options.dry_run:
        return None
    if Path("-") in options.prompts or not exists(place(options.target)):
        return None
    store = CaptureStore.open(options.target)
    before, given = dict(store.provenance.get("options", {})), options.to_dict()
    same = before.keys() == given.keys() and all(
        given[key] == before[key] for key in given if key not in _FREE
    )
    same &= options.layer == "all" or list(options.layer) == before.get("layer")
    if not (store.complete and same):
        return None
    prompts = prompts_without_model(options)
    if prompts is None or store.options.get("prompts") != prompts.fingerprint():
        return None
    return CaptureSummary.of_store(store, skipped=len(prompts.skipped))
