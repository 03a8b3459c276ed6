"""All engines are one method: same loss curve, same adapter, whatever the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parts import adopt_folder, make_model, make_tokenizer
from rich.console import Console
from safetensors.torch import load_file
from training import RECIPE, ROOT, Launch, losses, make_pack, train

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import RecipeError
from pipeline.recipes import SftRecipe
from pipeline.stage import Context

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero1": {"ds": str(ROOT / "ds_configs/zero1.json")},
    "zero2": {"ds": str(ROOT / "ds_configs/zero2.json")},
    "zero3": {"ds": str(ROOT / "ds_configs/zero3.json")},
}
SHARDED = "zero3, all sharded"
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "kl": {"anchors": {"objective": "kl", "weight": 0.5}},
    # half the rate: kernels round bf16 by the shapes that a processor likes, and long steps compound it
    "bf16": {"precision": "bf16", "optimizer": RECIPE["optimizer"] | {"learning_rate": 0.01}},
    "nf4": {"quantization": "nf4"},
    "full": {"lora": None, "optimizer": {"learning_rate": 0.001}},
}
CASES = [
    *[("fp32", name) for name in ENGINES],
    *[("kl", name) for name in ("ddp", "fsdp", "zero3")],
    *[("bf16", name) for name in ("ddp", "fsdp", "zero3")],
    *[("nf4", name) for name in (*ENGINES, SHARDED)],
    ("full", "fsdp"),
    ("full", "zero3"),
]
UNKNOWN = ("fsdp", "zero3")
TOLERANCE = {"fp32": 1e-5, "kl": 1e-5, "bf16": 1e-2, "nf4": 1e-4, "full": 1e-5}


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """An architecture that is not known: nothing is cut off there, and which of its parts are called
    is anybody's guess."""
    folder = tmp_path_factory.mktemp("unknown")
    make_model(folder / "model", "olmo2")
    make_tokenizer(folder / "model")
    base = adopt_folder(folder / "runs", folder / "model")
    return {"base": base, "pack": make_pack(folder / "runs", base, epochs=2)}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: dict[str, Artifact],
    unknown: dict[str, Artifact],
    launch: Launch,
) -> Path:
    """All cases, in one launch of two processes; and each variant in this process."""
    folder = tmp_path_factory.mktemp("engines")
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        config["zero_optimization"][f"stage3_{limit}"] = 0  # shipped, a tiny model stays whole
    sharded = folder / "zero3.json"
    sharded.write_text(json.dumps(config))
    engines = ENGINES | {SHARDED: {"ds": str(sharded)}}
    runs = [
        {"out": str(folder / v / e), "recipe": RECIPE | VARIANTS[v], **engines[e]} for v, e in CASES
    ]
    for engine in UNKNOWN:
        place = {"out": str(folder / "unknown" / engine), "inputs": unknown}
        runs.append({"recipe": RECIPE | {"epochs": 2}} | place | ENGINES[engine])
    launch(runs, inputs, folder)
    for variant, change in VARIANTS.items():
        out = folder / variant / "single"
        out.mkdir(parents=True)
        context = Context(
            scratch=folder / variant, options={"engine": "single"}, console=Console(quiet=True)
        )
        sft.run(SftRecipe.model_validate(RECIPE | change), inputs, out, context)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("variant", "engine"), CASES)
def test_same_loss_curve(folder: Path, variant: str, engine: str) -> None:
    expected = losses(folder / variant / "single")
    got = losses(folder / variant / engine)
    assert len(got) == len(expected) == 20
    worst = max(abs(g - e) / e for g, e in zip(got, expected, strict=True))
    assert worst <= TOLERANCE[variant]


@pytest.mark.distributed
@pytest.mark.parametrize("variant", ["fp32", "nf4"])
def test_the_compared_curve_learns(folder: Path, variant: str) -> None:
    curve = losses(folder / variant / "single")
    assert curve[-1] <= curve[0] * 2 / 3


@pytest.mark.distributed
@pytest.mark.parametrize("engine", list(ENGINES))
def test_same_adapter(folder: Path, engine: str) -> None:
    name = "epoch-10/adapter_model.safetensors"
    expected = load_file(folder / "fp32" / "single" / name)
    got = load_file(folder / "fp32" / engine / name)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert got[key].shape == tensor.shape
        # Adam divides by the gradient's size: where that is nearly zero, rounding decides
        assert (got[key] - tensor).abs().mean() <= 2e-3 * tensor.abs().mean() + 1e-6, key


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_two_processes_take_the_same_reference_to_the_bit(folder: Path, engine: str) -> None:
    """Else a cached one would not be what another world size computes."""
    (expected,) = (folder / "kl" / "cache").glob("reference-*/rows.bin")
    (got,) = (folder / "kl" / engine / "scratch" / "cache").glob("reference-*/rows.bin")
    assert got.read_bytes() == expected.read_bytes()


@pytest.mark.distributed
def test_an_architecture_that_is_not_known_trains_alike(
    folder: Path, unknown: dict[str, Artifact], tmp_path: Path
) -> None:
    recipe = RECIPE | {"epochs": 2}
    expected = losses(train(tmp_path / "single", unknown, recipe, tmp_path / "cache"))
    for name in UNKNOWN:
        assert losses(folder / "unknown" / name) == pytest.approx(expected, rel=1e-5), name
    assert expected[-1] < 0.9 * expected[0]


def test_full_fine_tuning_in_bf16_is_close_to_fp32(
    folder: Path, tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    """The model is fp32 under autocast there, where rotated queries and keys stay fp32."""
    (tmp_path / "scratch").mkdir()
    options = {"engine": "single"}
    context = Context(scratch=tmp_path / "scratch", options=options, console=Console(quiet=True))
    recipe = SftRecipe.model_validate(RECIPE | VARIANTS["full"] | {"precision": "bf16"})
    sft.run(recipe, inputs, tmp_path, context)
    pairs = zip(losses(tmp_path), losses(folder / "full" / "single"), strict=True)
    assert max(abs(got - want) / want for got, want in pairs) <= 5e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ds": ROOT / "ds_configs/zero3-offload.json"}, "engine zero3-offload; use"),
        ({"engine": "fsdp"}, "process group"),
    ],
)
def test_impossible_combinations_are_refused(
    tmp_path: Path, inputs: dict[str, Artifact], options: dict[str, Any], words: str
) -> None:
    context = Context(scratch=tmp_path, options=options, console=Console(quiet=True))
    recipe = SftRecipe.model_validate(RECIPE | {"quantization": "nf4"})
    with pytest.raises(RecipeError, match=words):
        sft.run(recipe, inputs, tmp_path, context)
