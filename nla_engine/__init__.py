"""nla_engine: capture a language model's activations, explain them with a verbalizer, measure the round trip.

The names below are imported on first use, so that reading a store does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "capture_activations": "nla_engine.interactive.capture",
    "explain": "nla_engine.interactive.explain",
    "lens": "nla_engine.interactive.lens",
    "show": "nla_engine.interactive.show",
    "load_model": "nla_engine.models.load",
    "load_av": "nla_engine.interactive.explain",
    "load_ar": "nla_engine.interactive.explain",
    "Explanations": "nla_engine.interactive.explanations",
    "Lens": "nla_engine.interactive.lens",
    "Page": "nla_engine.interactive.show",
    "demo_models": "nla_engine.demo.run",
    "CaptureStore": "nla_engine.store",
    "StoreWriter": "nla_engine.store",
    "CaptureOptions": "nla_engine.config",
    "RoundtripOptions": "nla_engine.config",
    "ExplainOptions": "nla_engine.config",
    "ScoreOptions": "nla_engine.config",
    "AskOptions": "nla_engine.config",
    "PatchOptions": "nla_engine.config",
    "ClausesOptions": "nla_engine.config",
    "ClaimsOptions": "nla_engine.config",
    "ControlsOptions": "nla_engine.config",
    "LensOptions": "nla_engine.config",
    "CompareOptions": "nla_engine.config",
    "CrossplayOptions": "nla_engine.config",
    "CardOptions": "nla_engine.config",
    "compare": "nla_engine.comparison.run",
    "run_compare": "nla_engine.comparison.run",
    "run_crossplay": "nla_engine.comparison.crossplay",
    "run_card": "nla_engine.comparison.card",
    "run_capture": "nla_engine.capture.run",
    "run_roundtrip": "nla_engine.roundtrip.run",
    "run_explain": "nla_engine.roundtrip.run",
    "run_score": "nla_engine.roundtrip.run",
    "run_ask": "nla_engine.roundtrip.ask",
    "run_patch": "nla_engine.referee.run",
    "run_clauses": "nla_engine.referee.clause_run",
    "run_claims": "nla_engine.referee.claim_run",
    "run_controls": "nla_engine.referee.controls",
    "run_lens": "nla_engine.roundtrip.lens",
    "Verbalizer": "nla_engine.roundtrip.verbalize",
    "Reconstructor": "nla_engine.roundtrip.reconstruct",
    "write_report": "nla_engine.report",
    "NLAError": "nla_engine.errors",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nla_engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
