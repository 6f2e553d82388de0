"""A long round trip of the 7B shape: its rate and memory over time, as a CSV and a picture.

    python benchmarks/sustained_roundtrip.py --vectors 50000 --out benchmarks/results/sustained

Random weights and rows, both models on one GPU. The explanations mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import resource
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from nla_engine.bench.shapes import find_shape, random_model
from nla_engine.bench.suites.reconstruct import reconstructor_of
from nla_engine.bench.suites.verbalize import verbalizer_of
from nla_engine.bench.workload import encoded_sequences, write_store
from nla_engine.codec.rows import Codec
from nla_engine.config import RoundtripOptions
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.run import run_roundtrip


def main() -> None:
    """Run, and write roundtrip.csv and roundtrip.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=50_000)
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--precision", default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sustained"))
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = find_shape(given.shape).layer
    lm = random_model(given.shape, device, dtype)
    samples: list[tuple[float, int, float, float]] = []

    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "run.zarr"
        codec = Codec.named("int8", lm.d_model)
        write_store(store, codec, layer, encoded_sequences(codec, layer, given.vectors))
        options = RoundtripOptions(
            store=str(store),
            av="bench-av",
            ar="bench-ar",
            out=Path(directory) / "explained.parquet",
            limit=given.vectors,
            max_new_tokens=given.new_tokens,
            device=given.device,
            precision=given.precision,
        )
        started = time.perf_counter()

        def progress(done: int, _total: int) -> None:
            used = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            samples.append((time.perf_counter() - started, done, (used[1] - used[0]) / 2**30, host))

        summary = run_roundtrip(
            options,
            verbalizer=verbalizer_of(lm, layer, given.precision),
            reconstructor=reconstructor_of(lm, layer, given.precision),
            progress=progress,
        )
    assert summary.explanations == given.vectors
    given.out.mkdir(parents=True, exist_ok=True)
    about = describe_run()
    with open(given.out / "roundtrip.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["seconds", "explained", "gpu_gib", "host_peak_gib"])
        table.writerows([round(value, 3) for value in sample] for sample in samples)
    _draw(samples, given.out / "roundtrip.png")
    rate = summary.explanations / summary.seconds
    print(f"{summary.explanations:,} vectors in {summary.seconds:.1f} s: {rate:.1f} vectors/s; {about}")


def _draw(samples: list[tuple[float, int, float, float]], path: Path) -> None:
    """Rate over windows of ten commits, and memory."""
    seconds = [sample[0] for sample in samples]
    step = 10
    rate = [
        (samples[i][1] - samples[i - step][1]) / (seconds[i] - seconds[i - step])
        for i in range(step, len(samples))
    ]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(3, 2))
    above.plot(seconds[step:], rate, color="#0b5d7a")
    above.set_ylim(0, None)
    above.set_ylabel("vectors per second")
    below.plot(seconds, [sample[2] for sample in samples], color="#0b5d7a", label="GPU, in use")
    below.plot(seconds, [sample[3] for sample in samples], color="#c46a1b", label="host, largest so far")
    below.set_ylim(0, None)
    below.set_ylabel("GiB")
    below.set_xlabel("seconds")
    below.legend(frameon=False, loc="center right")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
