"""Where the files of a model are: one directory, or an adapter's and its base's.

An adapter's own sidecar, tokenizer, chat template and head come before those of its base. An AR that is heads alone,
one for each layer of its base, is found in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError, NLAError, RequestError
from nla_engine.models.adapters.form import Adapter, find_adapter
from nla_engine.models.adapters.tensors import fingerprint
from nla_engine.models.checkpoint import VALUE_HEADS, is_heads_alone
from nla_engine.models.hub import commit_of, find_directory


@dataclass(frozen=True)
class Source:
    """A model's files. directory: what was named; weights: the directory of config and weights.

    base: the name of the base; None if the directory has weights of its own, and the two are one
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
        """What a store or a result records of an adapter and its base; nothing without a base."""
        if self.base is None:
            return {}
        found = {"base": self.base, "base_revision": commit_of(self.weights)}
        if self.adapter is None:
            return found
        adapter = {"adapter": fingerprint(self.adapter.weights)}
        return adapter | found | ({"base_in_training": "4bit"} if self.adapter.quantised else {})


def find_source(
    name: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    flag: str = "--base",
    remote_code: bool = False,
) -> Source:
    """The directories of a checkpoint by name, and those of its base if it has one. Fetches what is missing.

    base, base_revision: given in place of the one that the adapter names; flag: the option for that, for errors
    Raises what `find_directory` raises, RequestError for a base beside whole weights, CheckpointError for an adapter
    that cannot be merged or whose base cannot be found.
    """
    directory = find_directory(name, revision, remote_code=remote_code)
    adapter = find_adapter(directory, name)
    if adapter is None and not is_heads_alone(os.listdir(directory)):
        if base is not None:
            raise RequestError(
                f"{flag} {base}: {name} is no adapter, it has weights of its own: leave {flag} out"
            )
        return Source(name, directory, directory)
    kind, config = ("heads", VALUE_HEADS) if adapter is None else ("adapter", adapter.config.name)
    named = base or (None if adapter is None else adapter.base)
    if named is None:
        raise CheckpointError(
            f"{name}: {config} does not name the base of {'these' if adapter is None else 'this'} {kind}: "
            f"pass {flag} with the model that {'they were' if adapter is None else 'it was'} trained on"
        )
    revision = base_revision if base or adapter is None else adapter.revision
    try:
        weights = find_directory(named, revision, remote_code=remote_code)
    except NLAError as error:
        whose = flag if base else f"the base that {config} names"
        more = "" if base else f"; pass {flag} if you have it elsewhere"
        what = "has heads alone" if adapter is None else "is an adapter"
        raise CheckpointError(f"{name}: {what}, and {whose} cannot be had: {error}{more}") from error
    if find_adapter(weights, named) is not None:
        raise CheckpointError(
            f"{name}: its base {named} is an adapter itself: merge that into its own base, and pass {flag} with it"
        )
    return Source(name, directory, weights, named, adapter)
