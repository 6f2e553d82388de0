"""The options of lens: stored activations read with the final norm and head of their own model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields
from nla_engine.options import AT_LEAST_1, Options, block_numbers, check_ending, check_local, option


@dataclass(frozen=True)
class LensOptions(Options):
    """`lens`. See each field's help."""

    store: str = fields.store()
    model: str = option("The captured model: a local directory or a Hub id.")
    out: Path = fields.table()
    layer: tuple[int, ...] | str | None = option(
        "Layer of the store to read; a range, such as 5-20; or all. Several: join them with commas, or repeat the "
        "option. [default: all]",
        None,
        typed=list[str] | None,
        parse=lambda name, given: block_numbers(name, given) if given else None,
    )
    where: str | None = fields.where("read")
    limit: int | None = fields.limit()
    top_k: int = option("Tokens to list of each row, the likeliest first.", 10, must=AT_LEAST_1)
    any_weights: bool = option(
        "Read with another model's norm and head, such as those of a fine-tuned one, if it has the same tokens.",
        False,
    )
    base: str | None = fields.base("the model")
    batch_size: int | None = fields.batch_size("Rows read at once.")
    device: str | None = fields.device()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        if self.layer is not None:
            object.__setattr__(self, "layer", block_numbers("layer", self.layer))
        super().__post_init__()
        check_local(self.out)
        check_ending(self.out, "the table is Parquet", ".parquet")
