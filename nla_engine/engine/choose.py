"""What runs a model: the engine's slots, or transformers' own generation where the engine can't run its architecture.

Chosen once, when a run opens its model, and said in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nla_engine.engine.generator import Generator
from nla_engine.engine.library import Library
from nla_engine.engine.library_check import check_library
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.runner import Runner
from nla_engine.engine.tap import Elsewhere
from nla_engine.errors import RequestError, UnsupportedModel
from nla_engine.models.hub.fetch import say
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels

AnyGenerator = Generator | LibraryGenerator
#: What messages of UnsupportedModel end with.
_NOT_SUPPORTED = ": this architecture is not supported"


def open_runner(
    lm: LanguageModel, *, kernels: Kernels = Kernels(), announce: Callable[[str], None] = say, **more: Any
) -> Runner | Library:
    """A Runner, or a Library if the kernels say so, or are `auto` and the engine cannot run the architecture.

    more: arguments of both
    """
    opened, _ = _open(lm, kernels, announce, more, None)
    return opened


def open_generator(
    lm: LanguageModel,
    *,
    how: dict[str, Any],
    kernels: Kernels = Kernels(),
    announce: Callable[[str], None] = say,
    **more: Any,
) -> AnyGenerator:
    """The same, and a generator over it, which is prepared. how: arguments of the generator."""
    _, generator = _open(lm, kernels, announce, more, how)
    assert generator is not None
    return generator


def _open(
    lm: LanguageModel,
    kernels: Kernels,
    announce: Callable[[str], None],
    more: dict[str, Any],
    how: dict[str, Any] | None,
) -> tuple[Runner | Library, AnyGenerator | None]:
    if lm.ranks is not None:
        return _open_split(lm, kernels, more, how)
    if not kernels.library:
        runner = None
        try:
            runner = Runner(lm, kernels=kernels, **more)
            return runner, None if how is None else _prepared(Generator(runner, **how))
        except BaseException as error:
            if runner is not None:
                runner.close()
            if not isinstance(error, UnsupportedModel):
                raise
            if kernels.name != "auto" or kernels.precision != "full":
                raise UnsupportedModel(f"{error} here; --kernels library runs it, slower") from error
            announce(
                f"{str(error).removesuffix(_NOT_SUPPORTED)}: it runs by transformers' own generation (--kernels "
                "library), slower: prompts share nothing, and a batch ends with its longest reply"
            )
    attention = check_library(lm)
    library = Library(lm, kernels=kernels, **more)
    try:
        library.attend(attention)
        return library, None if how is None else _prepared(LibraryGenerator(library, **how))
    except BaseException:
        library.close()
        raise


def _open_split(
    lm: LanguageModel, kernels: Kernels, more: dict[str, Any], how: dict[str, Any] | None
) -> tuple[Runner, Generator | None]:
    """The same on every rank of a group. Only rank 0 has the tap."""
    if kernels.library:
        raise RequestError(
            "--kernels library is not offered with --tensor-parallel: leave one of the two out"
        )
    ranks: Ranks = lm.ranks
    there = {"tap": Elsewhere(more["tap"].layers)} if "tap" in more else {}
    runner = ranks.make(Runner, lm, kernels=kernels, there=there, **more)
    try:
        if how is None:
            return runner, None
        generator = ranks.make(Generator, runner, **how)
        ranks.together(Generator.prepare, generator)
    except BaseException:
        runner.close()
        raise
    return runner, generator


def _prepared(generator: Any) -> Any:
    generator.prepare()
    return generator
