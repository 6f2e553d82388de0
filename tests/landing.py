"""Load checkpoints as if onto a GPU, with undeclared packages hidden: `python landing.py DIRECTORY...`.

This machine's memory stands in for the GPU's: each weight is copied there once. Prints each model's
fingerprint; fails unless every weight has arrived.
"""

import sys
from typing import Any

for name in ("accelerate", "peft", "bitsandbytes"):
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402

from nla_engine.models.load import load_model  # noqa: E402


class Device:
    """A device whose type is not the CPU's."""

    type = "cuda"


there: dict[int, torch.Tensor] = {}
to, all_to = torch.Tensor.to, torch.nn.Module.to


def weight_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not (args and isinstance(args[0], Device)):
        return to(self, *args, **kwargs)
    if self.data_ptr() not in there:
        self = self.clone()
        there[self.data_ptr()] = self
    return self


torch.Tensor.to = weight_to  # type: ignore[method-assign]
torch.nn.Module.to = lambda self, *args: self if isinstance(args[0], Device) else all_to(self, *args)  # type: ignore[method-assign]
for directory in sys.argv[1:]:
    there.clear()
    lm = load_model(directory, device=Device(), dtype=torch.float32)  # type: ignore[arg-type]
    assert set(there) == {weight.data_ptr() for weight in lm.model.parameters()}
    print(lm.fingerprint())
