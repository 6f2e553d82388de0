"""AV and AR learn a handful of rows by heart: the AV's texts can only be told apart by their vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from train_models import base_of

from nla_engine.roundtrip.verbalize import OPEN_TAG
from nla_engine.train.data import Rows
from nla_engine.train.fit import Fitter
from nla_engine.train.output import write_sidecars
from nla_engine.train.pair import TrainedAR, TrainedAV, mse_nrm
from nla_engine.train.supervised import ar_step, av_step, target_ids

ROWS = 8


def rows_of() -> Rows:
    """Vectors with a large part in common, as those of a layer have, each with a text of its own. Always the same, as
    how many steps it takes depends on them."""
    apart = np.linalg.qr(np.random.default_rng(30).standard_normal((64, ROWS)))[0].T
    vectors = torch.from_numpy(8 * apart + 1.0).float()
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    places = np.arange(ROWS)
    return Rows(places, places, places, vectors, [f"{letter} words {letter}" for letter in "abcdefgh"])


def test_an_av_learns_to_read_the_vector(made: Path, tmp_path: Path) -> None:
    rows, base, steps = rows_of(), base_of(made), 160
    write_sidecars(tmp_path, base.tokenizer, 64, 2, "sqrt_d_model", 0)
    av = TrainedAV(base, tmp_path / "av", 16, 1)
    fitter = Fitter(av.parameters, 0.005)
    for step in range(steps):
        av_step(av, rows, np.arange(ROWS), new_tokens=60, tokens_at_once=10**6)
        fitter.step(step, 4, step / steps)
    ids = target_ids(base.tokenizer, rows.texts, 60)
    with torch.no_grad():
        own = av.log_probs(rows.vectors, ids).split([len(each) for each in ids])
        other = av.log_probs(rows.vectors.roll(1, 0), ids).split([len(each) for each in ids])
    at = len(base.tokenizer(OPEN_TAG, add_special_tokens=False)["input_ids"])  # the letter behind the tag
    right, wrong = (np.mean([float(each[at].exp()) for each in found]) for found in (own, other))
    # Chance is below 0.01; the head is frozen and its weights are small, so the model cannot be sure of a token.
    assert right > 0.05 and wrong < 0.5 * right, (right, wrong)


def test_an_ar_learns_the_vectors_of_texts(made: Path, tmp_path: Path) -> None:
    rows, base, steps = rows_of(), base_of(made, headless=True, blocks=3), 80
    write_sidecars(tmp_path, base.tokenizer, 64, 2, "sqrt_d_model", 0)
    ar = TrainedAR(base, tmp_path / "ar", 8, 1)
    fitter = Fitter(ar.parameters, 0.005)
    for step in range(steps):
        ar_step(ar, rows.vectors, rows.texts, tokens_at_once=10**6)
        fitter.step(step, 4, step / steps)
    with torch.no_grad():
        mse = mse_nrm(rows.vectors, ar.reconstruct(rows.texts))
    variance = 1 - float(rows.vectors.mean(0).square().sum())
    assert float(1 - mse.mean() / variance) > 0.4  # FVE; the mean direction alone has less than 0
