"""The page that `info` prints: what a store holds, the model and run that made it, its codec and the bytes per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nla_engine.cli.output import show
from nla_engine.config import CaptureOptions
from nla_engine.store import CaptureStore

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
    "text_column",
    "system",
    "template_option",
    "max_tokens",
    "long",
    "per_document",
    "min_position",
    "skip_special",
    "tokens",
    "every",
    "skip_first",
    "skip_sinks",
)
_ELSEWHERE = ("options", "python", "versions", "d_model", "merged_from")


def facts(store: CaptureStore) -> dict[str, Any]:
    """The same as one flat object, for programs."""
    return {
        "store": str(store.path),
        "complete": store.complete,
        "rows": store.rows,
        "sequences": store.sequences,
        "layers": list(store.layers),
        "d_model": store.d_model,
        "codec": store.codec.name,
        "row_bytes": store.codec.row_bytes,
        "codec_error": store.attributes.get("codec_error"),
        "sink_norm": store.attributes.get("sink_norm"),
        **store.provenance,
        "ended": store.commit.time if store.complete else None,
    }


def show_page(store: CaptureStore, console: Console) -> None:
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
        "sequences": store.sequences,
        "tokens": commit.tokens,
        "layers": list(store.layers),
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
        if name in chosen and chosen[name] != getattr(CaptureOptions, name)
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
        {name: made[name] for name in _MODEL if name in made} | {"layer K": about["layer_convention"]},
    )
    _section(console, "run", run)
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


def _section(console: Console, title: str, entries: Mapping[str, Any]) -> None:
    if not entries:
        return
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(width=22)
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
    for layer in store.layers:
        error = store.codec_error.get(layer) or {}
        measured = [show(error.get(name)) for name in ("mean", "p99", "worst", "rows")]
        kept = [show(store.sink_norm[layer]), show(store.commit.exact[layer])]
        table.add_row(str(layer), *map(escape, measured), *kept)
    return table


def _size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 1 << 28 else f"{size / 2**20:.3g} MiB"
