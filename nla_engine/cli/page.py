"""The page that `info` prints: what a store holds, the model and run that made it, its codec and the bytes per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nla_engine.cli.output import show
from nla_engine.config import CaptureOptions
from nla_engine.errors import StoreError
from nla_engine.models.tokens import excerpt
from nla_engine.sites import listed
from nla_engine.store import CaptureStore, Finish, RowFlag
from nla_engine.store.format import FINISH_MEANINGS, flagged
from nla_engine.store.objects import ObjectPath

#: How many sequences are read for the fields of their prompt records: the files of millions would take minutes.
RECORDS_READ = 10_000

#: Keys of the provenance in the order in which they are printed; keys in no list come last.
_MODEL = (
    "model",
    "revision",
    "architecture",
    "blocks",
    "weights",
    "tokenizer",
    "chat_template",
    "chat_template_clock",
    "dtype",
)
_RUN = (
    "command",
    "started",
    "device",
    "attention",
    "sampling",
    "skipped_prompts",
    "imported_from",
    "sidecar",
)
_CHOSEN = ("temperature", "seed", "max_new_tokens", "positions", "prompts", "kernels")
#: Options that are printed where they were given.
_GIVEN = (
    "top_p",
    "top_k",
    "min_p",
    "text_column",
    "prompt_format",
    "system",
    "prefill",
    "template_option",
    "replies",
    "stop",
    "max_tokens",
    "long",
    "per_document",
    "min_position",
    "skip_special",
    "tokens",
    "every",
    "skip_first",
    "skip_sinks",
    "shard",
)
_ELSEWHERE = ("options", "python", "versions", "d_model", "merged_from", "sequences_asked")


@dataclass(frozen=True)
class Counts:
    """What is counted in a store's arrays.

    finish: how many sequences ended for each reason, commonest first
    fields: of the prompt records, nested ones as `outer.inner`, with how many of the records have them
    records: how many prompt records were read, of how many sequences
    """

    prompt_rows: int
    generated_rows: int
    finish: dict[Finish, int]
    fields: dict[str, int]
    records: int
    sequences: int

    @classmethod
    def of(cls, store: CaptureStore) -> Counts:
        """Raises StoreError if an array is damaged."""
        generated = int(np.count_nonzero(flagged(store.column("flags"), RowFlag.GENERATED)))
        reasons = Counter(store.arrays("sequences")["finish"].read().tolist()).most_common()
        fields: Counter[str] = Counter()
        for sequence in store.some_sequences(store.numbers[:RECORDS_READ]):
            fields.update(_fields(sequence.source))
        return cls(
            prompt_rows=store.rows - generated,
            generated_rows=generated,
            finish={Finish(reason): count for reason, count in reasons},
            fields=dict(fields),
            records=min(store.sequences, RECORDS_READ),
            sequences=store.sequences,
        )

    def shown(self) -> dict[str, str]:
        """As lines of the page."""
        fields = [
            name if count == self.records else f"{name} ({count:,} of {self.records:,})"
            for name, count in self.fields.items()
        ]
        partly = "" if self.records == self.sequences else f" (in the first {self.records:,} records)"
        ended = "; ".join(f"{count:,}: {FINISH_MEANINGS[reason]}" for reason, count in self.finish.items())
        return {
            "prompt rows": f"{self.prompt_rows:,}",
            "generated rows": f"{self.generated_rows:,}",
            "how sequences ended": ended or "none has ended",
            "record fields": (", ".join(fields) or "none") + partly,
        }

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "prompt_rows": self.prompt_rows,
            "generated_rows": self.generated_rows,
            "finish": {str(reason.name).lower(): count for reason, count in self.finish.items()},
            "record_fields": self.fields,
        }


def _fields(source: Any, prefix: str = "") -> Iterator[str]:
    """The names under which `--where record.NAME` finds the fields of a prompt record."""
    if isinstance(source, Mapping):
        for key, value in source.items():
            yield from _fields(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]


def counted(store: CaptureStore) -> Counts | str:
    """The counts, or why there are none: `info` also describes a damaged store."""
    if isinstance(store.path, ObjectPath):
        return "on an object store, where that would fetch every shard"
    try:
        return Counts.of(store)
    except (StoreError, ValueError) as error:
        return str(error)


def facts(store: CaptureStore, counts: Counts | str) -> dict[str, Any]:
    """The same as one flat object, for programs."""
    return {
        "store": str(store.path),
        "complete": store.complete,
        "rows": store.rows,
        "sequences": store.sequences,
        **(counts.to_dict() if isinstance(counts, Counts) else {"cannot_be_counted": counts}),
        "layers": [site.key for site in store.sites],
        "d_model": store.d_model,
        **({} if store.next_token is None else {"next_token": store.next_token}),
        "codec": store.codec.name,
        "row_bytes": store.codec.row_bytes,
        "codec_error": store.attributes.get("codec_error"),
        "sink_norm": store.attributes.get("sink_norm"),
        "first_prompt": _first_prompt(store),
        **store.provenance,
        "ended": store.commit.time if store.complete else None,
    }


def show_page(store: CaptureStore, counts: Counts | str, console: Console) -> None:
    """Print the page. Markup in a store's own text is printed literally."""
    about, made, commit, codec = store.attributes, store.provenance, store.commit, store.codec
    chosen = made.get("options")
    chosen = chosen if isinstance(chosen, Mapping) else {}
    state = (
        "complete"
        if store.complete
        else "not complete: still being written, or interrupted (--resume continues it)"
    )
    contents = {
        "state": state,
        "rows": store.rows,
        "sequences": _how_many(store),
        **(counts.shown() if isinstance(counts, Counts) else {"cannot be counted": counts}),
        "tokens": commit.tokens,
        **({} if store.next_token is None else {"next tokens": _next_tokens(store.next_token)}),
        "vectors": listed(store.sites),
        "d_model": store.d_model,
        "size": _size(store.nbytes),
        "format version": about["format_version"],
        "store id": about["store_id"],
    }
    run = {name: made[name] for name in _RUN if name in made}
    run |= {name: chosen[name] for name in _CHOSEN if name in chosen}
    run |= {
        name: chosen[name]
        for name in _GIVEN
        if chosen.get(name) and chosen[name] != getattr(CaptureOptions, name)
    }
    run |= {"last commit" if not store.complete else "ended": commit.time, "writers so far": commit.epoch}
    storage = {
        "codec": codec.name,
        "decoding": about["codec"]["decode"],
        "bytes per row and layer": f"{codec.row_bytes:,} (bfloat16: {2 * codec.d_model:,})",
        "rows per shard": f"{about['shard_rows']:,} of codes, {about['narrow_shard_rows']:,} of the other row arrays",
    }
    console.print(str(store.path), style="bold", markup=False, highlight=False)
    _section(console, "contents", contents)
    _section(
        console,
        "model",
        {name: made[name] for name in _MODEL if name in made}
        | {"layer K": about["layer_convention"]}
        | about.get("site_conventions", {}),
    )
    _section(console, "run", run)
    if text := _first_prompt(store):
        _section(console, "first prompt", {"as the model read it": text})
    _section(console, "storage", storage)
    console.print(_layers(store))
    versions = made.get("versions")
    software = {"python": made.get("python"), **(versions if isinstance(versions, Mapping) else {})}
    _section(console, "software", {name: value for name, value in software.items() if value is not None})
    for number, origin in enumerate(made.get("merged_from") or []):
        kept = {"path": origin["path"], "store id": origin["store_id"], "rows": origin["commit"]["rows"]}
        _section(console, f"merged from, {number + 1}", kept | {"prompts": origin["options"].get("prompts")})
    known = {*_MODEL, *_RUN, *_ELSEWHERE}
    _section(console, "also noted", {name: value for name, value in made.items() if name not in known})


