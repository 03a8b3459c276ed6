"""The merge stage on small real models, against PEFT's own merge and plain loading."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import adopt_folder, make_model, make_tokenizer, seal_as
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError
from pipeline.merge import run
from pipeline.model import merging
from pipeline.recipes import MergeRecipe
from pipeline.stage import Context

FP32 = torch.float32


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Base folders by architecture, dtype and tied embeddings; made once each."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def get(architecture: str = "llama", dtype: torch.dtype = FP32, tied: bool = False) -> Path:
        key = (architecture, dtype, tied)
        if key not in made:
            source, made[key] = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("base")
            make_model(source, architecture, num_hidden_layers=3, tie_word_embeddings=tied)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            model.save_pretrained(made[key], max_shard_size="100KB")
            make_tokenizer(made[key])
        return made[key]

    return get


def adapter_of(
    base: Path, folder: Path, *, std: float = 0.05, seed: int = 0, **options: Any
) -> None:
    """A PEFT adapter with a random B, as PEFT saves it, under ``folder``."""
    torch.manual_seed(seed)
    options = {"r": 1, "lora_alpha": 16, "target_modules": ["up_proj"]} | options
    model = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)


def trained(runs: Path, base: Path, epochs: int = 1, **options: Any) -> Artifact:
    def fill(folder: Path) -> dict[str, Any]:
        for epoch in range(1, epochs + 1):
            adapter_of(base, folder / f"epoch-{epoch}", seed=epoch, **options)
        return {"epochs": epochs, "method": "lora", "sources": {"harmful": 120}}

    return seal_as(runs, "sft", fill)


def merged(
    tmp_path: Path, base: Artifact, sft: Artifact, name: str = "out", **recipe: Any
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / name
    out.mkdir()
    facts = run(MergeRecipe(**recipe), {"base": base, "sft": sft}, out, Context(scratch=tmp_path))
    return out, facts


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def peft_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    result: dict[str, torch.Tensor] = (
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    )
    return result


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"r": 4, "target_modules": ["up_proj", "q_proj", "down_proj"]},
        {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
    ],
    ids=["rank1-one-layer", "rank4", "rank4-rslora-all"],
)
def test_merge_equals_peft(
    tmp_path: Path, runs: Path, folders, architecture: str, options: dict[str, Any]
) -> None:
    source = folders(architecture)
    base, sft = adopt_folder(runs, source), trained(runs, source, **options)
    out, facts = merged(tmp_path, base, sft)
    want = peft_merge(source, sft.folder / "epoch-1")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    got = loaded.state_dict()
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert float((got[name] - tensor).abs().max() / tensor.abs().max()) < 1e-5, name
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"]
    before, after = tensors_of(base.folder), tensors_of(out)
    changed = {name for name in before if raw(before[name]) != raw(after[name])}
    certificate = json.loads((out / "certificate.json").read_text())
    assert changed == {f"{module}.weight" for module in certificate["pairs"]}
    assert changed == set(certificate["survival"]["tensors"])
    assert (certificate["changed"], certificate["unchanged"]) == (
        len(changed),
        len(before) - len(changed),
    )
    assert facts["certificate"] == certificate
    assert facts["parity"] <= 1e-5 < facts["update_effect"]
    assert facts["survival"] == pytest.approx(1, abs=1e-4)
    for path in base.folder.glob("*.safetensors"):
        shared = path.samefile(out / path.name)
        assert shared == changed.isdisjoint(load_file(path))


def test_headers_of_rewritten_files_are_the_bases(tmp_path: Path, runs: Path, folders) -> None:
    base = adopt_folder(runs, folders())
    out, _ = merged(tmp_path, base, trained(runs, folders(), target_modules="all-linear"))
    for path in base.folder.glob("*.safetensors"):
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.read_bytes()[:length] == (out / path.name).read_bytes()[:length]


def reference_share(base: Path, out: Path, adapter: Path) -> float:
    """Survival from plainly loaded models, with numpy in float64."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    dot = norm = 0.0
    for key in [k for k in weights if "lora_A" in k]:
        b, a = weights[key.replace("lora_A", "lora_B")].double().numpy(), weights[key].double()
        meant = b @ a.numpy() * (config["lora_alpha"] / config["r"])
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        got = after[name].double().numpy() - before[name].double().numpy()
        dot += float(np.vdot(got, meant))
        norm += float(np.vdot(meant, meant))
    return dot / norm


