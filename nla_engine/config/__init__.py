"""The options of each command: one frozen dataclass per command. The command line is made from them."""

from nla_engine.config.ask import AskOptions
from nla_engine.config.capture import CaptureOptions
from nla_engine.config.claims import ClaimsOptions, ClausesOptions
from nla_engine.config.compare import CardOptions, CompareOptions, CrossplayOptions
from nla_engine.config.controls import ControlsOptions
from nla_engine.config.lens import LensOptions
from nla_engine.config.patch import PatchOptions
from nla_engine.config.roundtrip import (
    ExplainOptions,
    RoundtripOptions,
    ScoreOptions,
    ScoringOptions,
    StageTwoOptions,
    WritingOptions,
)
from nla_engine.config.train import TrainOptions

__all__ = [
    "AskOptions",
    "CaptureOptions",
    "CardOptions",
    "ClaimsOptions",
    "ClausesOptions",
    "CompareOptions",
    "ControlsOptions",
    "CrossplayOptions",
    "ExplainOptions",
    "LensOptions",
    "PatchOptions",
    "RoundtripOptions",
    "ScoreOptions",
    "ScoringOptions",
    "StageTwoOptions",
    "TrainOptions",
    "WritingOptions",
]
