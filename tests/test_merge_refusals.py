"""What the merge stage refuses: inputs that changed, do not fit, or leave nothing of the update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merges import adapter_of, base_folders, merged, trained
from parts import adopt_folder, seal_as
from safetensors.torch import load_file, save_file

from pipeline import artifact as art
from pipeline.errors import DataError
from pipeline.model import merging


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return base_folders(tmp_path_factory)


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
