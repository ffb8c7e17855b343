"""Files made to do harm: they fill no memory, reach no other folder, and nothing in them is ever run."""

import ast
import contextlib
import gzip
import json
import lzma
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

import lmx
from lmx.errors import CheckpointError, DataError, LmxError
from lmx.preparation.documents import Reading, plan_parts, read_part
from lmx.text import readers
from lmx.text.corpora import open_source
from tests.fuzz.targets import seeds

HUGE = (2**32, 2**60, 2**63 - 1, 2**64 - 1)


class little_memory:
    """Fails where the process has come to hold half a gigabyte more."""

    def __enter__(self):
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *exception):
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before < 500_000  # kilobytes


@pytest.mark.parametrize("suffix", ["txt.gz", "jsonl.gz", "txt.xz"])
def test_a_decompression_bomb_is_refused(tmp_path, suffix):
    pack = lzma.compress if suffix.endswith("xz") else gzip.compress
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(pack(bytes(1 << 24)) * 40)  # members one after the other: 640 MiB of them
    spec = f"{'jsonl' if 'jsonl' in suffix else 'text'}:{path}"
    with little_memory(), pytest.raises(DataError, match="bytes unpack to more than .*, which no text does"):
        open_source(spec)
    with little_memory(), pytest.raises(DataError, match="unpack to more than|more than .* bytes at offset 0"):
        for part in plan_parts([spec], Reading(), 10**6):
            for _ in read_part(part, Reading()):
                pass


def test_what_is_packed_well_is_still_read(tmp_path):
    text = "the same line again\n" * 200_000
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert (tmp_path / "a.txt.xz").stat().st_size * readers.MOST_RATIO < len(text)
    assert open_source(f"text:{tmp_path}/a.txt.xz")[0]["text"] == text


@pytest.mark.parametrize("size", HUGE)
def test_declared_sizes_of_safetensors(tmp_path, size):
    from lmx.interop.files import open_tensors

    path, seed = tmp_path / "model.safetensors", seeds("safetensors")[0]
    header = json.loads(seed[8 : 8 + int.from_bytes(seed[:8], "little")])
    contents = [struct.pack("<Q", size) + seed[8:]]
    for change in ({"shape": [size, 1]}, {"shape": [size, 0]}, {"data_offsets": [0, size]}, {"shape": [2] * 70}):
        changed = json.dumps(header | {"a": header["a"] | change}).encode()
        contents.append(struct.pack("<Q", len(changed)) + changed + bytes(32))
    for content in contents:
        path.write_bytes(content)
        with little_memory(), pytest.raises(CheckpointError):
            open_tensors(tmp_path)


@pytest.mark.parametrize("size", HUGE)
def test_declared_sizes_of_gguf(tmp_path, size):
    from lmx.interop.gguf import Gguf
    from lmx.text.published import PublishedTokenizer

    seed, path = seeds("gguf")[0], tmp_path / "model.gguf"
    for place in range(8, len(seed) - 8 - 80):
        if seed[place + 4 : place + 8] == bytes(4) and any(seed[place : place + 2]):  # a number of eight bytes
            path.write_bytes(seed[:place] + struct.pack("<Q", size) + seed[place + 8 :])
            for reader in (Gguf, PublishedTokenizer.open):
                with little_memory():
                    try:
                        reader(path)
                    except LmxError:
                        pass
    path.write_bytes(seed[:16] + struct.pack("<Q", size) + seed[24:])
    with pytest.raises(CheckpointError, match="bytes are said to follow byte 24"):
        Gguf(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/../../b", "", "inner/x.safetensors"])
def test_no_shard_outside_its_folder(tmp_path, name):
    from lmx.interop.files import open_tensors

    (tmp_path / "inner" / "inner").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "inner", tmp_path / "inner" / "inner"):
        for file in ("secret.safetensors", "x.safetensors", "b"):
            (folder / file).write_bytes(seeds("safetensors")[0])
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / "inner" / index).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="which is no file of its own folder"):
            open_tensors(tmp_path / "inner")
        (tmp_path / "inner" / index).unlink()


class Payload:
    """What a pickle would run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_no_pickle_is_run(tmp_path):
    from lmx.interop.files import open_tensors

    mark = tmp_path / "it-ran"
    for number, name in enumerate(("pytorch_model.bin", "model.safetensors")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps({"a": Payload(mark)}))
        with pytest.raises(CheckpointError):
            open_tensors(folder)
    np.save(tmp_path / "train.index", np.array([Payload(mark)], object), allow_pickle=True)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # so the payload does what it should


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_chat_template_reaches_nothing(tmp_path, template):
    from lmx.text.published import PublishedTokenizer

    (tmp_path / "vocab.txt").write_bytes(seeds("vocab_txt")[0])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(LmxError, match="chat template refused"):
        PublishedTokenizer.open(tmp_path).chat([{"role": "user", "content": "x"}])


def test_an_override_is_a_value_and_no_code(tmp_path):
    from lmx.config_files import read_config_file

    file, mark = Path(__file__).parents[2] / "experiments" / "quickstart.py", tmp_path / "it-ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name in ("train.steps", "mesh.on", "seed", "model.heads"):
        for value in (code, f"({code},)"):
            with contextlib.suppress(LmxError):
                read_config_file(str(file), [f"--config.{name}={value}"])
    assert read_config_file(str(file), [f"--config.data.train={code}"]).data.train == code
    assert not mark.exists()


def test_nothing_in_lmx_runs_what_it_reads():
    """No eval, exec or pickle anywhere; YAML as plain data, and PyTorch's files as weights only."""
    for path in Path(lmx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not names & {
                    "pickle",
                    "dill",
                    "cloudpickle",
                    "marshal",
                    "shelve",
                    "tarfile",
                    "zipfile",
                }, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "np.load", "__import__"), f"{path}: {called}"
                assert not called.startswith("yaml.") or called in ("yaml.safe_load", "yaml.safe_dump", "yaml.dump"), (
                    path
                )
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
