"""Which positions of a sequence have rows: one contiguous range, named by the option `--positions`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowRange:
    """Which positions of a sequence are kept: one contiguous range.

    Every union of the named policies is contiguous, since all of them touch the prompt's end.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, positions: str) -> RowRange:
        return cls(tuple(positions.split(",")))

    def first(self, prompt_size: int) -> int:
        """First position kept."""
        starts = {"all": 0, "prompt": 0, "last": prompt_size - 1, "generated": prompt_size}
        return min(starts[name] for name in self.names)

    def end(self, prompt_size: int, size: int) -> int:
        """One past the last position kept, in a sequence of `size` tokens."""
        ends = {"all": size, "prompt": prompt_size, "last": prompt_size, "generated": size}
        return max(ends[name] for name in self.names)

    @property
    def touches_prompts(self) -> bool:
        """Whether any token of a prompt has a row."""
        return self.first(2) < 2

    @property
    def touches_replies(self) -> bool:
        """Whether the tokens that follow a prompt have rows."""
        return self.end(1, 2) > 1

    def count(self, prompt_size: int, size: int) -> int:
        return max(self.end(prompt_size, size) - self.first(prompt_size), 0)
