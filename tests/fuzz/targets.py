"""Every reader of files that others wrote, as ``target(content, folder)``: it may refuse with an LmxError, no more.

Used by the properties (:mod:`tests.fuzz.test_properties`), the fuzzer (``tests/fuzz/run.py``) and the replay of what
they found (``tests/fuzz/corpus``). A seed is a valid file, from which mutations start.
"""

import functools
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

from lmx import config as schema
from lmx.errors import LmxError

TEXT = "Some text, caf\u00e9 \U0001f600\nand another line.\n"
MOST_READ = 4  # records that are looked at


def _read_all(spec: str) -> None:
    from lmx.preparation.documents import Reading, plan_parts, read_part
    from lmx.text.corpora import open_source

    source = open_source(spec)
    for i in range(min(len(source), MOST_READ)):
        assert isinstance(source[i]["text"], str | int | float)
    for part in plan_parts([spec], Reading(), 10**6):
        for _ in read_part(part, Reading()):
            pass


def _file(name: str, prefix: str) -> Callable[[bytes, Path], None]:
    def target(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        _read_all(f"{prefix}{folder / name}")

    return target


def source_string(content: bytes, folder: Path) -> None:
    """A source as a user writes it; nothing of it may reach for a network."""
    from lmx.text.corpora import open_source

    spec = content.decode(errors="replace")
    if "tfds:" not in spec and "hf:" not in spec:
        open_source(spec)


def _tokenizer(name: str, kind: str, **beside: str) -> Callable[[bytes, Path], None]:
    def target(content: bytes, folder: Path) -> None:
        from lmx.text.published import PublishedTokenizer
        from lmx.text.tokenizers import load_tokenizer, make_tokenizer

        (folder / name).write_bytes(content)
        for other, text in beside.items():
            (folder / other.replace("__", ".")).write_text(text)
        if kind == "lmx":
            tokenizer = load_tokenizer(folder)
        elif kind == "published":
            tokenizer = PublishedTokenizer.open(folder)
        else:
            tokenizer = make_tokenizer(schema.Tokenizer(kind=kind, path=str(folder / name)), lambda: ())
        tokenizer.decode(tokenizer.encode("some text"))
        tokenizer.frame()

    return target


def safetensors(content: bytes, folder: Path) -> None:
    from lmx.interop.files import open_tensors

    (folder / "model.safetensors").write_bytes(content)
    tensors = open_tensors(folder)
    for name, shape in list(tensors.shapes.items())[:MOST_READ]:
        tensors.dtype(name)
        tensors.read(name, tuple(slice(0, size) for size in shape))


def safetensors_index(content: bytes, folder: Path) -> None:
    from lmx.interop.files import open_tensors

    inner = folder / "inner"
    inner.mkdir(exist_ok=True)
    for place in (folder, inner):
        (place / "a.safetensors").write_bytes(_safetensors_seed())
    (inner / "model.safetensors.index.json").write_bytes(content)
    tensors = open_tensors(inner)
    for path in tensors.files.values():
        assert path.parent == inner, path


def gguf(content: bytes, folder: Path) -> None:
    from lmx.interop.gguf import Gguf
    from lmx.text.published import PublishedTokenizer

    path = folder / "model.gguf"
    path.write_bytes(content)
    for reader in (Gguf, PublishedTokenizer.open):
        try:
            reader(path)
        except LmxError:
            pass


def published_config(content: bytes, folder: Path) -> None:
    from lmx.interop.families import family_of, head_of
    from lmx.interop.files import open_tensors
    from lmx.interop.pretrained import is_pretrained, model_config, read_config

    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(_safetensors_seed())
    is_pretrained(folder)
    config = read_config(folder)
    _, head = head_of(family_of(config["model_type"]), config)
    model_config(config, open_tensors(folder), head.heads)


def adapter_config(content: bytes, folder: Path) -> None:
    from lmx.interop.adapters import Adapters

    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(_safetensors_seed())
    Adapters.open(folder)


def workdir_config(content: bytes, folder: Path) -> None:
    from lmx.training.workdir import check_same_experiment, read_config

    (folder / "config.json").write_bytes(content)
    read_config(folder)
    check_same_experiment(folder, schema.Config())


def manifest(content: bytes, folder: Path) -> None:
    from lmx.text.prepared import PreparedDocuments

    (folder / "manifest.json").write_bytes(content)
    documents = PreparedDocuments(folder, "train")
    for i in range(min(len(documents), MOST_READ)):
        documents[i]


def overrides(content: bytes, folder: Path) -> None:
    from lmx.config_files import read_config_file

    file = Path(__file__).parents[2] / "experiments" / "quickstart.py"
    read_config_file(str(file), content.decode(errors="replace").split("\n"))


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "text": _file("a.txt", "text:"),
    "text_gz": _file("a.txt.gz", "text:"),
    "text_xz": _file("a.txt.xz", "text:"),
    "jsonl": _file("a.jsonl", "jsonl:"),
    "source_string": source_string,
    "lmx_tokenizer": _tokenizer("lmx_tokenizer.json", "lmx"),
    "tokenizer_json": _tokenizer("tokenizer.json", "file"),
    "vocab_txt": _tokenizer("vocab.txt", "file"),
    "sentencepiece": _tokenizer("a.model", "sentencepiece"),
    "published_vocab": _tokenizer("vocab.txt", "published"),
    "published_sentencepiece": _tokenizer("spiece.model", "published", config__json='{"model_type": "t5"}'),
    "tokenizer_config": _tokenizer(
        "tokenizer_config.json", "published", vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsome\ntext\n"
    ),
    "byte_pairs": _tokenizer("vocab.json", "published", merges__txt="#version: 0.2\ns o\n"),
    "safetensors": safetensors,
    "safetensors_index": safetensors_index,
    "gguf": gguf,
    "published_config": published_config,
    "adapter_config": adapter_config,
    "workdir_config": workdir_config,
    "manifest": manifest,
    "overrides": overrides,
}


