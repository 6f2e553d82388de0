"""A shard: the part of a run's prompts that one of several jobs does, each into a store of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import numpy as np

from nla_engine.errors import RequestError


@dataclass(frozen=True, order=True)
class Shard:
    """Part `part` of `of`, counted from 1."""

    part: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "3/8". RequestError if it is no such text, or there is no such part."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not found:
            raise RequestError(f"--shard is {text!r}: it must be a part and the number of parts, such as 3/8")
        part, of = int(found[1]), int(found[2])
        if not 1 <= part <= of:
            parts = f"the parts of {of} are 1/{of} to {of}/{of}" if of else "there is at least one part"
            raise RequestError(f"--shard is {text!r}: {parts}")
        return cls(part, of)

    def __str__(self) -> str:
        return f"{self.part}/{self.of}"

    def takes(self, units: np.ndarray) -> np.ndarray:
        """bool [n]: which units of work, int [n], are this part's: every `of`-th."""
        return units % self.of == self.part - 1

    def name(self, out: str) -> str:
        """The store of this part of the run `out`: run.3-of-8.zarr for run.zarr."""
        return name_beside(out, f"{self.part}-of-{self.of}", "--shard")


def name_beside(out: str, word: str, option: str) -> str:
    """run.WORD.zarr for run.zarr. RequestError, naming the option, for a whole bucket, which has nothing beside it."""
    directory, name = os.path.split(out.rstrip("/"))
    if "://" in out and directory.endswith(":"):
        raise RequestError(f"{option}: beside {out} there is no place: give a name in the bucket")
    stem, ending = os.path.splitext(name)
    return os.path.join(directory, f"{stem}.{word}{ending}")
