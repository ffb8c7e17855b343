"""No reader answers with anything but a value or an error for the reader, whatever it is given."""

import gzip
import json
import lzma
import struct
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.fuzz.targets import TARGETS, call, seeds  # noqa: E402

EVERYDAY, HEAVY = 12, 1000
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**60, 2**63, 2**64 - 1, -(2**60), 10**400]) | st.integers()
WORDS = (
    st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "[CLS]", "None"]) | st.text()
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | WORDS
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4))


@st.composite
def mutated_json(draw, seed: bytes) -> bytes:
    """The seed's JSON with some of its values, and now and then a key, put otherwise."""
    whole = [json.loads(seed)]
    for _ in range(draw(st.integers(0, 3))):
        node, key = whole, 0
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node, key = node[key], None
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(list(keys)))
        node[key] = draw(JSON)
    return json.dumps(whole[0]).encode()


@st.composite
def mutated_bytes(draw, seed: bytes) -> bytes:
    """The seed with some bytes put otherwise, left out, doubled, or numbers of 8 bytes written over it."""
    content = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        change = draw(st.sampled_from(["set", "cut", "insert", "number", "double"]))
        if change == "set":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "cut":
            del content[place : place + draw(st.integers(1, 64))]
        elif change == "insert":
            content[place:place] = draw(st.binary(max_size=16))
        elif change == "number":
            content[place : place + 8] = struct.pack("<Q", draw(NUMBERS) % 2**64)
        else:
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
    return bytes(content)


@st.composite
def safetensors_header(draw, seed: bytes) -> bytes:
    """A header of any numbers before the seed's data."""
    length = int.from_bytes(seed[:8], "little")
    header = draw(mutated_json(seed[8 : 8 + length]))
    told = draw(st.just(len(header)) | st.just(len(header)) | NUMBERS.map(lambda number: number % 2**64))
    return struct.pack("<Q", told) + header + seed[8 + length :]


def contents(name: str) -> st.SearchStrategy[bytes]:
    """Contents for a target: anything, and what is nearly valid."""
    found = [st.binary(max_size=200)]
    for seed in seeds(name):
        found.append(mutated_bytes(seed))
        if seed[:1] == b"{" and b"\n" not in seed:
            found += [mutated_json(seed)] * 2
    if name == "safetensors":
        found += [safetensors_header(seeds(name)[0])] * 2
    if name == "jsonl":
        lines = st.lists(JSON.map(json.dumps) | st.text(), max_size=4)
        found.append(lines.map(lambda parts: "\n".join(parts).encode(errors="surrogatepass")))
    if name == "text":
        encodings = st.sampled_from(["utf-8", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis"])
        found.append(st.tuples(st.text(), encodings).map(lambda pair: pair[0].encode(pair[1], errors="replace")))
    if name in ("text_gz", "text_xz"):
        pack = gzip.compress if name == "text_gz" else lzma.compress
        found.append(st.binary(max_size=200).map(pack))
    if name == "source_string":
        found.append(st.tuples(st.sampled_from(["text:", "jsonl:", "prepared:", "builtin:", "0.5*"]), WORDS).map(_spec))
    if name == "overrides":
        fields = st.sampled_from(
            ["train.steps", "seed", "data.labels", "mesh.on", "model.lora.rank", "data.train", "x"]
        )
        values = WORDS | NUMBERS.map(str) | st.text("()[]{}',\"1-", max_size=30)
        found.append(st.tuples(fields, values).map(lambda pair: _spec((f"--config.{pair[0]}=", pair[1]))))
    return st.one_of(found)


def _spec(parts: tuple[str, str]) -> bytes:
    return "".join(parts).encode(errors="replace")


@pytest.mark.parametrize("name", TARGETS)
def test_readers_answer(name, tmp_path):
    check(name, tmp_path, EVERYDAY)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_readers_answer_a_thousand_times(name, tmp_path):
    check(name, tmp_path, HEAVY)


def check(name: str, folder: Path, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(content=contents(name))
    def answers(content: bytes) -> None:
        call(name, content, folder)

    answers()
