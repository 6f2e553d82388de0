"""Weights of a checkpoint directory: check that they belong to its configuration, and read them onto a device.

Reads safetensors only, and runs remote code only if told to. What does not fit is refused by name: an extra tensor is
as wrong as a missing one.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nla_engine.errors import CheckpointError, EngineError, NLAError, first_line
from nla_engine.models.checkpoint import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_form,
    other_weights,
    read_json,
    weight_paths,
)
from nla_engine.models.cut import is_behind
from nla_engine.models.implementation import attend_by

#: Patterns in the names of tensors that have no place in the model, and what they mean.
_STRAYS = (
    ("lora_", "they belong to an adapter: give merged weights, or the adapter in a directory of its own"),
    (
        r"_scale|\.scales|qweight|qzeros|g_idx|absmax|quant_|SCB",
        "the weights look quantised, of which config.json says nothing: give the unquantised checkpoint",
    ),
)
#: Configurations of models that generate text from text alone: a causal language model's, or one's that sees images.
_CAUSAL = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
#: Makes transformers read one weight after another instead of all at once on threads.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def read_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    headless: bool,
    remote_code: bool,
    cut: Any = None,
) -> tuple[Any, list[str]]:
    """A transformers model (`headless`: without its head) on `device`, and the names of weights that the files lack.

    cut: a configuration of `cut_config`: only its blocks are read
    Only a headless model may lack weights: those after its last block. For any other model this is an error.
    The directory has passed `check_checkpoint`. Raises CheckpointError, which says what is wrong with the weights,
    or EngineError if memory is short.
    """
    kind: Any = transformers.AutoModel if headless else model_kind(directory, remote_code)
    noise = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # one error below takes the place of its load report
    transformers.logging.disable_progress_bar()
    try:
        with _onto(device):
            model, info = kind.from_pretrained(
                directory,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=remote_code,
                output_loading_info=True,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # listed in the loading info, and refused below
                **({} if cut is None else {"config": cut}),
            )
        model.to(device)  # buffers, and whatever the hook did not see
        attend_by(model, "eager")
    except Exception as error:  # the library raises many types for one fault
        raise _explain(directory, device, error) from error
    finally:
        transformers.logging.set_verbosity(noise)
        transformers.logging.enable_progress_bar()
    if cut is not None:
        blocks = int(cut.get_text_config(decoder=True).num_hidden_layers)
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not is_behind(str(key), blocks)}
    _check_names(directory, model, info, headless, remote_code)
    return model, sorted(info["missing_keys"])


def model_kind(directory: Path, remote_code: bool) -> Any:
    """The factory of the whole model: a causal language model, or one that sees images too."""
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    text, images = _CAUSAL
    only_images = type(config) not in text and type(config) in images
    return transformers.AutoModelForImageTextToText if only_images else transformers.AutoModelForCausalLM


def check_checkpoint(directory: Path, *, headless: bool, remote_code: bool) -> None:
    """CheckpointError for faults that show before the weights are read: their form, their files, the model's class."""
    config = check_form(directory, str(directory))
    _check_files(directory, config)
    _check_kind(directory, config, headless, remote_code)


