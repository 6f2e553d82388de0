"""Stage 2: store -> AV -> text -> AR -> round-trip error -> Parquet. Streams; commits in chunks; resumable."""
