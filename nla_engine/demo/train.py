"""The recipe of the demo trio: `python -m nla_engine.demo.train --out DIR [--device cuda]`.

Trains the base model, collects its layer-K activations, trains the verbalizer (AV) and the reconstructor (AR)
on them, saves all three in the NLA checkpoint layout and ends with an evaluation from disk, printed as JSON.
Holds the order of steps and the sizes; the loop, the data and the evaluation are in their own files.

About 8 minutes on one H200. `--steps-scale 0.01` runs everything at a small scale, on a CPU too, and learns nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nla_engine.demo.blocks import compile_blocks, run_blocks
from nla_engine.demo.checkpoint_layout import INJECTION_SCALE, LAYER, av_prompt_ids, save_checkpoint
from nla_engine.demo.evaluate import evaluate_trio, load_model
from nla_engine.demo.problems import OTHER_KEYS, TIMES_KEYS, all_problems, sample_problems
from nla_engine.demo.rows import base_conversations, build_rows, join_rows, sample_texts
from nla_engine.demo.tokenizer import build_tokenizer
from nla_engine.train.fit import fit

STEPS = {"base": 5400, "av": 5700, "ar": 3800}
TIME_SHARES = {"base": 0.37, "av": 0.41, "ar": 0.22}  # of --time-limit
PEAK_RATES = {"base": 1.5e-3, "av": 1.0e-3, "ar": 1.0e-3}
#: Where a step puts another row's vector, in tokens from the marker; 0: nowhere.
DECOY_OFFSETS = (0, -3, -2, -1, 1, 2, 3)
PROMPT_SHARE = 0.25  # of prompt positions that become training rows; every reply position does
USER_TOKEN_WEIGHT = 0.1  # the base model's loss on tokens that it never generates
WINDOWS = (8, 24)  # tokens


def new_base(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A fresh Qwen2 of 8 blocks, width 256, about 4.9 M parameters, tied embeddings."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def window_mask(size: int, length: int, device: torch.device) -> torch.Tensor:
    """bool [size, 1, length, length]: causal, and for half of the rows limited to a random window of tokens.

    With a short window a late token reaches the operands only through tokens in between. Those learn to carry
    the operands along, as the tokens of a deep language model do; inference is ordinary full attention.
    """
    low, high = WINDOWS
    window = torch.randint(low, high + 1, (size, 1, 1), device=device)
    window = torch.where(torch.rand(size, 1, 1, device=device) < 0.5, window, length)
    index = torch.arange(length, device=device)
    distance = (index[:, None] - index[None, :])[None]
    return ((distance >= 0) & (distance < window)).unsqueeze(1)


def train_base(
    model: Any, ids: np.ndarray, replies: np.ndarray, batch: int, steps: int, seconds: float
) -> dict[str, float]:
    """Next-token training on conversations ids int16 [S, L]; replies bool [S, L] weighs the targets."""
    device = model.device
    table = torch.from_numpy(ids).to(device)
    reply_table = torch.from_numpy(replies).to(device)
    pad_id = model.config.pad_token_id

    def loss_of_step() -> torch.Tensor:
        pick = torch.randint(len(table), (batch,), device=device)
        tokens = table[pick].long()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        weights = reply_table[pick][:, 1:].float() * (1 - USER_TOKEN_WEIGHT) + USER_TOKEN_WEIGHT
        weights = weights * (targets != pad_id)
        mask = window_mask(batch, inputs.shape[1], device)
        embeddings = model.model.embed_tokens(inputs)
        hidden = run_blocks(model.model, embeddings, len(model.model.layers), mask)
        logits = model.lm_head(model.model.norm(hidden))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    model.train()
    return fit("base", model.parameters(), loss_of_step, steps, seconds, PEAK_RATES["base"], device)


def round_to_bfloat16(model: torch.nn.Module) -> None:
    """Round float32 parameters to bfloat16 values in place, so that AV and AR are trained on the model that ships."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())


