"""What patch and clauses start from: texts, AR and captured model, each checked against the store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_engine.config import ClaimsOptions, ClausesOptions, ControlsOptions, PatchOptions, ScoreOptions
from nla_engine.errors import CheckpointError, RequestError, StoreError
from nla_engine.models.captured import load_captured
from nla_engine.models.load import DTYPES, LanguageModel
from nla_engine.roundtrip.pair import Pair, load_pair
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.rows import nothing_selected, spread
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.store import CaptureStore

#: Options of a run that has texts read by an AR.
ReferOptions = PatchOptions | ControlsOptions | ClausesOptions
#: Options of a run that say how its AR was loaded, apart from its name; and each as an option, from its form in JSON.
AR_AS_GIVEN: dict[str, Callable[[Any], Any]] = {
    "ar_map": Path,
    "whitening": Path,
    "ar_base": str,
    "template_value": lambda pairs: tuple((name, value) for name, value in pairs),
}


def check_captured(store: CaptureStore) -> None:
    """StoreError unless the store says what was read and with which weights."""
    store.check_tokens("no model can read them again")
    if store.provenance.get("weights") is None or store.provenance.get("dtype") not in DTYPES:
        raise StoreError(f"{store.path}: does not say with which weights it was captured: capture it again")


def selected_texts(
    options: ReferOptions | ClaimsOptions, store: CaptureStore, chosen: np.ndarray | None = None
) -> TextFile:
    """The texts of the rows that `where` and `limit` select. StoreError if there are none.

    chosen: int64 [n]; only these rows
    """
    texts = TextFile.read(options.explained, store)
    rows = texts.selected
    if chosen is not None:
        rows = rows[np.isin(rows, chosen)]
    if options.where is not None:
        rows = rows[np.isin(rows, store.where(options.where))]
    if not len(rows):
        raise nothing_selected(options)
    if options.limit is not None and options.limit < len(rows):
        rows = rows[spread(len(rows), options.limit)]
    return texts.only(rows)


def reading_options(options: ReferOptions, texts: TextFile) -> ScoreOptions:
    """The options with which `score` would read the texts. RequestError if no AR is named."""
    given: dict[str, Any] = {name: getattr(options, name) for name in AR_AS_GIVEN}
    ar = options.ar
    if ar is None:
        made = texts.metadata or {}
        if (ar := made.get("ar")) is None:
            raise RequestError(f"{texts.path}: does not name an AR, since none has scored it: give --ar")
        for name, told in made["run"].items():
            if name in AR_AS_GIVEN and told and not given[name]:
                given[name] = AR_AS_GIVEN[name](told)
    if isinstance(options, ControlsOptions):  # which writes its table as score does
        given |= {name: getattr(options, name) for name in ("variance", "resume", "overwrite")}
    same = ("store", "out", "layer", "seed", "precision", "dtype", "device", "kernels", "trust_remote_code")
    return ScoreOptions(
        ar=ar, texts=options.explained, **{name: getattr(options, name) for name in same}, **given
    )


def read_by(
    options: ReferOptions,
    reading: ScoreOptions,
    announce: Callable[[str], None],
    reconstructor: Reconstructor | None = None,
) -> Pair:
    """The AR, if it is not loaded. An error names the table if that is where its name comes from."""
    try:
        return load_pair(reading, announce, reconstructor=reconstructor)
    except CheckpointError as error:
        if options.ar is not None:
            raise
        raise CheckpointError(
            f"{options.explained}: names the AR {reading.ar}, which cannot be read: {error}: give it with --ar"
        ) from error


def check_revision(options: ReferOptions, texts: TextFile, revision: str | None) -> None:
    """RequestError if the AR that the table names was fetched in another revision than the one that made the table."""
    made = texts.metadata or {}
    if options.ar is None and revision != made.get("ar_revision"):
        raise RequestError(
            f"{texts.path}: its AR {made.get('ar')} was read in revision {made.get('ar_revision')}, and is now "
            f"{revision}: name the one to use with --ar"
        )


def load_checked(
    options: PatchOptions | ClausesOptions, store: CaptureStore, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, str]:
    """The captured model on the device in this dtype, and the fingerprint of its weights in that of the capture.

    RequestError if the weights are others.
    """
    made, name = store.provenance, options.model
    assert name is not None, "no model was asked for"
    load = partial(
        load_captured, name, made, device, base=options.base, remote_code=options.trust_remote_code
    )
    lm = load()
    weights = lm.fingerprint()
    if weights != made["weights"]:
        raise RequestError(
            f"--model {name}: its weights ({weights}) are not those that {store.path} was captured with "
            f"({made['weights']}, {made.get('model')}): give the captured model"
        )
    if dtype != DTYPES[made["dtype"]]:
        del lm
        lm = load(dtype=dtype)
    return lm, weights
