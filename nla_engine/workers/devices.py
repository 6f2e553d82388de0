"""Which devices the workers of a run have, from what was asked for."""

from __future__ import annotations

import os

import torch

from nla_engine.errors import RequestError

ALL = "all"
#: Joins the devices of a worker that splits its model over several.
AND = "+"


def worker_devices(
    gpus: str | None, workers: int, device: str | None, *, loaded: bool = False
) -> tuple[str, ...]:
    """The device of each worker, such as ("cuda:0", "cuda:2") or ("cpu", "cpu"). One: this process runs there, and
    there are no workers; empty: the same, and `device` says where.

    gpus: as `fields.is_gpus` takes it; None: none asked for. workers: processes on the CPU; device: as --device has it
    loaded: whether a model is loaded already
    RequestError if they do not exist, or the options contradict each other.
    """
    devices = _devices(gpus, workers, device)
    if devices and loaded:
        raise RequestError(
            "--gpus and --workers: each process loads its models itself: give their directories or Hub ids"
        )
    return devices


def _devices(gpus: str | None, workers: int, device: str | None) -> tuple[str, ...]:
    if gpus is None:
        on_gpu = device != "cpu" and (device is not None or torch.cuda.is_available())
        if workers > 1 and on_gpu:
            raise RequestError("--workers is for a CPU: give --gpus for several GPUs, or --device cpu")
        if workers > cores():
            raise RequestError(
                f"--workers is {workers}: this process may use {cores()} CPU cores, and each worker holds the models: "
                "lower it"
            )
        return ("cpu",) * workers if workers > 1 else ()
    if workers > 1:
        raise RequestError("--gpus and --workers exclude each other: leave one of them out")
    if device is not None:
        raise RequestError(f"--gpus and --device {device} exclude each other: leave one of them out")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise RequestError(f"--gpus is {gpus}: torch finds no CUDA GPU: leave it out, or give --workers")
    numbers = _numbers(gpus, there)
    if more := [number for number in numbers if number >= there]:
        raise RequestError(
            f"--gpus is {gpus}: there is no GPU {more[0]}: torch finds {there}, counted from 0"
        )
    if len(set(numbers)) < len(numbers):
        raise RequestError(f"--gpus is {gpus}: a GPU is named twice: name each once")
    return tuple(f"cuda:{number}" for number in numbers)


def grouped(devices: tuple[str, ...], size: int) -> tuple[str, ...]:
    """What workers have that split their model over `size` GPUs each, such as ("cuda:0+cuda:1", "cuda:2+cuda:3").

    devices: from `worker_devices`. On a CPU each worker has as many processes. RequestError if some GPUs are left over
    """
    if size == 1 or not devices:
        return devices
    if devices[0] == "cpu":
        return (AND.join(["cpu"] * size),) * len(devices)
    if len(devices) % size:
        raise RequestError(
            f"--gpus gives {len(devices)} GPUs, and --tensor-parallel {size} does not divide them: change one of them"
        )
    return tuple(AND.join(devices[first : first + size]) for first in range(0, len(devices), size))


def with_work(workers: int, items: int) -> int:
    """How many of so many workers have work if there are so many items: at least one stays."""
    return max(min(workers, items), 1)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbers(gpus: str, there: int) -> list[int]:
    if gpus == ALL:
        return list(range(there))
    if "," in gpus:
        return [int(word) for word in gpus.split(",")]
    count = int(gpus)
    if count > there:
        raise RequestError(f"--gpus is {gpus}: torch finds {there}: lower it, or give all")
    return list(range(count))