@torch.no_grad()
def collect_activations(model: Any, rows: dict[str, np.ndarray], batch: int) -> torch.Tensor:
    """Layer-K output of every row as unit vectors, float16 [N, d]; the forward pass is float32."""
    device = model.device
    table = torch.from_numpy(rows["sequences"]).to(device)
    owner = torch.from_numpy(rows["row_sequence"]).to(device)
    position = torch.from_numpy(rows["row_position"]).to(device).long()
    out = torch.empty(len(owner), model.config.hidden_size, dtype=torch.float16, device=device)
    # Rows are ordered by sequence: those of a batch of sequences are one slice.
    edges = np.searchsorted(rows["row_sequence"], np.arange(0, len(table) + batch, batch))
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        first = index * batch
        embeddings = model.model.embed_tokens(table[first : first + batch].long())
        hidden = run_blocks(model.model, embeddings, LAYER + 1)
        chosen = hidden[owner[low:high].long() - first, position[low:high]]
        out[low:high] = F.normalize(chosen, dim=-1).half()
    return out


def train_av(
    model: Any,
    vectors: torch.Tensor,
    explanations: np.ndarray,
    prompt: tuple[list[int], int],
    batch: int,
    steps: int,
    seconds: float,
) -> dict[str, float]:
    """Teach explanations int16 [N, E] (padded) given unit vectors [N, d] at the marker of the prompt.

    Most steps put another row's vector a few tokens beside the marker, so that the AV learns to read only
    the marker's place: a vector that lands one token off must not be explained.
    """
    device, pad_id = model.device, model.config.pad_token_id
    table = torch.from_numpy(explanations).to(device)
    prompt_ids, marker = prompt
    prefix = torch.tensor(prompt_ids, device=device).expand(batch, -1)

    def loss_of_step() -> torch.Tensor:
        pick = torch.randint(len(table), (batch,), device=device)
        targets = table[pick].long()
        embeddings = model.model.embed_tokens(torch.cat([prefix, targets[:, :-1]], dim=1))
        vector = vectors[pick].float() * INJECTION_SCALE
        embeddings = torch.cat([embeddings[:, :marker], vector[:, None], embeddings[:, marker + 1 :]], dim=1)
        place = marker + DECOY_OFFSETS[int(torch.randint(len(DECOY_OFFSETS), ()))]
        if place != marker:
            other = vectors[torch.randint(len(table), (batch,), device=device)].float() * INJECTION_SCALE
            embeddings = torch.cat([embeddings[:, :place], other[:, None], embeddings[:, place + 1 :]], dim=1)
        hidden = run_blocks(model.model, embeddings, len(model.model.layers))
        logits = model.lm_head(model.model.norm(hidden[:, len(prompt_ids) - 1 :]))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=pad_id)

    model.train()
    return fit("av", model.parameters(), loss_of_step, steps, seconds, PEAK_RATES["av"], device)


def train_ar(
    model: Any,
    head: torch.nn.Linear,
    vectors: torch.Tensor,
    rows: dict[str, np.ndarray],
    batch: int,
    steps: int,
    seconds: float,
) -> dict[str, float]:
    """Teach mse_nrm = 2 (1 - cos) between the head at the last prompt token and the unit vectors [N, d]."""
    device = model.device
    table = torch.from_numpy(rows["ar_prompts"]).to(device)
    last = torch.from_numpy(rows["ar_last"]).to(device).long()

    def loss_of_step() -> torch.Tensor:
        pick = torch.randint(len(table), (batch,), device=device)
        hidden = run_blocks(model.model, model.model.embed_tokens(table[pick].long()), LAYER + 1)
        read = hidden[torch.arange(batch, device=device), last[pick]]
        cosine = F.cosine_similarity(head(read).float(), vectors[pick].float(), dim=-1)
        return 2 * (1 - cosine).mean()

    model.train()
    # The final norm and the embedding's lm_head play no part and get no gradient.
    parameters = [p for name, p in model.named_parameters() if name != "model.norm.weight"]
    return fit(
        "ar", [*parameters, *head.parameters()], loss_of_step, steps, seconds, PEAK_RATES["ar"], device
    )


