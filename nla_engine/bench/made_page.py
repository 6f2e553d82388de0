"""The table of a round trip that never took place: every row of a store with one explanation of made-up words."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nla_engine.provenance import describe_run
from nla_engine.roundtrip.results import ResultTable
from nla_engine.roundtrip.rows import row_columns
from nla_engine.store import CaptureStore

#: Different words, and words of an explanation.
_WORDS, _EACH = 4_000, 40


def write_table(store: CaptureStore, path: Path) -> None:
    """Write the table of a store's first site."""
    rng, n, site = np.random.default_rng(0), store.rows, store.sites[0]
    # Some words are common and most are rare, as in texts.
    chosen = (_WORDS * rng.random((n, _EACH)) ** 4).astype(np.int64).tolist()
    cos = np.clip(rng.normal(0.85, 0.08, n), -1, 1)
    run = {"where": None, "limit": None, "samples": 1, "temperature": 0.0, "seed": 0, "max_new_tokens": 64}
    metadata = {
        **describe_run(),
        "run": {**run, "variance": None},
        "av": "made up",
        "ar": "made up",
        "injection_scale": None,
        "layer": site.key,
        "variance": 0.8,
        "variance_rows": n,
        "control_rows": min(1024, n),
        "control_vectors": min(1024, n),
    }
    with ResultTable.open(
        path, options={"store": store.attributes["store_id"]}, resume=False, overwrite=False
    ) as table:
        table.append(
            {
                **row_columns(store, store.layer(site), np.arange(n)),
                "sample": np.zeros(n, np.int32),
                "best": np.ones(n, bool),
                "explanation": [" ".join(f"word{word}" for word in words) for words in chosen],
                "status": ["ok"] * n,
                "n_tokens": np.full(n, _EACH, np.int32),
                "cos": cos,
                "mse_nrm": 2 * (1 - cos),
                "cos_shuffled": rng.normal(0.2, 0.1, n),
                "retrieval_rank": rng.geometric(0.5, n).astype(np.int32),
            }
        )
        table.finish(
            metadata, lambda part: {name: [None] * len(part) for name in ("fve_nrm", "fve_meannorm")}
        )
