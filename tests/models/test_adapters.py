"""Adapters merged on loading: the weights of plain transformers with the product added by hand in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import (
    TARGETS,
    configure,
    edit,
    merged,
    save_adapter,
    save_ar_adapter,
    whole_model,
)
from safetensors.torch import load_file, save_file
from stand_in_hub import Hub
from tiny import ARCHITECTURES, D, byte_tokenizer, save_ar, save_av, save_model, tiny_config
from tokenizers.processors import TemplateProcessing

from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models import load
from nla_engine.models.cut import cut_config
from nla_engine.models.load import load_model
from nla_engine.models.source import find_source
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
HALF: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def fresh(seed: int) -> None:
    torch.manual_seed(seed)


def save_seeded(directory: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A model of random weights in a dtype."""
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def same(model: Any, truth: Any, dtype: torch.dtype = torch.float32) -> None:
    """Every weight of the model is that of the truth: to 1e-6 in float32."""
    found, wanted = model.state_dict(), truth.state_dict()
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, weight in wanted.items():
        assert found[name].dtype == dtype
        assert (found[name].float() - weight).abs().max() <= 1e-6, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_merge_is_the_product_added_by_hand(tmp_path: Path, architecture: str, rslora: bool) -> None:
    base = save_model(tmp_path / "base", architecture)
    tensors = save_adapter(tmp_path / "adapter", base, use_rslora=rslora)
    truth = merged(base, tensors, lambda name: 6 / (2 if rslora else 4))
    lm = load_model(str(tmp_path / "adapter"), **CPU)
    same(lm.model, truth)
    moved = [
        name
        for name, weight in whole_model(base).state_dict().items()
        if not torch.equal(weight, lm.model.state_dict()[name])
    ]
    assert len(moved) == len(tensors) // 2 >= 12
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(lm.model(ids).logits, truth(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_bfloat16_is_the_float32_merge_rounded_once(tmp_path: Path, stored: torch.dtype) -> None:
    """The sum starts from what the file holds, not from the weight that was rounded on loading."""
    base = save_seeded(tmp_path / "base", tiny_config("qwen3"), stored)
    save_adapter(tmp_path / "adapter", base)
    wide, narrow = (load_model(str(tmp_path / "adapter"), **how).model.state_dict() for how in (CPU, HALF))
    for name, weight in wide.items():
        assert torch.equal(weight.to(torch.bfloat16), narrow[name]), name


def test_patterns_of_rank_alpha_and_layers(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")

    def rank(name: str) -> int:
        return 8 if name.endswith("layers.1.mlp.down_proj") else 2 if "v_proj" in name else 4

    tensors = save_adapter(
        tmp_path / "adapter",
        base,
        r".*layers\.(1|3)\..*(q_proj|v_proj|down_proj)",
        rank,
        rank_pattern={"layers.1.mlp.down_proj": 8, r".*\.v_proj": 2},
        alpha_pattern={"q_proj": 10.0},
        layers_to_transform=[1, 3],
        target_modules=[*TARGETS, "o_proj"],
        exclude_modules=["o_proj"],
    )
    truth = merged(base, tensors, lambda name: (10 if "q_proj" in name else 6) / rank(name))
    same(load_model(str(tmp_path / "adapter"), **CPU).model, truth)
    configure(tmp_path / "adapter", layers_to_transform=[1, 2, 3])
    with pytest.raises(
        CheckpointError, match="no tensors for 3 modules .* first is model.layers.2.self_attn"
    ):
        load_model(str(tmp_path / "adapter"), **CPU)


def test_products_that_the_base_keeps_in_one_weight(tmp_path: Path) -> None:
    config = transformers.Phi3Config(
        vocab_size=259, hidden_size=D, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = save_seeded(tmp_path / "base", config)
    names = ["qkv_proj", "gate_up_proj"]
    tensors = save_adapter(tmp_path / "adapter", base, r".*\.(qkv_proj|gate_up_proj)", target_modules=names)
    same(load_model(str(tmp_path / "adapter"), **CPU).model, merged(base, tensors))


@pytest.mark.parametrize(
    "names", ["model.layers", "language_model.model.layers", "model.language_model.layers"]
)
def test_names_of_the_text_model_in_other_classes(tmp_path: Path, names: str) -> None:
    """An adapter trained on the text model alone, or with an older library's names, fits a multimodal base."""
    base = save_model(tmp_path / "base", "gemma3")
    tensors = save_adapter(tmp_path / "adapter", base, r".*language_model.*(q_proj|v_proj|down_proj)")

    def rename(held: dict[str, torch.Tensor]) -> None:
        for key in list(held):
            held[key.replace("model.language_model.layers", names)] = held.pop(key)

    edit(tmp_path / "adapter", rename)
    same(load_model(str(tmp_path / "adapter"), **CPU).model, merged(base, tensors))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_whole_modules_and_heads_of_tied_embeddings(tmp_path: Path, tied: bool, half: bool) -> None:
    """What an adapter changes of the head is not changed of the embedding that shared its weight."""
    config = tiny_config("qwen2")
    config.tie_word_embeddings = tied
    base, how = save_seeded(tmp_path / "base", config), HALF if half else CPU
    before = whole_model(base)
    head = {"lm_head.lora_A.weight": torch.randn(4, D), "lm_head.lora_B.weight": torch.randn(259, 4)}
    table = torch.randn(259, D)

    def loaded(directory: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = load_model(str(tmp_path / directory), **how).model
        return model.get_input_embeddings().weight, model.get_output_embeddings().weight

    def is_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
        wanted = wanted.to(how["dtype"])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if half else 1e-5)

    save_adapter(tmp_path / "head", base, more=head, target_modules=[*TARGETS, "lm_head"])
    embedding, last = loaded("head")
    product = head["lm_head.lora_B.weight"].double() @ head["lm_head.lora_A.weight"].double() * 1.5
    assert torch.equal(embedding, before.get_input_embeddings().weight.to(how["dtype"]))
    if not half:
        is_near(last, (before.get_output_embeddings().weight.double() + product).float())

    save_adapter(tmp_path / "saved", base, more={"lm_head.weight": table}, modules_to_save=["lm_head"])
    embedding, last = loaded("saved")
    assert torch.equal(embedding, before.get_input_embeddings().weight.to(how["dtype"]))
    is_near(last, table)

    rows = {"model.embed_tokens.lora_embedding_A": torch.randn(4, 259)}
    rows["model.embed_tokens.lora_embedding_B"] = torch.randn(D, 4)
    save_adapter(tmp_path / "rows", base, more=rows, target_modules=[*TARGETS, "embed_tokens"])
    embedding, last = loaded("rows")
    down, up = (rows[f"model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
    if not half:
        is_near(embedding, (before.get_input_embeddings().weight.double() + (up @ down).T * 1.5).float())
    assert torch.equal(last, before.get_output_embeddings().weight.to(how["dtype"]))


def test_fingerprints_depend_on_base_and_adapter_and_both_are_recorded(tmp_path: Path) -> None:
    base, other = save_model(tmp_path / "base"), save_model(tmp_path / "other", seed=5)
    for name in ("one", "two"):
        save_adapter(tmp_path / name, base)
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    configure(tmp_path / "three", base_model_name_or_path=str(other))
    made = [load_model(str(tmp_path / name), **CPU).describe() for name in ("base", "one", "two", "three")]
    assert len({entry["weights"] for entry in made}) == 4
    assert "adapter" not in made[0] and made[1]["base"] == str(base) and made[3]["base"] == str(other)
    assert made[1]["adapter"] == made[3]["adapter"] != made[2]["adapter"]
    given = find_source(str(tmp_path / "three"), base=str(base))
    assert load_model("three", **CPU, source=given).describe()["weights"] == made[1]["weights"]
    with pytest.raises(RequestError, match=r"--base .*is no adapter, it has weights of its own"):
        find_source(str(base), base=str(other))


def test_tokenizer_template_and_sidecar_are_the_adapter_s_own_or_its_base_s(tmp_path: Path) -> None:
    base = save_av(tmp_path / "base", 2, "llama")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base)
    lm = load_model(str(adapter), **CPU)
    assert lm.tokenizer.chat_template == byte_tokenizer().chat_template
    assert Verbalizer.load(str(adapter), **CPU).sidecar.path.parent == base

    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert load_model(str(adapter), **CPU).tokenizer.chat_template == "{{ messages[0]['content'] }}!"
    shutil.copy(base / "nla_meta.yaml", adapter)
    assert Verbalizer.load(str(adapter), **CPU).sidecar.path.parent == adapter

    (adapter / "chat_template.jinja").unlink()
    own = byte_tokenizer(chat=False)
    own.save_pretrained(adapter)
    assert load_model(str(adapter), **CPU).tokenizer.chat_template == byte_tokenizer().chat_template
    other = save_model(tmp_path / "other", "qwen2")  # transformers gives this class a token 259 of its own
    own.add_tokens(["<new>"])
    own.save_pretrained(adapter)
    with pytest.raises(
        CheckpointError, match="its tokenizer differs from that of its base .*other in 1 tokens"
    ):
        load_model("adapter", **CPU, source=find_source(str(adapter), base=str(other)))
    with pytest.raises(
        CheckpointError, match=r"has 1 tokens, '<new>' is one, for which its base .* no embedding \(259 in"
    ):
        load_model(str(adapter), **CPU)


def ar_truth(
    base: Path,
    tensors: dict[str, torch.Tensor],
    scaling: float,
    blocks: int,
    head: torch.Tensor,
    tokenizer: Any,
    text: str,
) -> torch.Tensor:
    """The AR by plain transformers: the last token's state behind the last block, before any norm, and the head."""
    model = merged(base, tensors, lambda name: scaling)
    ids = torch.tensor([tokenizer(f"Summary of <text>{text}</text> <summary>")["input_ids"]])
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[blocks][0, -1] @ head.T


@pytest.mark.parametrize("form", ["easy", "peft"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gemma3"])
def test_an_ar_is_the_first_blocks_of_its_base_with_its_own_head(
    tmp_path: Path, form: str, architecture: str
) -> None:
    base, ar = save_model(tmp_path / "base", architecture), tmp_path / "ar"
    if form == "easy":
        tensors = save_ar_adapter(ar, base, 3)
        head, scaling = load_file(ar / "ar_lora_value_head.safetensors")["value_head.weight"], 6 / 2
    else:
        tensors = save_adapter(ar, base, rf".*layers\.[012]\..*({'|'.join(TARGETS)})")
        head, scaling = torch.randn(D, D), 6 / 4
        save_file({"weight": head}, ar / "value_head.safetensors")
    shutil.copy(save_ar(tmp_path / "released", 2) / "nla_meta.yaml", ar)
    found = Reconstructor.load(str(ar), **CPU, base=str(base))
    assert found.lm.origin["base"] == str(base) and "base_in_training" not in found.lm.origin
    assert found.layer == 2 and len(found.lm.model.get_decoder().layers) == 3  # the others are not read
    for text in ("a text", "another, longer one"):
        truth = ar_truth(base, tensors, scaling, 3, head, found.lm.tokenizer, text)
        torch.testing.assert_close(found.reconstruct([text])[0], truth, rtol=1e-4, atol=1e-4)


def test_blocks_that_depend_on_the_others_are_read_with_them(tmp_path: Path, monkeypatch: Any) -> None:
    config = transformers.Gemma4TextConfig(
        vocab_size=259, hidden_size=D, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=259,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "gemma")
    assert cut_config(tmp_path / "gemma", 3, False) is None
    base, ar = save_model(tmp_path / "base"), tmp_path / "ar"
    assert cut_config(base, 3, False).num_hidden_layers == 3
    tensors = save_ar_adapter(ar, base, 3)
    shutil.copy(save_ar(tmp_path / "released", 2) / "nla_meta.yaml", ar)
    monkeypatch.setattr(load, "cut_config", lambda *_: None)
    found = Reconstructor.load(str(ar), **CPU, base=str(base))
    assert found.layer == 2 and len(found.lm.model.get_decoder().layers) == 4
    head = load_file(ar / "ar_lora_value_head.safetensors")["value_head.weight"]
    truth = ar_truth(base, tensors, 3.0, 3, head, found.lm.tokenizer, "a text")
    torch.testing.assert_close(found.reconstruct(["a text"])[0], truth, rtol=1e-4, atol=1e-4)


def test_an_ar_leaves_out_what_an_adapter_of_the_whole_model_has_for_later_blocks_and_the_head(
    tmp_path: Path,
) -> None:
    base, ar = save_model(tmp_path / "base"), tmp_path / "ar"
    more = {"lm_head.weight": torch.randn(259, D)}
    tensors = save_adapter(ar, base, more=more, modules_to_save=["lm_head"])
    head = torch.randn(D, D)
    save_file({"weight": head}, ar / "value_head.safetensors")
    shutil.copy(save_ar(tmp_path / "released", 2) / "nla_meta.yaml", ar)
    found = Reconstructor.load(str(ar), **CPU)
    truth = ar_truth(base, tensors, 6 / 4, 3, head, found.lm.tokenizer, "a text")
    torch.testing.assert_close(found.reconstruct(["a text"])[0], truth, rtol=1e-4, atol=1e-4)


def test_peft_gives_the_same(tmp_path: Path) -> None:
    """Where it is installed: it is no dependency."""
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", "qwen3")
    how = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 8},
    }
    model = peft.get_peft_model(whole_model(base), peft.LoraConfig(**how, modules_to_save=["lm_head"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    same(load_model(str(tmp_path / "adapter"), **CPU).model, model.merge_and_unload())


def test_an_ar_trained_without_start_tokens_reads_none_and_a_4_bit_base_is_told(
    tmp_path: Path, hub: Hub, said: list[str]
) -> None:
    """EasyNLA's trainers encode every prompt so; the released pairs' encode it with them."""
    base, ar, other = save_model(tmp_path / "base"), tmp_path / "ar", tmp_path / "other"
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))],
    )
    for directory in (ar, other):
        shutil.copytree(save_ar(tmp_path / f"released {directory.name}", 2), directory)
        for name in ("model.safetensors", "config.json"):
            (directory / name).unlink()
        tokenizer.save_pretrained(directory)
    (ar / "value_head.safetensors").unlink()
    tensors = save_ar_adapter(ar, base, 3, quant="4bit")
    found = Reconstructor.load(str(ar), **CPU, base=str(base))
    assert len(said) == 1 and "was trained on its base in 4 bits" in said[0]
    assert found.lm.origin["base_in_training"] == "4bit"
    head = load_file(ar / "ar_lora_value_head.safetensors")["value_head.weight"]
    truth = ar_truth(base, tensors, 3.0, 3, head, byte_tokenizer(), "a text")
    torch.testing.assert_close(found.reconstruct(["a text"])[0], truth, rtol=1e-4, atol=1e-4)

    tensors = save_adapter(other, base, rf".*layers\.[012]\..*({'|'.join(TARGETS)})")
    head = load_file(other / "value_head.safetensors")["weight"]
    found = Reconstructor.load(str(other), **CPU)
    assert found.lm.tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    truth = ar_truth(base, tensors, 1.5, 3, head, found.lm.tokenizer, "a text")
    torch.testing.assert_close(found.reconstruct(["a text"])[0], truth, rtol=1e-4, atol=1e-4)
