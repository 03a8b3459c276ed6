"""The merge stage on small real models, against PEFT's own merge and plain loading."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merges import FP32, base_folders, merged, peft_merge, raw, tensors_of, trained
from parts import adopt_folder, make_model, make_tokenizer, seal_as
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return base_folders(tmp_path_factory)


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
        assert float((got[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), name
    ids = torch.randint(600, (2, 30), generator=torch.Generator().manual_seed(0))
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source, dtype=FP32), str(sft.folder / "epoch-1")
    )
    with torch.inference_mode():
        logits, merged_logits = adapted.eval()(input_ids=ids).logits, loaded(ids).logits
    assert float((logits - merged_logits).abs().max()) <= 1e-5 * float(logits.abs().max())
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
    """fp32 files under a bf16 config: what is weighed is what loading leaves, noise and all."""
    base, sft = adopt_folder(runs, folders()), trained(runs, folders(), std=3e-5)
    _, plain = merged(tmp_path, base, sft, "plain", survival_floor=0.0)
    source = tmp_path / "source"
    shutil.copytree(folders(), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    cast = adopt_folder(runs, source)
    out, facts = merged(tmp_path, cast, sft, "cast", survival_floor=0.0)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    want = reference_share(cast.folder, out, sft.folder / "epoch-1")
    assert facts["survival"] == pytest.approx(want, abs=1e-6)
    assert plain["certificate"]["survival"]["norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert facts["certificate"]["survival"]["norm_ratio"] > 1.5


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
    one, other = (merged(tmp_path, base, sft, name)[0] for name in "ab")
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


PEAK = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3


def rise(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process peaked above its start during ``work``."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024

    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # free memory goes back to the system
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
        libc.malloc_trim(0)
    PEAK.write_text("5")  # the peak is from now on
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


Inputs = tuple[Artifact, Artifact]


def rises(folder: Path, small: Inputs, large: Inputs) -> tuple[int, int]:
    """``rise`` of reading the large base and of merging it, when all libraries are there."""
    merged(folder, *small, "libraries")
    base, sft = large
    whole = rise(lambda: {name: t.clone() for name, t in tensors_of(base.folder).items()})
    return whole, rise(lambda: merged(folder, base, sft, "big"))


@pytest.mark.skipif(not PEAK.exists(), reason="needs Linux's /proc")
def test_memory_does_not_hold_the_model(tmp_path: Path, runs: Path, folders) -> None:
    """Seven files of 11 MB, every matrix updated; the yardstick is reading them all."""
    small = adopt_folder(runs, folders()), trained(runs, folders())
    source = tmp_path / "source"
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    make_model(source, **shape, head_dim=64, num_attention_heads=8)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=FP32)
    shutil.rmtree(source)
    model.save_pretrained(source, max_shard_size="12MB")
    make_tokenizer(source)
    del model
    base, sft = adopt_folder(runs, source), trained(runs, source, target_modules="all-linear")
    files = [path.stat().st_size for path in base.folder.glob("*.safetensors")]
    assert len(files) >= 6
    # in a process of its own: what other tests have left in the heap counts as well
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        whole, peak = process.submit(rises, tmp_path, small, (base, sft)).result()
    if whole < 0.8 * sum(files):
        pytest.skip("the memory of this process cannot be measured here")
    assert peak < 3 * max(files) < 0.5 * sum(files), (peak, max(files), sum(files))
