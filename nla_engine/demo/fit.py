"""The training loop shared by the three demo models, and the forward pass over a model's first blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from transformers import Qwen2Model


def run_blocks(
    model: Qwen2Model, embeddings: torch.Tensor, blocks: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Output [B, L, d] of decoder block `blocks - 1`, before any final norm, for embeddings [B, L, d].

    mask: bool [B, 1, L, L], True where attention is allowed; None means causal over the whole row.
    """
    positions = torch.arange(embeddings.shape[1], device=embeddings.device).unsqueeze(0)
    rotary = model.rotary_emb(embeddings, positions)
    hidden = embeddings
    for block in model.layers[:blocks]:
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden


def compile_blocks(model: Qwen2Model) -> None:
    """Compile each block; equal blocks share one compilation. Falls back to eager if the compiler fails."""
    torch._dynamo.config.suppress_errors = True
    for block in model.layers:
        block.compile(dynamic=False)


def fit(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    steps: int,
    seconds: float,
    peak_rate: float,
    device: torch.device,
) -> dict[str, float]:
    """AdamW with warm-up and linear decay to zero, ended by `steps` or by `seconds`, whichever comes first.

    The rate follows the larger of the two fractions spent, so it has always decayed to zero at the end.
    Returns steps done, seconds used and the mean loss of the last tenth logged.
    """
    parameters = list(parameters)
    decay = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    warmup = max(1, min(300, steps // 20))
    start, step, losses = time.perf_counter(), 0, []
    first_step_end = start  # the first step compiles: its time is not counted
    while step < steps:
        spent = max(step / steps, (time.perf_counter() - first_step_end) / seconds)
        if spent >= 1:
            break
        rate = peak_rate * min(1.0, (step + 1) / warmup) * (1 - spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
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