def _check_files(directory: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError unless the files that hold the weights are there, and are safetensors."""
    files = weight_paths(directory, config)
    if not files:
        others = other_weights(os.listdir(directory))
        held = f"its weights are {', '.join(others[:3])}" if others else "it holds no weights"
        raise CheckpointError(
            f"{directory}: {held}; only {WEIGHTS}, or the files of {INDEX}, are read: "
            + ("save the model as safetensors" if others else "fetch it again")
        )
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{directory}: {len(absent)} of its {len(files)} weight files are missing, the first is {absent[0]}: "
            "fetch it again"
        )
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)}): fetch it again") from error


def _check_kind(directory: Path, config: Mapping[str, Any], headless: bool, remote_code: bool) -> None:
    """CheckpointError unless transformers has a class of language model for the configuration."""
    name, version = config.get("model_type"), transformers.__version__
    if "auto_map" in config and (remote_code or name not in transformers.CONFIG_MAPPING):
        if not remote_code:
            raise CheckpointError(
                f"{directory}: brings code of its own, which is not run: read it, then pass --trust-remote-code"
            )
        return
    if name is None:
        raise CheckpointError(f"{directory / CONFIG}: has no model_type, so it is no model's: fetch it again")
    if name not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{directory}: is of type '{name}', which transformers {version} does not know: "
            "upgrade transformers, or check the name in config.json"
        )
    try:
        found = transformers.AutoConfig.from_pretrained(directory)
    except Exception as error:  # the library raises many types for one fault
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / CONFIG}: cannot be used ({reason}): fetch it again") from error
    if not headless and not any(type(found) in known for known in _CAUSAL):
        raise CheckpointError(
            f"{directory}: is of type '{name}', of which transformers {version} has no decoder-only language model: "
            "give the text model's own checkpoint"
        )


@contextmanager
def _onto(device: torch.device) -> Iterator[None]:
    """While this is open, each weight goes to `device` as soon as a model registers it.

    So host memory holds only one weight at a time besides the files' pages, even if transformers converts weights.
    Its own `device_map` needs another package.
    """
    if device.type == "cpu":
        yield
        return
    thread, given = threading.get_ident(), os.environ.get(_ONE_BY_ONE)

    def land(_module: nn.Module, _name: str, weight: nn.Parameter | None) -> None:
        if weight is not None and not weight.is_meta and threading.get_ident() == thread:
            weight.data = weight.data.to(device)  # in place: the library has marked this object as loaded

    hook = register_module_parameter_registration_hook(land)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        hook.remove()
        if given is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = given


def _check_names(
    directory: Path, model: Any, info: Mapping[str, Any], headless: bool, remote_code: bool
) -> None:
    """CheckpointError unless the tensors of the files are those of the model, each with the right shape.

    transformers has already dropped what it knows to be harmless: buffers that it makes itself, and parts that a class
    leaves out on purpose. The files of a headless model may also hold the head, and those of a language model what a
    model around it sees images with.
    """
    where = type(model).__name__
    unexpected = {str(key) for key in info["unexpected_keys"]}
    if unexpected:
        without = _without_head if headless else _without_sight
        unexpected = without(directory, model, unexpected, remote_code)
    if unexpected:
        first = sorted(unexpected)[0]
        why = "config.json is not that of these weights: fetch both again"
        why = next((text for part, text in _STRAYS if any(re.search(part, key) for key in unexpected)), why)
        raise CheckpointError(
            f"{directory}: {len(unexpected)} tensors have no place in {where}, the first is {first}: {why}"
        )
    if info["mismatched_keys"]:
        key, given, wanted = sorted(info["mismatched_keys"], key=str)[0]
        raise CheckpointError(
            f"{directory}: {len(info['mismatched_keys'])} weights have the wrong shape, the first is {key} "
            f"({list(given)}, not {list(wanted)}): config.json is not that of these weights: fetch both again"
        )
    missing = sorted(info["missing_keys"])
    if missing and not headless:
        raise CheckpointError(
            f"{directory}: {len(missing)} weights are missing, the first is {missing[0]}: fetch it again"
        )


def _without_head(directory: Path, model: Any, names: set[str], remote_code: bool) -> set[str]:
    """The names without those of the head that the full causal language model has.

    A head whose name in the files is not that of the class is recognised by its shape.
    """
    own_code = "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})
    if type(model.config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        return names
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=remote_code)
    head: Any = whole.get_output_embeddings()
    shapes = {tuple(tensor.shape) for tensor in head.parameters()} if head is not None else set()
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_paths(directory, read_json(directory / CONFIG)):
        with safe_open(path, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in names & set(file.keys())}
    unknown = names - set(whole.state_dict())
    return {name for name in unknown if "layers" in name or found.get(name, ()) not in shapes}


def _without_sight(directory: Path, model: Any, names: set[str], remote_code: bool) -> set[str]:
    """The names without those of the model that sees images, of which `model` is the language model (Llama-4)."""
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    _, images = _CAUSAL
    if type(config) not in images or type(config) is type(model.config):
        return names
    with torch.device("meta"):
        whole = transformers.AutoModelForImageTextToText.from_config(config)
    return names - set(whole.state_dict())


def _explain(directory: Path, device: torch.device, error: Exception) -> NLAError:
    """The library's error in terms of the directory that was given."""
    line = first_line(error)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return EngineError(
            f"{directory}: the model does not fit the free memory of {device}: free some, or take a smaller model"
        )
    if isinstance(error, ImportError):
        return CheckpointError(f"{directory}: needs a package that is missing ({line}): install it")
    return CheckpointError(f"{directory}: the model cannot be loaded ({type(error).__name__}: {line})")