@pytest.mark.parametrize("std", [1e-2, 1e-4, 3e-5])
def test_survival_is_that_of_the_loaded_models(
    tmp_path: Path, runs: Path, folders, std: float
) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source, std=std)
    out, facts = merged(tmp_path, base, sft, survival_floor=0.0)
    want = reference_share(base.folder, out, sft.folder / "epoch-1")
    assert facts["survival"] == pytest.approx(want, abs=1e-6)
    assert (std == 1e-2) == (want > 0.9)
    assert facts["certificate"]["dtype"] == "BF16"


def test_rounding_happens_once(tmp_path: Path, runs: Path, folders) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source, r=4, std=0.02)
    out, facts = merged(tmp_path, base, sft)
    want = peft_merge(source, sft.folder / "epoch-1")
    for name, tensor in tensors_of(out).items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.float() - want[name]).abs()
        assert bool((error <= want[name].abs() * 2**-8 + 1e-7).all())  # half a unit in last place
    assert facts["parity"] <= 1e-5 < facts["rounding_effect"]


def test_below_the_floor_is_refused(tmp_path: Path, runs: Path, folders) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source, std=3e-5)
    with pytest.raises(RecipeError) as caught:
        merged(tmp_path, base, sft, survival_floor=0.9)
    text = str(caught.value)
    assert re.search(r"\d+\.\d% of the update survives rounding to BF16", text)
    assert "survival_floor is 90.0%; set merge.below_floor: fp32" in text


