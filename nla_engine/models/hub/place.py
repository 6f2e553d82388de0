"""A name of the Hub: a repository, `owner/name`, or a folder inside one, `owner/name/folder`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """repository: its id, two parts; folder: path inside it, "" for the repository itself."""

    repository: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.repository}/{self.folder}" if self.folder else self.repository

    @classmethod
    def parse(cls, name: str) -> Place | None:
        """The place of a name; None if it cannot be one."""
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        parts = name.split("/")
        if len(parts) < 2 or any(part in ("", ".", "..") or "\\" in part for part in parts):
            return None
        try:
            validate_repo_id("/".join(parts[:2]))
        except HFValidationError:
            return None
        return cls("/".join(parts[:2]), "/".join(parts[2:]))

    def path(self, file: str) -> str:
        """The path in the repository of one of the place's files."""
        return f"{self.folder}/{file}" if self.folder else file

    def inside(self, files: Mapping[str, int]) -> dict[str, int]:
        """Those of a repository's files that are inside the place, by their path in it."""
        start = self.path("")
        return {file.removeprefix(start): size for file, size in files.items() if file.startswith(start)}
