"""The model of a capture again: as its store names it, at the commit that was captured, and by default in its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nla_engine.models.load import LanguageModel, load_model, pick_dtype
from nla_engine.models.source import find_source


def load_captured(
    name: str,
    made: Mapping[str, Any],
    device: torch.device,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
) -> LanguageModel:
    """Load a model for rows of a store. made: the store's provenance, of this model or of another.

    base: of an adapter; None: as captured, or the one that it names. dtype: None: as captured.
    Raises what `find_source` and `load_model` raise.
    """
    same = name == made.get("model")
    captured = same and not Path(name).is_dir()
    source = find_source(
        name,
        made.get("revision") if captured else None,  # the commit that was captured, not today's
        base=base or (made.get("base") if same else None),
        base_revision=made.get("base_revision") if same and base is None else None,
        remote_code=remote_code,
    )
    return load_model(
        name,
        device=device,
        dtype=dtype or pick_dtype(made.get("dtype"), device),
        source=source,
        remote_code=remote_code,
    )