def _next_tokens(top: int) -> str:
    likeliest = f", and the {top:,} likeliest tokens" if top else ""
    return f"log-probability of the token behind each row{likeliest}"


def _how_many(store: CaptureStore) -> str:
    """The sequences, and of how many if the run is not done and says it."""
    asked = store.provenance.get("sequences_asked")
    more = "" if store.complete or not isinstance(asked, int) else f" of {asked:,}"
    return f"{store.sequences:,}{more}"


def _first_prompt(store: CaptureStore) -> str | None:
    """None of an empty store, of an imported one without texts, and of one that would have to be fetched."""
    if not store.sequences or isinstance(store.path, ObjectPath):
        return None
    return excerpt(store.sequence(store.numbers[0]).prompt_text()) or None


def _section(console: Console, title: str, entries: Mapping[str, Any]) -> None:
    if not entries:
        return
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(width=23)
    table.add_column(overflow="fold")
    for name, value in entries.items():
        table.add_row(escape(name), escape(show(value)))
    console.print(table)


def _layers(store: CaptureStore) -> Table:
    """One line per layer: the codec's measured relative L2 error, and how many rows are kept exactly."""
    table = Table(title="layers", box=None, title_justify="left", title_style="bold")
    table.add_column("layer")
    for name in ("error mean", "p99", "worst", "on rows", "sink norm", "rows kept exactly"):
        table.add_column(name, justify="right")
    for layer in store.sites:
        error = store.codec_error.get(layer) or {}
        measured = [show(error.get(name)) for name in ("mean", "p99", "worst", "rows")]
        kept = [show(store.sink_norm[layer]), show(store.commit.exact[layer])]
        table.add_row(str(layer), *map(escape, measured), *kept)
    return table


def _size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 1 << 28 else f"{size / 2**20:.3g} MiB"