def test_below_the_floor_in_fp32(tmp_path: Path, runs: Path, folders) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source, std=3e-5)
    out, facts = merged(tmp_path, base, sft, survival_floor=0.9, below_floor="fp32")
    assert facts["certificate"]["widened_to_fp32"]
    assert facts["certificate"]["dtype"] == "F32"
    assert facts["survival"] > 0.99
    assert max(facts["parity"], facts["rounding_effect"]) <= 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(out)  # no dtype given: what the config says
    assert {p.dtype for p in loaded.parameters()} == {FP32}
    want = peft_merge(source, sft.folder / "epoch-1")
    before = tensors_of(base.folder)
    for name, tensor in loaded.state_dict().items():
        if f"{name.removesuffix('.weight')}" in facts["certificate"]["pairs"]:
            assert torch.allclose(tensor, want[name], rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(tensor, before[name].float())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert json.loads((base.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp32_cannot_help_a_floor_above_fp32(tmp_path: Path, runs: Path, folders) -> None:
    base, sft = adopt_folder(runs, folders()), trained(runs, folders(), std=1e-9)
    with pytest.raises(RecipeError, match=r"rounding to F32.*; lower the floor"):
        merged(tmp_path, base, sft, survival_floor=1.0, below_floor="fp32")


def test_survival_counts_the_cast_at_loading(tmp_path: Path, runs: Path, folders) -> None:
    """fp32 files under a bf16 config lose as much as bf16 files."""
    source = tmp_path / "source"
    shutil.copytree(folders(), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    base, sft = adopt_folder(runs, source), trained(runs, source, std=3e-5)
    with pytest.raises(RecipeError, match="of the update survives"):
        merged(tmp_path, base, sft, survival_floor=0.9)
    out, facts = merged(tmp_path, base, sft, "again", survival_floor=0.0)
    want = reference_share(base.folder, out, sft.folder / "epoch-1")
    assert facts["survival"] == pytest.approx(want, abs=1e-6)


def test_tied_embeddings_stay_tied(tmp_path: Path, runs: Path, folders) -> None:
    source = folders("qwen2", torch.bfloat16, tied=True)
    base, sft = adopt_folder(runs, source), trained(runs, source)
    out, _ = merged(tmp_path, base, sft)
    assert "lm_head.weight" not in tensors_of(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def full(runs: Path, base: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Artifact:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "epoch-1").mkdir()
        tensors = {name: change(tensor.float()) for name, tensor in tensors_of(base).items()}
        save_file(tensors, folder / "epoch-1" / "model.safetensors")
        return {"epochs": 1, "method": "full"}

    return seal_as(runs, "sft", fill)


def test_full_fine_tuning_becomes_the_weights(tmp_path: Path, runs: Path, folders) -> None:
    source = folders("llama", torch.bfloat16, tied=True)
    base, sft = adopt_folder(runs, source), full(runs, source, lambda t: t * 1.05)
    out, facts = merged(tmp_path, base, sft)
    before, after = tensors_of(base.folder), tensors_of(out)
    for name, tensor in before.items():
        assert torch.equal(after[name], (tensor.float() * 1.05).bfloat16())
    assert facts["method"] == facts["certificate"]["method"] == "full"
    assert (facts["certificate"]["changed"], facts["certificate"]["unchanged"]) == (len(before), 0)
    assert facts["parity"] == 0.0
    assert "full fine-tuning" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    with pytest.raises(RecipeError, match=r"merge\.scale=0\.5 needs an adapter"):
        merged(tmp_path, base, sft, "scaled", scale=0.5)
    with pytest.raises(DataError, match="the update is zero everywhere"):
        merged(tmp_path, base, full(runs, source, lambda t: t), "same")


def test_epoch_and_scale(tmp_path: Path, runs: Path, folders) -> None:
    base, sft = adopt_folder(runs, folders()), trained(runs, folders(), epochs=2)
    name = "model.layers.1.mlp.up_proj.weight"
    for epoch in (1, 2):
        out, facts = merged(tmp_path, base, sft, f"epoch{epoch}", epoch=epoch)
        want = peft_merge(folders(), sft.folder / f"epoch-{epoch}")[name]
        assert torch.allclose(tensors_of(out)[name], want, rtol=1e-6)
        assert facts["epoch"] == epoch
    last, _ = merged(tmp_path, base, sft, "last")
    assert raw(tensors_of(last)[name]) == raw(tensors_of(out)[name])
    half, facts = merged(tmp_path, base, sft, "half", scale=0.5)
    before = tensors_of(base.folder)[name]
    middle = (before + tensors_of(last)[name]) / 2
    assert torch.allclose(tensors_of(half)[name], middle, atol=1e-7)
    assert facts["parity"] <= 1e-5
    with pytest.raises(RecipeError, match=r"merge\.epoch=3: training sealed epochs \[1, 2\]"):
        merged(tmp_path, base, sft, "none", epoch=3)


def test_scale_zero_is_the_base(tmp_path: Path, runs: Path, folders) -> None:
    base, sft = adopt_folder(runs, folders(dtype=torch.bfloat16)), trained(runs, folders())
    out, facts = merged(tmp_path, base, sft, scale=0.0)
    for path in base.folder.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert facts["survival"] is None
    assert facts["update_effect"] == 0.0


def test_same_inputs_same_digest(tmp_path: Path, runs: Path, folders) -> None:
    base, sft = adopt_folder(runs, folders()), trained(runs, folders())
    digests = {
        art.digest_of(art.hash_folder(merged(tmp_path, base, sft, name)[0])) for name in "ab"
    }
    assert len(digests) == 1


def test_sealed_files_are_not_written_through(tmp_path: Path, runs: Path, folders) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders(dtype=torch.bfloat16), source)
    for name in ("README.md", "certificate.json"):
        (source / name).write_text('{"of": "the base"}')

    def fill(folder: Path) -> dict[str, Any]:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
        return {"source": "some/where"}

    base = art.adopt(runs, "base", {"source": "x"}, fill)
    sft = trained(runs, source, std=3e-5)
    out, _ = merged(tmp_path, base, sft, survival_floor=0.9, below_floor="fp32")
    assert art.verify(base.folder) > 5
    assert not (out / "consolidated.safetensors").exists()  # unmerged weights
    assert "pairs" in json.loads((out / "certificate.json").read_text())


@pytest.mark.parametrize("where", ["changed", "linked"])
def test_a_base_that_changed_after_sealing(tmp_path: Path, runs: Path, folders, where: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders(), source)
    base = adopt_folder(runs, source)
    sft = trained(runs, folders(), layers_to_transform=[1])
    updated = "model.layers.1.mlp.up_proj.weight"
    path = next(
        p
        for p in sorted(base.folder.glob("*.safetensors"))
        if (updated in load_file(p)) == (where == "changed")
    )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: content changed since it was sealed"):
        merged(tmp_path, base, sft)
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match="damaged or cut short"):
        merged(tmp_path, base, sft, "cut")


def test_an_adapter_that_changed_after_sealing(tmp_path: Path, runs: Path, folders) -> None:
    base, sft = adopt_folder(runs, folders()), trained(runs, folders())
    path = sft.path("epoch-1/adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DataError, match="content changed since it was sealed"):
        merged(tmp_path, base, sft)


def test_folders_that_are_not_a_training(tmp_path: Path, runs: Path, folders) -> None:
    base = adopt_folder(runs, folders())
    with pytest.raises(DataError, match="holds no epoch-N/adapter_model"):
        merged(tmp_path, base, seal_as(runs, "sft", lambda folder: {}), "none")
    sft = trained(runs, folders())
    manifest = sft.manifest.model_copy(update={"facts": {"epochs": 3}})
    with pytest.raises(DataError, match=r"sealed with 3 epochs, holds \[1\]"):
        merged(tmp_path, base, replace(sft, manifest=manifest), "fewer")

    def both(folder: Path) -> None:
        adapter_of(folders(), folder / "epoch-1")
        save_file({"x": torch.zeros(1)}, folder / "epoch-1" / "model.safetensors")

    with pytest.raises(DataError, match="both an adapter and full weights"):
        merged(tmp_path, base, seal_as(runs, "sft", both), "both")

    def bare(folder: Path) -> None:
        adapter_of(folders(), folder / "epoch-1")
        (folder / "epoch-1" / "adapter_config.json").unlink()

    with pytest.raises(DataError, match=r"has no file epoch-1/adapter_config\.json"):
        merged(tmp_path, base, seal_as(runs, "sft", bare), "bare")


def test_a_quantized_base_is_refused(tmp_path: Path, runs: Path, folders) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders(), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    sft = trained(runs, folders())
    with pytest.raises(DataError, match="the base is quantized"):
        merged(tmp_path, adopt_folder(runs, source), sft)


def test_a_plan_that_is_not_the_adapter_fails_the_probes(
    tmp_path: Path, runs: Path, folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sft = adopt_folder(runs, folders()), trained(runs, folders())
    real = merging.plan_adapter

    def wrong(*args: Any, **options: Any) -> merging.Plan:
        return real(*args, **options | {"scale": 1.01 * options["scale"]})

    monkeypatch.setattr(merging, "plan_adapter", wrong)
    with pytest.raises(DataError, match="merged logits differ from base with adapter by"):
        merged(tmp_path, base, sft)


def test_a_merge_that_is_the_base_is_refused(tmp_path: Path, runs: Path, folders) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source, std=1e-12)
    with pytest.raises(DataError, match="answers the probes exactly as the base does"):
        merged(tmp_path, base, sft, survival_floor=0.0)
