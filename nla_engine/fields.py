"""Fields that the options of several commands have: each is written once, as a function that makes it."""

from __future__ import annotations

import math
import re
from typing import Any

from nla_engine.errors import RequestError
from nla_engine.options import (
    AT_LEAST_1,
    Must,
    check_ending,
    check_local,
    flag,
    one_of,
    option,
)
from nla_engine.sites import PARTS, RESID_POST

#: auto: fused blocks and Triton on a GPU, else reference. fused: fused blocks anywhere. reference: the library's own
#: modules and torch attention, one synchronisation per step. library: its generation and caches too, without slots;
#: auto takes it where the engine cannot run an architecture.
KERNELS = ("auto", "fused", "reference", "library")
#: Matrix products of AV and AR: in the dtype of the weights, or quantised row by row to e4m3.
PRECISIONS = ("full", "fp8")


def temperature() -> Any:
    """Of the sampling."""
    return option(
        "0: greedy. Above 0: sample from the softmax at this temperature.",
        0.0,
        must=Must(lambda value: math.isfinite(value) and value >= 0, "0 or more"),
    )


def top_p() -> Any:
    """Of the sampling."""
    return option(
        "With a temperature: sample from the most likely tokens that together reach this probability.",
        None,
        must=Must(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    )


def top_k() -> Any:
    """Of the sampling."""
    return option("With a temperature: sample from this many most likely tokens.", None, must=AT_LEAST_1)


def min_p() -> Any:
    """Of the sampling."""
    return option(
        "With a temperature: sample from tokens of at least this probability relative to the most likely one.",
        None,
        must=Must(lambda value: 0 <= value <= 1, "0 to 1"),
    )


def seed(help: str) -> Any:
    """Of all that is random."""
    return option(help, 0, must=Must(lambda value: 0 <= value < 1 << 63, "0 to 2^63 - 1"))


def variance(help: str) -> Any:
    """Var, which scales FVE."""
    return option(help, None, must=Must(lambda value: 0 < value <= 1, "above 0 and at most 1"))


def batch_size(help: str) -> Any:
    """Sequences at once."""
    return option(f"{help} [default: as many as fit in free memory]", None, must=AT_LEAST_1)


def dtype() -> Any:
    """Of the model's weights."""
    return option("bfloat16 or float32. [default: bfloat16 on a GPU that supports it, else float32]", None)


def device() -> Any:
    """Where the models run."""
    return option("cuda, cuda:N or cpu. [default: cuda if available]", None)


def tensor_parallel(models: str) -> Any:
    """Over how many GPUs the weights of one model are split."""
    return option(
        f"GPUs over which the weights of {models} are split, for a model that one GPU does not hold; from --device on. "
        "With --gpus, those of each worker. On a CPU, processes.",
        1,
        must=AT_LEAST_1,
    )


def gpus() -> Any:
    """Several GPUs, with a process each."""
    return option(
        "Run on several GPUs of this machine, a process each: all, how many, or their numbers as 0,2 "
        "(docs/several_gpus.md).",
        None,
        must=Must(is_gpus, "all, a number from 1 on, or numbers joined by commas, as 0,2"),
    )


def workers() -> Any:
    """Several processes on a CPU."""
    return option(
        "On a CPU: so many processes, which share its cores; at most one for each core.", 1, must=AT_LEAST_1
    )


def kernels() -> Any:
    """The implementation of the blocks."""
    return option(
        "auto: fused blocks on a GPU, reference on a CPU, library where the engine cannot run the architecture. "
        "fused: fused blocks on a CPU too. reference: the library's modules and torch attention. library: "
        "transformers' own generation, slower (docs/models.md).",
        "auto",
        must=one_of(KERNELS),
    )


def precision(models: str) -> Any:
    """Of their matrix products."""
    return option(
        f"Matrix products of {models}: full (in --dtype), or fp8 (faster, nearly the same scores: docs/roundtrip.md).",
        "full",
        must=one_of(PRECISIONS),
    )


def resume(what: str) -> Any:
    """Go on with an interrupted run."""
    return option(f"Resume an interrupted {what}.", False, excludes="overwrite")


def trust_remote_code() -> Any:
    """Whether a repository's own code may run."""
    return option("Run Python code from the model's repository.", False)


def store() -> Any:
    """Of stage 2: the store to read."""
    return option("The store that capture wrote: a directory, or s3://bucket/run.zarr.", argument=True)


def table() -> Any:
    """The result of stage 2."""
    return option("The Parquet file to write; its name ends in .parquet.")


def layer(model: str) -> Any:
    """Of stage 2: the layer to read."""
    return option(f"Layer of the store to read. [default: the one the {model} was trained on]", None)


def site(default: str | None = RESID_POST) -> Any:
    """What is read of the layer. Stage 2 reads anything but the output of a block only if that is asked for."""
    said = "" if default else " [default: resid_post, else the store's only one]"
    return option(
        f"Site of the layer to read: {', '.join(PARTS)}.{said}",
        default,
        must=one_of(tuple(PARTS)),
    )


def where(do: str = "explain") -> Any:
    """Of stage 2: the rows to read."""
    return option(f"Rows to {do}, as an expression: \"generated and token matches '[0-9]'\".", None)


def limit() -> Any:
    """Of stage 2: how many of them."""
    return option("At most this many rows, evenly spread over the selected ones.", None, must=AT_LEAST_1)


def samples(help: str) -> Any:
    """Texts of one row."""
    return option(f"{help} More than 1 needs a temperature.", 1, must=AT_LEAST_1)


def explanation_tokens() -> Any:
    """The length limit of a text."""
    return option("Longest explanation, in tokens.", 200, must=AT_LEAST_1)


def store_variance() -> Any:
    """Var, measured on the store unless given."""
    return variance(
        "Var of fve_nrm, such as a published training value. [default: measured on the store's rows]"
    )


def follow() -> Any:
    """Whether the store is still being written."""
    return option(
        "Follow a store that is still being written, or not there yet, until its writer has finished.", False
    )


def replace() -> Any:
    """Whether a result may be replaced."""
    return option("Replace a result that exists.", False)


def base(what: str) -> Any:
    """The base of an adapter."""
    return option(
        f"Base model of {what}, if that is an adapter: a local directory or a Hub id. "
        "[default: the one that the adapter names]",
        None,
    )


def dry_run(excludes: str | None = None) -> Any:
    """Check and measure only."""
    return option(
        "Write nothing. Load and check everything; print the rows, the first prompt, and the time and size to expect, "
        "measured on a few rows for at most 20 seconds (loading not counted).",
        False,
        excludes=excludes,
    )


def is_gpus(value: str) -> bool:
    """Whether a text names GPUs: all, how many, or their numbers."""
    return value == "all" or re.fullmatch(r"[1-9][0-9]{0,3}|[0-9]{1,4}(,[0-9]{1,4})+", value) is not None


def check_table(options: Any) -> None:
    """RequestError unless the table of any command of stage 2 can be written, in the precision that is asked for."""
    check_local(options.out)
    check_ending(options.out, "the table is Parquet", ".parquet")
    if options.precision == "fp8" and options.kernels in ("reference", "library"):
        raise RequestError(f"--precision fp8 has no {options.kernels} kernels: leave one of the two out")


def check_samples(options: Any) -> None:
    """RequestError if several texts of one row would be the same."""
    if options.samples > 1 and options.temperature == 0:
        raise RequestError(
            "--samples above 1 would write one greedy text several times: give a --temperature"
        )


def check_cuts(options: Any) -> None:
    """RequestError if options cut the softmax that nothing is sampled from. Of any command that samples."""
    cuts = [name for name in ("top_p", "top_k", "min_p") if getattr(options, name) is not None]
    if cuts and options.temperature == 0:
        raise RequestError(
            f"{' and '.join(map(flag, cuts))}: decoding is greedy without a --temperature: give one, or leave "
            f"{'it' if len(cuts) == 1 else 'them'} out"
        )


def check_split(options: Any) -> None:
    """RequestError for what --tensor-parallel does not offer."""
    if options.tensor_parallel == 1:
        return
    given = {"--kernels library": options.kernels == "library"}
    given["--precision fp8"] = getattr(options, "precision", "full") == "fp8"
    given["--residency turns"] = getattr(options, "residency", "auto") == "turns"
    if refused := [name for name, asked in given.items() if asked]:
        raise RequestError(f"{refused[0]} is not offered with --tensor-parallel: leave one of the two out")
