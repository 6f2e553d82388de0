"""Where the files of a model are: one directory, or an adapter's and its base's.

An adapter's own sidecar, tokenizer, chat template and head come before those of its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError, NLAError, RequestError
from nla_engine.models.adapters.form import Adapter, find_adapter
from nla_engine.models.adapters.tensors import fingerprint
from nla_engine.models.hub import commit_of, find_directory


@dataclass(frozen=True)
class Source:
    """A model's files. directory: what was named; weights: the directory of config and weights.

    Without an adapter the two are one. base: the name of the base, None without an adapter.
    """

    name: str
    directory: Path
    weights: Path
    base: str | None = None
    adapter: Adapter | None = None

    @property
    def revision(self) -> str | None:
        """The Hub commit of what was named."""
        return commit_of(self.directory)

    def having(self, *files: str) -> Path:
        """The directory with one of these files: the one that was named, else the base's, else the first of them."""
        for directory in (self.directory, self.weights):
            if any((directory / file).is_file() for file in files):
                return directory
        return self.directory

    def origin(self) -> Mapping[str, Any]:
        """What a store or a result records of an adapter and its base; nothing without one."""
        if self.adapter is None:
            return {}
        return {
            "adapter": fingerprint(self.adapter.weights),
            "base": self.base,
            "base_revision": commit_of(self.weights),
            **({"base_in_training": "4bit"} if self.adapter.quantised else {}),
        }


def find_source(
    name: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    flag: str = "--base",
    remote_code: bool = False,
) -> Source:
    """The directories of a checkpoint by name, and those of its base if it is an adapter. Fetches what is missing.

    base, base_revision: given in place of the one that the adapter names; flag: the option for that, for errors
    Raises what `find_directory` raises, RequestError for a base beside whole weights, CheckpointError for an adapter
    that cannot be merged or whose base cannot be found.
    """
    directory = find_directory(name, revision, remote_code=remote_code)
    adapter = find_adapter(directory, name)
    if adapter is None:
        if base is not None:
            raise RequestError(
                f"{flag} {base}: {name} is no adapter, it has weights of its own: leave {flag} out"
            )
        return Source(name, directory, directory)
    named = base or adapter.base
    if named is None:
        raise CheckpointError(
            f"{name}: {adapter.config.name} does not name the base of this adapter: pass {flag} with the model that "
            "it was trained on"
        )
    try:
        weights = find_directory(named, base_revision if base else adapter.revision, remote_code=remote_code)
    except NLAError as error:
        whose = f"{flag}" if base else f"the base that {adapter.config.name} names"
        more = "" if base else f"; pass {flag} if you have it elsewhere"
        raise CheckpointError(f"{name}: is an adapter, and {whose} cannot be had: {error}{more}") from error
    if find_adapter(weights, named) is not None:
        raise CheckpointError(
            f"{name}: its base {named} is an adapter itself: merge that into its own base, and pass {flag} with it"
        )
    return Source(name, directory, weights, named, adapter)