def copy_of(base: Any, blocks: int) -> Any:
    """A trainable float32 copy of the base model with its first `blocks` blocks."""
    settings = base.config.to_dict() | {"num_hidden_layers": blocks}
    settings["layer_types"] = settings["layer_types"][:blocks]
    model: Any = Qwen2ForCausalLM(Qwen2Config.from_dict(settings))
    model.to(base.device)
    weights = {name: value for name, value in base.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(weights)
    return model


def _single_threaded() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main(arguments: list[str] | None = None) -> None:
    """Train, save and evaluate a trio; the last line printed is the report, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_engine.demo.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for base/, av/ and ar/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="scales steps and, below 1, the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--time-limit", type=float, default=1e9, help="seconds of training, all three together"
    )
    parser.add_argument("--batch-size", type=int, default=None, help="default 512, on a CPU 16")
    parser.add_argument("--av-from", type=Path, help="continue the AV of this trio; keep its base and AR")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--eval-problems", type=int, default=400)
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    device = torch.device(options.device)
    batch = options.batch_size or (512 if device.type == "cuda" else 16)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    steps = {name: max(2, round(count * options.steps_scale)) for name, count in STEPS.items()}
    seconds = {name: share * options.time_limit for name, share in TIME_SHARES.items()}
    data_share = min(1.0, options.steps_scale)

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {text}", flush=True)

    every = len(all_problems(TIMES_KEYS))
    given = options.av_from
    texts = sample_texts(sample_problems(6000, 1, "trained", TIMES_KEYS + OTHER_KEYS), seed=1)
    tokenizer: Any = (
        build_tokenizer(texts) if given is None else AutoTokenizer.from_pretrained(given / "base")
    )
    backend = tokenizer.backend_tokenizer
    log(f"tokenizer of {len(tokenizer)} tokens")

    trained = sample_problems(round(every * data_share), options.seed, "trained")
    trained += sample_problems(round(every * data_share / 8), options.seed, "trained", OTHER_KEYS)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context, _single_threaded) as pool:
        futures = [
            pool.submit(build_rows, backend.to_str(), trained[w :: options.workers], PROMPT_SHARE, w)
            for w in range(options.workers)
        ]

        report: dict[str, object] = {}
        if given is None:
            problems = all_problems(TIMES_KEYS) * 2 + all_problems(OTHER_KEYS)
            if data_share < 1:
                problems = problems[:: max(1, round(1 / data_share))]
            ids, replies = base_conversations(backend, problems, options.seed)
            log(f"{len(ids)} conversations of up to {ids.shape[1]} tokens for the base model")
            base = new_base(tokenizer).to(device)
            if device.type == "cuda":
                compile_blocks(base.model)
            report["base_fit"] = train_base(base, ids, replies, batch, steps["base"], seconds["base"])
            round_to_bfloat16(base)
            save_checkpoint(
                options.out / "base", copy_of(base, base.config.num_hidden_layers), tokenizer, "base"
            )
        else:
            base = load_model(given / "base", device)[0]
        rows = join_rows([future.result() for future in futures], tokenizer.pad_token_id)

    plain_base = copy_of(base, base.config.num_hidden_layers).eval()  # without compiled blocks
    vectors = collect_activations(plain_base, rows, batch)
    log(f"{len(vectors)} rows for AV and AR, explanations of up to {rows['explanations'].shape[1]} tokens")

    if given is None:
        ar = copy_of(base, LAYER + 1)
        head = torch.nn.Linear(ar.config.hidden_size, ar.config.hidden_size, bias=False, device=device)
        torch.nn.init.eye_(head.weight)
        if device.type == "cuda":
            compile_blocks(ar.model)
        report["ar_fit"] = train_ar(ar, head, vectors, rows, batch, steps["ar"], seconds["ar"])
        save_checkpoint(options.out / "ar", ar, tokenizer, "ar", head.weight)
    else:
        report |= json.loads((given / "evaluation.json").read_text(encoding="utf-8"))
        report["av_first_fit"] = report.pop("av_fit")
        for name in ("base", "ar"):
            shutil.copytree(given / name, options.out / name, dirs_exist_ok=True)
    av = copy_of(
        base if given is None else load_model(given / "av", device)[0], base.config.num_hidden_layers
    )
    if device.type == "cuda":
        compile_blocks(av.model)
    prompt = av_prompt_ids(tokenizer)
    report["av_fit"] = train_av(av, vectors, rows["explanations"], prompt, batch, steps["av"], seconds["av"])
    save_checkpoint(options.out / "av", av, tokenizer, "av")
    log("trained; evaluating from disk")

    report |= evaluate_trio(options.out, device, options.eval_problems)
    report["total_seconds"] = round(time.perf_counter() - start, 1)
    (options.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
