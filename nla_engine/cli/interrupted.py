"""What an interrupt leaves: how much of the result is committed, and how to go on. It reads what is on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nla_engine.config import CaptureOptions
from nla_engine.errors import NLAError
from nla_engine.options import Options
from nla_engine.store.shown import plural

#: Of the results of a study and of a training, which keep these files, and of one that cannot be read in the moment.
_KEPT = ("study.json", "checkpoint/state.safetensors")
_UNKNOWN = "what is committed is safe: --resume continues from there"


class Interrupted(NLAError):
    """Ctrl-C: the message says what is there."""


@contextmanager
def what_is_left(options: Options) -> Iterator[None]:
    """An interrupt inside says what of the result is there, if the command can resume."""
    try:
        yield
    except KeyboardInterrupt:
        if not hasattr(options, "resume") or getattr(options, "dry_run", False):
            raise
        try:
            left = _left(options)
        except NLAError:
            left = _UNKNOWN
        raise Interrupted(f"interrupted; {left}") from None


def _left(options: Options) -> str:
    out = Path(options.target if isinstance(options, CaptureOptions) else getattr(options, "out"))  # noqa: B009
    if isinstance(options, CaptureOptions):
        from nla_engine.store import CaptureStore

        if "://" in str(options.out):
            return _UNKNOWN
        store = CaptureStore.open(out) if out.exists() else None
        done = 0 if store is None or store.complete else store.sequences
        what = "sequence"
    elif out.suffix.lower() == ".parquet":
        from nla_engine.roundtrip.results import committed

        done, what = committed(out), "row"
    else:
        kept = any((out / name).is_file() for name in _KEPT)
        return _UNKNOWN if kept else "nothing was written yet"
    if not done:
        again = "with --resume" if out.exists() else "again"
        return f"nothing is committed yet: start it {again}"
    are = "is" if done == 1 else "are"
    return f"{plural(done, what)} {are} committed in {out}: --resume continues from there"
