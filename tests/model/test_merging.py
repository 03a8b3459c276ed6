"""The plan of a merge and its arithmetic, on adapters that PEFT wrote."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import DataError
from pipeline.model import merging, shards
from pipeline.model.merging import plan_adapter, plan_full
from pipeline.model.rewrite import rewrite
from pipeline.model.shards import open_checkpoint

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 on three kinds of modules, written by PEFT."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    targets = ["up_proj", "q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_rslora=True)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture()
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def plan(model: Path, adapter: Path, **options: Any) -> merging.Plan:
    options = {"base_digest": "0" * 64, "scale": 1.0, "tied": False} | options
    return plan_adapter(open_checkpoint(model), adapter, **options)


def edit_config(adapter: Path, **change: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_sum_equals_peft_in_any_blocks(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)  # several blocks a tensor
    checkpoint = open_checkpoint(model)
    planned = plan(model, adapter)
    assert len(planned.updates) == 6
    assert planned.scale == pytest.approx(12 / math.sqrt(4))
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    want = loaded.merge_and_unload().state_dict()
    for file, shard in checkpoint.shards.items():
        rewrite(shard, planned, tmp_path / file)
        for name, got in load_file(tmp_path / file).items():
            scale = want[name].abs().max()
            assert float((got - want[name]).abs().max() / scale) < 1e-6, name
            if name not in planned.updates:
                assert torch.equal(got, want[name])


def test_scale_multiplies_the_adapters_own(model: Path, adapter: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = torch.zeros(128, 64)
    full = plan(model, adapter).updates[name].opened()(base, 0, 128)[0]
    half = plan(model, adapter, scale=0.5).updates[name].opened()(base, 0, 128)[0]
    assert torch.allclose(half, full / 2, rtol=1e-6)
    edit_config(adapter, use_rslora=False)
    assert plan(model, adapter).scale == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True cannot be merged"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' cannot be merged"),
        ({"bias": "all"}, "bias='all' cannot be merged"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 0}, "r=0, wanted a positive number"),
        ({"r": 2.5}, "r=2.5, wanted a positive number"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": math.inf}, "lora_alpha=inf"),
        ({"r": 8}, r"A is \[4, \d+\], wanted \[8, \d+\] for rank 8"),
    ],
)
def test_a_config_that_means_something_else(
    model: Path, adapter: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(adapter, **change)
    with pytest.raises(DataError, match=message):
        plan(model, adapter)


def test_a_recorded_base_must_be_this_base(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    for digest, same in (("0" * 64, True), ("f" * 64, False)):
        save_file(load_file(path), path, metadata={"untaxed_base_digest": digest})
        if same:
            assert plan(model, adapter).updates
        else:
            with pytest.raises(DataError, match="trained on base ffffffff"):
                plan(model, adapter)


def test_a_config_that_is_not_json(model: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        plan(model, adapter)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed("layers.1.", "layers.7."), "the base has no tensor model.layers.7"),
        (renamed("1.mlp.up_proj", "1.input_layernorm"), r"is \[64\], wanted a matrix"),
        (renamed("base_model.model.", ""), "is not part of an A/B pair"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is not part of an A/B pair"),
        (lambda t: t.pop(f"{KEY}B.weight"), "layers.1.mlp.up_proj has no lora_B"),
        (lambda t: t.pop(f"{KEY}A.weight"), "layers.1.mlp.up_proj has no lora_A"),
        (lambda t: t.update({f"{KEY}B.weight": torch.ones(64, 4)}), r"B is \[64, 4\], wanted"),
        (lambda t: t.update({f"{KEY}A.weight": torch.ones(4, 0)}), r"A is \[4, 0\], wanted"),
        (lambda t: t[f"{KEY}B.weight"].zero_(), "up_proj: B is all zero: it was never trained"),
        (lambda t: t[f"{KEY}A.weight"][0].fill_(math.nan), "A holds a value that is not finite"),
        (lambda t: t.update({f"{KEY}A.weight": torch.ones(4, 64).int()}), "stored as I32"),
        (lambda t: t.clear(), "holds no adapter pair"),
    ],
)
def test_pairs_that_do_not_fit(
    model: Path, adapter: Path, edit: Callable[..., object], message: str
) -> None:
    edit_tensors(adapter, edit)
    with pytest.raises(DataError, match=message) as caught:
        plan(model, adapter)
    assert "\n" not in str(caught.value)


def test_a_pair_given_twice(model: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    shard = shards.read_shard(path)
    body = shard.raw[8:].replace(b"layers.0.mlp.up_proj.lora_A", b"layers.1.mlp.up_proj.lora_A")
    path.write_bytes(shard.raw[:8] + body + path.read_bytes()[len(shard.raw) :])
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight is there twice"):
        plan(model, adapter)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_tied_tensors_are_refused(model: Path, adapter: Path, module: str) -> None:
    a, b = torch.ones(4, 64), torch.ones(608, 4)
    pair = {f"base_model.model.{module}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    edit_tensors(adapter, lambda t: t.update(pair))
    with pytest.raises(DataError, match=f"{module}.weight is tied"):
        plan(model, adapter, tied=True)
    assert f"{module}.weight" in plan(model, adapter, tied=False).updates


def test_overflow_in_the_dtype_of_the_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({name: torch.full((128, 64), 6e4).half()}, tmp_path / "model.safetensors")
    edit_tensors(adapter, lambda t: [t.pop(k) for k in list(t) if KEY not in k])
    edit_tensors(adapter, lambda t: [t.update({k: torch.full_like(v, 50)}) for k, v in t.items()])
    shard = open_checkpoint(tmp_path).shards["model.safetensors"]
    planned = plan(tmp_path, adapter)
    with pytest.raises(DataError, match=f"{name} is not finite as torch.float16"):
        rewrite(shard, planned, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(other=torch.ones(1)), "has other, which the base has not"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"is \[3\], the base has"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "stored as I32"),
    ],
)
def test_full_weights_that_do_not_fit(
    model: Path, tmp_path: Path, edit: Callable[..., object], message: str
) -> None:
    tensors = {k: v for p in model.glob("*.safetensors") for k, v in load_file(p).items()}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=message):
        plan_full(open_checkpoint(model), tmp_path / "model.safetensors", tied=False)


def test_a_tied_head_stored_in_the_base_follows_the_embedding(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    both = {merging.EMBEDDING: torch.zeros(3, 2), merging.HEAD: torch.zeros(3, 2)}
    save_file(both, tmp_path / "base" / "model.safetensors")
    save_file({merging.EMBEDDING: torch.ones(3, 2)}, tmp_path / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    planned = plan_full(base, tmp_path / "model.safetensors", tied=True)
    head = planned.updates[merging.HEAD].opened()(torch.zeros(3, 2), 0, 3)[1]
    assert torch.equal(head, torch.ones(3, 2))
    with pytest.raises(DataError, match=r"lacks lm_head\.weight"):
        plan_full(base, tmp_path / "model.safetensors", tied=False)