def call(name: str, content: bytes, folder: Path) -> None:
    """Runs a target; an error for the reader is an answer."""
    try:
        TARGETS[name](content, folder)
    except LmxError as error:
        assert str(error).strip(), "an error without a message"


def _safetensors_seed() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(32)


def _gguf_seed() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def field(name: str, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    tokens = ["<unk>", "<s>", "</s>", "a", "b"]
    fields = [
        field("general.architecture", 8, text("llama")),
        field("llama.embedding_length", 4, struct.pack("<I", 4)),
        field("llama.attention.head_count", 4, struct.pack("<I", 2)),
        field("llama.block_count", 4, struct.pack("<I", 1)),
        field("tokenizer.ggml.model", 8, text("llama")),
        field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 5) + b"".join(map(text, tokens))),
        field("tokenizer.ggml.scores", 9, struct.pack("<IQ5f", 6, 5, *range(5))),
        field("tokenizer.ggml.token_type", 9, struct.pack("<IQ5i", 5, 5, 2, 3, 3, 1, 1)),
    ]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 5, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(fields)) + b"".join(fields) + tensor
    return head + bytes(-len(head) % 32) + bytes(80)


def _sentencepiece_seed() -> bytes:
    from lmx.text.tokenizers import make_tokenizer

    section = schema.Tokenizer(kind="sentencepiece", vocab_size=286)
    return make_tokenizer(
        section, lambda: ["some text to be trained on, and the rest of all the words that make it long"] * 3
    )._files()[0]["spiece.model"]


def _tokenizer_seed() -> bytes:
    vocabulary = {"[UNK]": 0, "some": 1, "text": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}).encode()


_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "text": lambda: [TEXT.encode()],
    "text_gz": lambda: [gzip.compress(TEXT.encode(), mtime=0)],
    "text_xz": lambda: [lzma.compress(TEXT.encode())],
    "jsonl": lambda: [b'{"text": "one", "label": 1}\n\n{"text": "caf\\u00e9"}\n'],
    "source_string": lambda: [b"builtin:python_manual[:90%]", b"0.7*builtin:copy + 0.3*text:/none[2:-5]"],
    "lmx_tokenizer": lambda: [
        b'{"kind": "characters", "lowercase": false, "characters": "abc", "num_sentinels": 2}',
        b'{"kind": "bytes", "lowercase": true, "num_sentinels": 0}',
    ],
    "tokenizer_json": lambda: [_tokenizer_seed()],
    "vocab_txt": lambda: [b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsome\n##text\n"],
    "sentencepiece": lambda: [_sentencepiece_seed()],
    "tokenizer_config": lambda: [b'{"do_lower_case": true, "cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}'],
    "byte_pairs": lambda: [b'{"s": 0, "o": 1, "m": 2, "e": 3, "so": 4}'],
    "safetensors": lambda: [_safetensors_seed()],
    "safetensors_index": lambda: [b'{"weight_map": {"a": "a.safetensors", "b": "../a.safetensors"}}'],
    "gguf": lambda: [_gguf_seed()],
    "published_config": lambda: [
        b'{"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 9, "n_positions": 8}',
        b'{"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}',
        b'{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, '
        b'"intermediate_size": 8, "vocab_size": 9, "rope_scaling": {"rope_type": "llama3"}}',
    ],
    "adapter_config": lambda: [b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}'],
    "workdir_config": lambda: [
        json.dumps({"config": schema.to_dict(schema.Config()), "asked": schema.to_dict(schema.Config())}).encode()
    ],
    "manifest": lambda: [
        b'{"format": 1, "splits": {"train": {"documents": 0, "tokens": 0, "index": {"file": "i"}, "shards": []}}, '
        b'"tokenizer": {"sha256": "", "section": {}, "vocab_size": 9}}'
    ],
    "overrides": lambda: [b"--config.train.steps=5\n--config.mesh.on=('v5p: fsdp=-1',)", b"--config.seed=1"],
}
_SEEDS |= {"published_vocab": _SEEDS["vocab_txt"], "published_sentencepiece": _SEEDS["sentencepiece"]}


@functools.cache
def seeds(name: str) -> list[bytes]:
    """Valid contents of a target."""
    return _SEEDS[name]()
