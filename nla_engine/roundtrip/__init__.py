"""Stage 2: store -> AV -> text -> AR -> round-trip error -> Parquet. Streams; commits in chunks; resumable."""

from nla_engine.roundtrip.run import CONTROL_ROWS, run_roundtrip
from nla_engine.roundtrip.summary import RoundtripSummary, summarise

__all__ = ["CONTROL_ROWS", "RoundtripSummary", "run_roundtrip", "summarise"]
