"""Evaluates a demo trio from its files: base exactness, and the round trip vector -> text -> vector.

Uses plain transformers (`generate`, `output_hidden_states`) and the sidecars, nothing of the training code:
a mistake in training's own forward pass or in what was saved shows here. All problems are held out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_engine.demo.claims import operands_named
from nla_engine.demo.explanations import (
    CLOSE_TAG,
    answer_correct,
    explain,
    token_named,
    unwrap,
)
from nla_engine.demo.problems import Problem, held_out_problems
from nla_engine.demo.rows import conversation
from nla_engine.demo.tokenizer import encode, render

BATCH = 1024
MAX_NEW_TOKENS = 110


def load_model(directory: Path, device: torch.device) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer; transformers' own annotations do not fit its classes."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def _generate(model: Any, embeddings: torch.Tensor, end_id: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy ids for prompts of equal length, embeddings [B, P, d]; a list ends with EOS if reached."""
    attention = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    out = model.generate(
        inputs_embeds=embeddings, attention_mask=attention, do_sample=False, max_new_tokens=max_new_tokens
    ).tolist()
    return [ids[: ids.index(end_id) + 1] if end_id in ids else ids for ids in out]


def base_replies(model: Any, tokenizer: Any, problems: list[Problem]) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and greedily generated ids of each problem."""
    prompts = [encode(tokenizer, render(tokenizer, problem.question)) for problem in problems]
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    generated: list[list[int]] = [[] for _ in prompts]
    for indices in groups.values():
        ids = torch.tensor([prompts[index] for index in indices], device=model.device)
        embeddings = model.get_input_embeddings()(ids)
        for index, reply in zip(
            indices, _generate(model, embeddings, tokenizer.eos_token_id, 24), strict=True
        ):
            generated[index] = reply
    return list(zip(prompts, generated, strict=True))


@torch.no_grad()
def capture(model: Any, sequences: list[list[int]], layer: int) -> list[torch.Tensor]:
    """hidden_states[layer + 1] of each sequence, float32 [len, d] on the CPU."""
    out = []
    for low in range(0, len(sequences), BATCH):
        part = sequences[low : low + BATCH]
        width = max(map(len, part))
        # Padding is on the right, where causal attention hides it from the real tokens.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=model.device)
        hidden = model(ids, output_hidden_states=True).hidden_states[layer + 1]
        out += [hidden[index, : len(row)].float().cpu() for index, row in enumerate(part)]
    return out


def verbalize(directory: Path, device: torch.device, vectors: torch.Tensor) -> tuple[list[str], list[int]]:
    """The AV's greedy text for vectors [N, d], and the number of tokens of each."""
    model, tokenizer = load_model(directory, device)
    meta = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))
    content = meta["prompt_templates"]["av"].replace("{injection_char}", meta["tokens"]["injection_char"])
    ids = encode(tokenizer, render(tokenizer, content))
    marker = ids.index(meta["tokens"]["injection_token_id"])
    assert ids[marker - 1] == meta["tokens"]["injection_left_neighbor_id"]
    assert ids[marker + 1] == meta["tokens"]["injection_right_neighbor_id"]
    prompt = model.get_input_embeddings()(torch.tensor(ids, device=device)).detach()
    texts, sizes = [], []
    for low in range(0, len(vectors), BATCH):
        part = vectors[low : low + BATCH].to(device)
        embeddings = prompt.repeat(len(part), 1, 1)
        embeddings[:, marker] = part * (
            meta["extraction"]["injection_scale"] / part.norm(dim=-1, keepdim=True)
        )
        for out in _generate(model, embeddings, tokenizer.eos_token_id, MAX_NEW_TOKENS):
            texts.append(tokenizer.decode(out, skip_special_tokens=True))
            sizes.append(len(out))
    return texts, sizes


@torch.no_grad()
def reconstruct(directory: Path, device: torch.device, explanations: list[str]) -> torch.Tensor:
    """The AR's vectors float32 [N, d] on the CPU."""
    model, tokenizer = load_model(directory, device)
    model.model.norm = torch.nn.Identity()  # transformers would apply the final norm to the last block
    meta = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))
    head = load_file(directory / "value_head.safetensors")["weight"].float().to(device)
    suffix = meta["tokens"]["critic_suffix_ids"]
    prompts = [meta["prompt_templates"]["ar"].replace("{explanation}", text) for text in explanations]
    rows = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    assert all(row[-len(suffix) :] == suffix for row in rows)
    out = []
    for low in range(0, len(rows), BATCH):
        part = rows[low : low + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=device)
        hidden = model.model(ids).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in part], device=device)
        out.append((hidden[torch.arange(len(part), device=device), last] @ head.T).float().cpu())
    return torch.cat(out)


