"""On a machine without Triton the package runs on the CPU: a torch for CPUs does not bring it along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
import nla_engine.roundtrip.run, nla_engine.bench.__main__
from nla_engine.demo.run import TRIO
from nla_engine.ops.triton_module import MISSING, triton
from pathlib import Path
assert MISSING.startswith("Triton is not installed"), MISSING
assert [triton.next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128] and triton.cdiv(9, 4) == 3
torch.set_num_threads(1)
for kernels in ("auto", "fused"):
    options = CaptureOptions(
        model=str(TRIO / "base"), prompts=Path("prompts.txt"), layer=(5,), out=f"{kernels}.zarr", kernels=kernels,
        max_new_tokens=4,
    )
    print(run_capture(options).rows)
"""


def test_both_forms_of_a_block_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("What is 12 times 34?\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "4"]
