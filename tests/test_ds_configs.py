"""The DeepSpeed files: known keys only, mechanism only, held against DeepSpeed's own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.recipes import SftRecipe

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}
# where the recipe owns the value: absent, or "auto"
HYPERPARAMETERS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    return config


def test_the_files_are_those_that_the_documentation_names() -> None:
    assert {p.stem for p in FILES} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_top_level_holds_mechanism_and_autos_only(path: Path) -> None:
    config = read(path)
    assert set(config) <= {"zero_optimization", *HYPERPARAMETERS}
    for key in HYPERPARAMETERS:
        value = config.get(key, "auto")
        assert value in ("auto", {"enabled": "auto"}), f"{key} belongs to the job file"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_zero_section_is_valid_for_deepspeed(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = read(path)["zero_optimization"]
    parsed = DeepSpeedZeroConfig(**section)  # refuses keys that it does not know
    assert int(parsed.stage) == STAGES[path.stem]
    names = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    assert set(section) <= names
    if int(parsed.stage) < 3:
        assert not [key for key in section if key.startswith("stage3_")]


def test_deepspeed_refuses_a_key_it_does_not_know() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = read(ROOT / "ds_configs" / "zero3.json")["zero_optimization"]
    with pytest.raises(ValueError, match="stage3_prefetch_bucket"):
        DeepSpeedZeroConfig(**section, stage3_prefetch_bucket=1)


def test_offload_goes_to_unpinned_host_memory() -> None:
    """Pinned memory needs a GPU and a generous memlock limit; the file must run without both."""
    section = read(ROOT / "ds_configs" / "zero3-offload.json")["zero_optimization"]
    for name in ("offload_param", "offload_optimizer"):
        assert section[name] == {"device": "cpu", "pin_memory": False}
    without = {k: v for k, v in section.items() if not k.startswith("offload_")}
    assert without == read(ROOT / "ds_configs" / "zero3.json")["zero_optimization"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_engine_accepts_the_file(path: Path) -> None:
    from pipeline.train.zero import read_config

    config = read_config(path, SftRecipe())
    assert config["zero_optimization"] == read(path)["zero_optimization"]
    assert config["gradient_clipping"] == SftRecipe().optimizer.max_grad_norm


@pytest.mark.parametrize("key", HYPERPARAMETERS)
def test_the_engine_refuses_a_stated_hyperparameter(key: str, tmp_path: Path) -> None:
    from pipeline.train.zero import read_config

    stated = {"enabled": True} if key in ("bf16", "fp16") else 1
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(read(FILES[0]) | {key: stated}))
    with pytest.raises(RecipeError, match=f"{key} belongs to the job file"):
        read_config(path, SftRecipe())


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_training_on_cpus_needs_no_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would compile an operation of its own as soon as its communication starts, and
    stage 3 starts it while the model loads; the image has no compiler."""
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    from pipeline.train.zero import ZeroEngine

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    with ZeroEngine(ROOT / "ds_configs" / f"{name}.json").loading(SftRecipe()):
        assert build_shm_op() is None