def scores(vectors: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, float]:
    """cos, shuffled cos and fve_nrm (variance over these rows) of vectors and reconstructions [N, d]."""
    v, r = F.normalize(vectors, dim=-1), F.normalize(reconstructions, dim=-1)
    cos = (v * r).sum(-1)
    variance = (v - v.mean(0)).pow(2).sum(-1).mean()
    shuffled = (v * r.roll(len(r) // 2, 0)).sum(-1)
    return {
        "cos": round(cos.mean().item(), 4),
        "cos_shuffled": round(shuffled.mean().item(), 4),
        "fve_nrm": round((1 - 2 * (1 - cos).mean() / variance).item(), 4),
        "variance": round(variance.item(), 4),
        "rows": len(cos),
    }


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / max(len(flags), 1), 4)


def evaluate_trio(
    directory: Path, device: torch.device, problem_count: int = 400, seed: int = 0
) -> dict[str, object]:
    """The trio's measured quality on held-out problems; the vectors come from the base's own replies."""
    base, tokenizer = load_model(directory / "base", device)
    meta = yaml.safe_load((directory / "av" / "nla_meta.yaml").read_text(encoding="utf-8"))
    problems = held_out_problems(problem_count * 4, seed)
    replies = base_replies(base, tokenizer, problems)
    correct = [
        answer_correct(tokenizer.decode(generated, skip_special_tokens=True), problem.result)
        for problem, (_, generated) in zip(problems, replies, strict=True)
    ]

    problems, replies = problems[:problem_count], replies[:problem_count]
    captured = capture(
        base, [prompt + generated for prompt, generated in replies], meta["extraction_layer_index"]
    )
    owners, generated_rows, tokens, from_end, places, true_texts = [], [], [], [], [], []
    for problem, (prompt, generated) in zip(problems, replies, strict=True):
        ids = prompt + generated
        talk = conversation(tokenizer.backend_tokenizer, problem)
        for position, token in enumerate(ids):
            owners.append(problem)
            generated_rows.append(position >= len(prompt))
            tokens.append(tokenizer.decode([token]))
            from_end.append(len(ids) - 1 - position)
            reading = talk.readings[min(position, len(talk.readings) - 1)]
            places.append(reading.part)
            true_texts.append(explain(problem, reading))
    vectors = torch.cat(captured)
    texts, sizes = verbalize(directory / "av", device, vectors)
    written = [unwrap(text) for text in texts]
    round_trip = reconstruct(directory / "ar", device, written)
    teacher = reconstruct(directory / "ar", device, true_texts)

    named = [
        operands_named(text) == (problem.a, problem.b) for text, problem in zip(written, owners, strict=True)
    ]
    read = [token_named(text) == token for text, token in zip(written, tokens, strict=True)]
    generated_mask = torch.tensor(generated_rows)
    rows = [index for index, flag in enumerate(generated_rows) if flag]
    header = [index for index, part in enumerate(places) if part == "header"]
    prompt_rows = [index for index, flag in enumerate(generated_rows) if not flag]
    by_distance: dict[int, list[bool]] = defaultdict(list)
    for index in rows:
        by_distance[from_end[index]].append(named[index])
    sizes_mib = {
        path.relative_to(directory).as_posix(): round(path.stat().st_size / 2**20, 3)
        for path in sorted(directory.rglob("*.safetensors"))
    }
    return {
        "base_exact_held_out": _share(correct),
        "base_problems": len(correct),
        "round_trip_generated": scores(vectors[generated_mask], round_trip[generated_mask]),
        "round_trip_prompt": scores(vectors[~generated_mask], round_trip[~generated_mask]),
        "teacher_forced_generated": scores(vectors[generated_mask], teacher[generated_mask]),
        "teacher_forced_prompt": scores(vectors[~generated_mask], teacher[~generated_mask]),
        "operand_accuracy": _share([named[index] for index in rows]),
        "operand_accuracy_header": _share([named[index] for index in header]),
        "operand_accuracy_by_tokens_to_end": {d: _share(flags) for d, flags in sorted(by_distance.items())},
        "token_accuracy": _share([read[index] for index in rows]),
        "token_accuracy_prompt": _share([read[index] for index in prompt_rows]),
        "status_ok": _share([CLOSE_TAG in text for text in texts]),
        "explanation_tokens": round(sum(sizes[index] for index in rows) / max(len(rows), 1), 1),
        "norm_median": round(vectors[generated_mask].norm(dim=-1).median().item(), 2),
        "size_mib": sizes_mib,
        "total_mib": round(sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) / 2**20, 2),
        "examples": [
            {"question": owners[i].question, "token": tokens[i], "text": written[i]} for i in rows[::700]
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the evaluation of a trio as one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_engine.demo.evaluate", description="Evaluate a trio."
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).parent / "trio")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--problems", type=int, default=40, help="problems of the round trip")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = evaluate_trio(options.directory, torch.device(options.device), options.problems, options.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
