"""One optimiser step after another: AdamW, a rate that warms up and then falls to zero, gradients of bounded length.

Knows parameters and losses, no models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

_BETAS = (0.9, 0.98)
_DECAY = 0.05
_LONGEST_GRADIENT = 1.0
_WARMUP_PART = 20
_LONGEST_WARMUP = 300  # steps, in `fit`


def warmup_of(steps: int, most: int) -> int:
    """Steps over which the rate rises: a part of all steps, at most so many."""
    return max(1, min(most, steps // _WARMUP_PART))


class Fitter:
    """AdamW over named parameters. Its state is tensors alone, so that it can be kept and taken up again exactly.

    peak: the highest rate; decay: weight decay of matrices
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], peak: float, decay: float = _DECAY) -> None:
        self.names, self.peak = list(parameters), peak
        self.parameters = list(parameters.values())
        wide = [p for p in self.parameters if p.ndim >= 2]
        flat = [p for p in self.parameters if p.ndim < 2]
        self._order = [name for name, p in parameters.items() if p.ndim >= 2]
        self._order += [name for name, p in parameters.items() if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": wide, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}],
            lr=peak,
            betas=_BETAS,
            fused=self.parameters[0].is_cuda,
        )

    def step(self, step: int, warmup: int, spent: float) -> float:
        """Apply the gradients, then clear them. Returns the rate. spent: part of the phase that is over, 0 to 1."""
        rate = self.peak * min(1.0, (step + 1) / warmup) * (1 - spent)
        for group in self._adam.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.parameters, _LONGEST_GRADIENT, foreach=True)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return rate

    def state(self) -> dict[str, torch.Tensor]:
        """The moments and step counts, by parameter and kind."""
        held = self._adam.state_dict()["state"]
        return {
            f"{self._order[number]}:{kind}": torch.as_tensor(value)
            for number, kinds in held.items()
            for kind, value in kinds.items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state` gave."""
        told = self._adam.state_dict()
        number = {name: place for place, name in enumerate(self._order)}
        told["state"] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition(":")
            told["state"].setdefault(number[name], {})[kind] = value
        self._adam.load_state_dict(told)


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    steps: int,
    seconds: float,
    peak_rate: float,
    device: torch.device,
) -> dict[str, float]:
    """A whole phase in one call, ended by `steps` or by `seconds`, whichever comes first.

    The rate follows the larger of the two fractions spent, so it has always decayed to zero at the end. It rises over a
    part of the steps that can be expected by then, so seconds that end early do not end it before its peak.
    Returns steps done, seconds used and the mean loss of the last tenth logged.
    """
    fitter = Fitter({str(number): p for number, p in enumerate(parameters)}, peak_rate)
    start, step, losses = time.perf_counter(), 0, []
    first_step_end = start  # the first step compiles: its time is not counted
    while step < steps:
        spent = max(step / steps, (time.perf_counter() - first_step_end) / seconds)
        if spent >= 1:
            break
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of_step()
        loss.backward()
        expected = min(steps, round(step / spent)) if spent else steps
        rate = fitter.step(step, warmup_of(expected, _LONGEST_WARMUP), spent)
        step += 1
        if step == 1:
            loss.item()
            first_step_end = time.perf_counter()
        if step % 250 == 0 or step == steps:
            losses.append(loss.item())  # the only synchronisation of the loop
            per_step = (time.perf_counter() - first_step_end) / max(step - 1, 1) * 1e3
            print(
                f"{name} step {step} loss {losses[-1]:.4f} rate {rate:.1e} {per_step:.1f} ms/step", flush=True
            )
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": step,
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(sum(tail) / max(len(tail), 1), 4),
    }
