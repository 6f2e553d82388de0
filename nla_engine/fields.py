"""Fields that the options of several commands have: each is written once, as a function that makes it."""

from __future__ import annotations

import math
from typing import Any

from nla_engine.options import AT_LEAST_1, Must, named_values, one_of, option

#: Ways for a vector to enter an AV that can be named.
INJECTIONS = ("replace",)
#: Injection scales in words: raw and none leave a vector as it is, sqrt_d_model is the square root of the width.
SCALES = ("raw", "none", "sqrt_d_model")


def temperature() -> Any:
    """Of the sampling."""
    return option(
        "0: greedy. Above 0: sample from the softmax at this temperature.",
        0.0,
        must=Must(lambda value: math.isfinite(value) and value >= 0, "0 or more"),
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


def resume(what: str) -> Any:
    """Go on with an interrupted run."""
    return option(f"Resume an interrupted {what}.", False, excludes="overwrite")


def trust_remote_code() -> Any:
    """Whether a repository's own code may run."""
    return option("Run Python code from the model's repository.", False)


def store() -> Any:
    """Of stage 2: the store to read."""
    return option("The store that capture wrote: a directory, or s3://bucket/run.zarr.", argument=True)


def av() -> Any:
    """The verbalizer."""
    return option("Verbalizer (AV): a local directory or a Hub id (owner/name, or owner/name/folder).")


def ar() -> Any:
    """The reconstructor."""
    return option("Reconstructor (AR): a local directory or a Hub id.")


def table() -> Any:
    """The result of stage 2."""
    return option("The Parquet file to write.")


def layer(model: str) -> Any:
    """Of stage 2: the layer to read."""
    return option(f"Layer of the store to read. [default: the one the {model} was trained on]", None)


def where() -> Any:
    """Of stage 2: the rows to read."""
    return option("Rows to explain, as an expression: \"generated and token matches '[0-9]'\".", None)


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


def injection_scale() -> Any:
    """The norm of injected vectors."""
    return option(
        "Norm of the injected vectors, in place of the sidecar's: a number, raw (as they are) or sqrt_d_model.",
        None,
        must=Must(is_scale, f"a positive number or one of {', '.join(SCALES)}"),
    )


def injection() -> Any:
    """How vectors enter an AV."""
    return option(
        "How vectors enter the AV where its sidecar does not say: replace (the marker's embedding).",
        None,
        must=one_of(INJECTIONS),
    )


def template_value() -> Any:
    """Values of a template's further holes."""
    return option(
        "Value of a further hole in a sidecar's template, as depth_pct=57. Repeat for several.",
        (),
        typed=list[str],
        parse=named_values,
    )


def is_scale(value: str) -> bool:
    """Whether a text is an injection scale: a positive number, or a word of SCALES."""
    try:
        return value in SCALES or 0 < float(value) < math.inf
    except ValueError:
        return False
