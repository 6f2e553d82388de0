"""The activation store: what a capture run leaves behind.

`nla_engine.store.export` and `nla_engine.store.verify` are imported by those who need them.
"""

from nla_engine.store.format import Finish, RowFlag, row_flags
from nla_engine.store.layer import LayerReader
from nla_engine.store.lease import WriterWatch
from nla_engine.store.reader import CaptureStore
from nla_engine.store.records import LayerRows, SequenceRows
from nla_engine.store.sequences import StoredSequence
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
