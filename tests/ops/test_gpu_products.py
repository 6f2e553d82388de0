"""Products on a GPU: cublasLt's algorithms against float64, in graphs and out of them; fp8 against its reference."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model

from nla_engine import extension
from nla_engine.engine.generator import Generator
from nla_engine.engine.pass_graphs import SWITCH
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import wrap_model
from nla_engine.ops import fp8, linear
from nla_engine.ops.backends import Kernels
from nla_engine.ops.gated_linear import (
    gated_linear,
    gated_linear_cuda,
    gated_linear_reference,
    has_kernel,
    tried_tiles,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_tuned():
    linear._tuned.clear()
    yield
    linear._tuned.clear()


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (3, 4608, 3584), (512, 3584, 18944), (130, 136, 264)])
@pytest.mark.parametrize(("bias", "add"), [(False, False), (True, False), (False, True)])
def test_every_algorithm_computes_the_product(m: int, n: int, k: int, bias: bool, add: bool) -> None:
    module = extension.load()
    assert module is not None and module.matmul_available(), "torch brings cublasLt along"
    plan = module.Matmul(0, m=m, n=n, k=k, bias=bias, accumulate=add, workspace_bytes=linear._WORKSPACE_BYTES)
    assert plan.algorithms > 0
    x, w, b, start = bf16(m, k), bf16(n, k), bf16(n) if bias else None, bf16(m, n) * k**0.5
    truth = x.double() @ w.double().T + (b.double() if bias else 0) + (start.double() if add else 0)
    usual = error(torch.addmm(start, x, w.t()) if add else torch.nn.functional.linear(x, w, b), truth)
    for number in range(plan.algorithms):
        out = start.clone() if add else torch.full_like(start, float("nan"))
        linear._Algorithm(plan, number, 0)(x, w, b, out)
        assert error(out, truth) <= 2 * usual, number


def test_tuned_products_are_taken_in_graphs_and_out_of_them(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_GAIN", 0.0)  # the fastest algorithm, however little it gains
    m, n, k = 256, 1024, 512
    weights, residual = [bf16(n, k) for _ in range(4)], bf16(m, n)
    biases = [bf16(n) for _ in weights]
    linear.tune(m, weights, biases)
    linear.tune(m, weights, add=True)
    assert len(linear._tuned) == 2 and all(linear._tuned.values())
    chosen = dict(linear._tuned)
    linear.tune(m, weights, biases)
    assert linear._tuned == chosen  # once measured it stays
    x, sum_ = bf16(m, k), residual.clone()
    plain = linear.linear(x, weights[1], biases[1])
    linear.add_linear_(sum_, x, weights[2])
    truth = x.double() @ weights[1].double().T + biases[1].double()
    assert error(plain, truth) <= 2 * error(torch.nn.functional.linear(x, weights[1], biases[1]), truth)
    truth = x.double() @ weights[2].double().T + residual.double()
    assert error(sum_, truth) <= 2 * error(torch.addmm(residual, x, weights[2].t()), truth)
    graph, in_graph = torch.cuda.CUDAGraph(), residual.clone()
    with torch.cuda.graph(graph):
        out = linear.linear(x, weights[1], biases[1])
        linear.add_linear_(in_graph, x, weights[2])
    graph.replay()
    assert torch.equal(out, plain) and torch.equal(in_graph, sum_)
    shifted = bf16(m * k + 1)[1:].view(m, k)  # where no algorithm may go
    truth = shifted.double() @ weights[1].double().T + biases[1].double()
    assert error(linear.linear(shifted, weights[1], biases[1]), truth) <= 2**-7


def test_what_gains_nothing_is_left_to_torch(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_GAIN", 100.0)
    w = [bf16(512, 512)]
    linear.tune(64, w)
    assert list(linear._tuned.values()) == [None]
    x = bf16(64, 512)
    assert torch.equal(linear.linear(x, w[0]), torch.nn.functional.linear(x, w[0]))


TILES = getattr(extension.load(), "gated_tiles", [])
needs_kernel = pytest.mark.skipif(
    torch.cuda.is_available() and not has_kernel(torch.device("cuda", 0)),
    reason="no kernel for this GPU is built",
)
#: m, n, k; the last three: a CTA's second tile, and more rows than stay in the cache together.
GATED = [
    (1, 8, 64), (65, 1000, 192), (130, 136, 128), (513, 1912, 3584),
    (513, 18944, 128), (4097, 264, 64), (2048 + 65, 1912, 192),
]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), GATED)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate_and_up_in_one_launch(tile: tuple[int, int], m: int, n: int, k: int, activation: str) -> None:
    x, w = bf16(m, k), bf16(2 * n, k) * k**-0.5
    around = torch.full((m * n + 512,), 7.0, dtype=torch.bfloat16, device="cuda")
    out = around[256:-256].view(m, n).fill_(float("nan"))
    assert gated_linear_cuda(x, w, activation, tile, out) is out
    g, u = (x.double() @ w.double().T).chunk(2, 1)
    act = torch.nn.functional
    truth = (act.silu(g) if activation == "silu" else act.gelu(g, approximate="tanh")) * u
    assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 2**-13).all()  # tensor cores cut their sums
    assert (around[:256] == 7).all() and (around[-256:] == 7).all()


@needs_kernel
@pytest.mark.parametrize("m", [1, 64, 100, 512, 1000])
def test_a_row_is_the_same_beside_any_others(m: int) -> None:
    x, w = bf16(m, 3584), bf16(2 * 1000, 3584) * 3584**-0.5
    tiles = tried_tiles(w, "silu")
    assert list(tiles) == TILES and tiles  # each computes what product and gate compute
    many = gated_linear(x, w, "silu", tiles)
    for tile in tiles:
        assert torch.equal(gated_linear_cuda(x, w, "silu", tile), many), tile
    assert torch.equal(gated_linear(x[-1:].clone(), w, "silu", tiles), many[-1:])
    assert error(many, gated_linear_reference(x, w, "silu").double()) <= 2**-7
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = gated_linear(x, w, "silu", tiles)
    x.neg_()
    graph.replay()
    assert torch.equal(again, gated_linear(x, w, "silu", tiles)) and not torch.equal(again, many)


@needs_kernel
def test_what_is_not_finite_is_not_gated_away() -> None:
    x, w = bf16(70, 256), bf16(2 * 64, 256)
    x[3, 5], x[69, 0] = float("nan"), float("inf")
    tiles = tried_tiles(w, "silu")
    assert tiles
    finite = torch.isfinite(gated_linear(x, w, "silu", tiles)).all(1)
    assert not finite[3] and not finite[69] and finite.sum() == 68


@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(60, 64, "bfloat16"), (64, 96, "bfloat16"), (64, 64, "float32")]
)
def test_other_weights_take_two_launches(n: int, k: int, dtype: str) -> None:
    x, w = (bf16(rows, k).to(getattr(torch, dtype)) for rows in (3, 2 * n))
    assert tried_tiles(w, "gelu") == ()
    assert torch.equal(gated_linear(x, w, "gelu", ()), gated_linear_reference(x, w, "gelu"))


@needs_kernel
def test_other_rows_take_two_launches() -> None:
    w = bf16(2 * 64, 64)
    tiles = tried_tiles(w, "silu")
    assert tiles
    for x in (bf16(0, 64), bf16(3 * 64 + 1)[1:].view(3, 64), bf16(64, 3).T):
        assert torch.equal(gated_linear(x, w, "silu", tiles), gated_linear_reference(x, w, "silu"))
    assert tried_tiles(bf16(2 * 64 * 64 + 1)[1:].view(2 * 64, 64), "silu") == ()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (3, 4608, 3584), (512, 3584, 18944), (130, 144, 272)])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_products_are_those_of_the_reference(m: int, n: int, k: int, biased: bool) -> None:
    x, w = fp8.quantise(bf16(m, k) * 7), fp8.quantise(bf16(n, k))
    bias = bf16(n) * k**0.5 if biased else None
    got = fp8.scaled_linear(x, w, bias, torch.bfloat16)
    truth = fp8.scaled_linear_reference(x, w, bias, torch.float32)
    assert error(got, truth.double()) <= 2**-7  # bfloat16, and sums of 14 bits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_blocks_generate_in_graphs_what_they_generate_outside(architecture: str, monkeypatch) -> None:
    lm = wrap_model(tiny_model(architecture).to("cuda", torch.bfloat16), byte_tokenizer(), name=architecture)
    stop = StopAutomaton([b""] * lm.vocab_size, ())
    work = [Request(i, tuple(range(1 + i, 12 + i)), 9) for i in range(6)]
    tokens = []
    monkeypatch.setenv(SWITCH, "0")  # prompt passes of another size may round differently
    for graphs in (True, False):
        monkeypatch.setattr(Runner, "graphable", property(lambda self, graphs=graphs: graphs))
        with Runner(lm, slots=6, length=24, kernels=Kernels(precision="fp8")) as runner:
            generator = Generator(runner, max_new_tokens=9, stop=stop)
            generator.prepare()
            tokens.append({c.request.id: c.generated.tolist() for c in generator.run(work)})
    assert tokens[0] == tokens[1] and len(tokens[0]) == 6
