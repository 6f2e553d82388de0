"""The activation store: what a capture run leaves behind.

`views/` reads a store, `exchange/` converts and merges stores, `care/` verifies and repairs them.
"""

from nla_engine.store.format import Finish, RowFlag, row_flags
from nla_engine.store.lease import WriterWatch
from nla_engine.store.records import LayerRows, SequenceRows
from nla_engine.store.sequences import StoredSequence
from nla_engine.store.views.capture_store import CaptureStore, LayerReader
from nla_engine.store.writer import StoreWriter

__all__ = [
    "CaptureStore",
    "Finish",
    "LayerReader",
    "LayerRows",
    "RowFlag",
    "SequenceRows",
    "StoreWriter",
    "StoredSequence",
    "WriterWatch",
    "row_flags",
]
