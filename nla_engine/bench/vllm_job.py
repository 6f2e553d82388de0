"""Runs under another interpreter, one that has vLLM: one generation job, done by vLLM, which captures nothing.

    PYTHON vllm_job.py JOB.json SECONDS.json

JOB: model, load_format, dtype, slots, max_model_len, prefix_caching (as vLLM takes them), repeats; and requests of
`prompt` random token ids below `vocabulary`, the first `shared` of them alike, each to be continued by its number of
tokens in the list `new`.
Needs nothing of this package.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
#: Most new tokens of a request of the warm-up.
WARM_UP_TOKENS = 64


def prompts(job: dict[str, Any], seed: int) -> list[dict[str, list[int]]]:
    """The token ids of every request. Another seed gives others, except for the shared first ones."""
    draw, ids = random.Random(seed).choices, range(job["vocabulary"])
    start = random.Random(0).choices(ids, k=job["shared"])
    own = job["prompt"] - job["shared"]
    return [{"prompt_token_ids": start + draw(ids, k=own)} for _ in job["new"]]


def main(job_file: str, seconds_file: str) -> None:
    """Write the seconds of each repeat, after a warm-up with other prompts and short replies. Exits if vLLM did
    different work."""
    import vllm

    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    engine = vllm.LLM(
        model=job["model"],
        load_format=job["load_format"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_num_seqs=job["slots"],
        max_model_len=job["max_model_len"],
        enable_prefix_caching=job["prefix_caching"],
        seed=0,
    )
    seconds = []
    for repeat in range(job["repeats"] + 1):
        work = prompts(job, repeat + 1)
        wanted = job["new"] if repeat else [min(new, WARM_UP_TOKENS) for new in job["new"]]
        sampling = [
            vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
            for new in wanted
        ]
        start = time.perf_counter()
        done = engine.generate(work, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        lengths = [len(request.outputs[0].token_ids) for request in done]
        if lengths != wanted:
            sys.exit(f"vLLM gave {sum(lengths)} tokens to {len(lengths)} requests, not what was asked for")
    with open(seconds_file, "w", encoding="utf-8") as file:
        json.dump(seconds[1:], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
