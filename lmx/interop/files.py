"""Files of tensors: safetensors (single, or sharded with an index) and PyTorch's; read by parts, written whole."""

import abc
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from lmx.errors import CheckpointError, missing_extra
from lmx.paths import is_lfs_pointer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
SHARD_BYTES = 5 * 1000**3  # as the Hugging Face hub has it
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Tensors(abc.ABC):
    """The tensors of a checkpoint, by name.

    Attributes:
      shapes: the shape of each.
      files: the file that each is in.
    """

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The type that it is stored in."""

    @abc.abstractmethod
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor."""


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a folder; safetensors first, then PyTorch's files.

    Raises:
      CheckpointError: there are none, a shard is missing, or a file is damaged.
      LmxError: PyTorch's files without PyTorch.
    """
    for index, single, cls in ((INDEX, SINGLE, Safetensors), (TORCH_INDEX, TORCH_SINGLE, TorchTensors)):
        if (folder / index).is_file():
            return cls(_shards(folder / index))
        if (folder / single).is_file():
            return cls([folder / single])
    others = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
    hint = f" There are {', '.join(others[:3])}; shards need their index, fetch it too." if others else ""
    raise CheckpointError(
        f"{folder} has no weights: neither {SINGLE} nor {INDEX}, {TORCH_SINGLE} nor {TORCH_INDEX} is there.{hint}"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if os.path.basename(name) != name or name in ("", ".", "..")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}); fetch it again.") from None
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of its own folder; it is not opened.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(missing)}. Fetch them again.")
    return [index.parent / name for name in names]


def _damaged(path: Path, what: str) -> CheckpointError:
    if path.is_file() and is_lfs_pointer(path):
        what = "is a note of Git LFS and not the file itself; fetch it with `git lfs pull`"
    return CheckpointError(f"{path} {what}.")


class Safetensors(Tensors):
    """Files of the safetensors format.

    They are read, not mapped into memory: what has been read of a mapped file counts as held.
    """

    def __init__(self, paths: Sequence[Path]):
        from safetensors import SafetensorError, safe_open

        self.shapes, self.files, self._kinds, self._begins = {}, {}, {}, {}
        for path in paths:
            try:
                with safe_open(path, "numpy"):  # checks that the header and the file agree
                    pass
                with path.open("rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(length))
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(path, f"is damaged or cut short ({error}); fetch it again") from None
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self.shapes[name], self.files[name] = tuple(entry["shape"]), path
                self._kinds[name], self._begins[name] = entry["dtype"], 8 + length + entry["data_offsets"][0]

    def dtype(self, name):
        kind = self._kinds[name]
        if kind not in DTYPES:
            raise CheckpointError(f"tensor {name} of {self.files[name]} has type {kind}, which is not supported.")
        return DTYPES[kind]

    def read(self, name, index):
        if not self.shapes[name]:
            raise CheckpointError(f"tensor {name} of {self.files[name]} is a single number, which no model here has.")
        dtype, (_, *inner) = self.dtype(name), self.shapes[name]
        row = math.prod(inner) * dtype.itemsize
        part = np.empty((index[0].stop - index[0].start, *inner), dtype)
        with self.files[name].open("rb", buffering=0) as file:
            file.seek(self._begins[name] + index[0].start * row)
            if file.readinto(part.view(np.uint8).reshape(-1)) != part.nbytes:
                raise CheckpointError(f"{self.files[name]} was cut short while it was read.")
        return part[(slice(None), *index[1:])]


class TorchTensors(Tensors):
    """PyTorch's files, read without running any code in them (``weights_only``)."""

    def __init__(self, paths: Sequence[Path]):
        try:
            import torch
        except ImportError:
            raise missing_extra("torch", "hf", f"{paths[0].name}, a PyTorch file") from None
        self.shapes, self.files, self._tensors = {}, {}, {}
        for path in paths:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self._tensors |= {name: tensor.detach() for name, tensor in loaded.items()}
            except Exception as error:  # unpickling raises almost anything
                reason = (str(error).splitlines() or [""])[0][:200]
                raise _damaged(path, f"is damaged, or no file of plain tensors ({reason})") from None
            self.shapes |= {name: tuple(self._tensors[name].shape) for name in loaded}
            self.files |= dict.fromkeys(loaded, path)

    def dtype(self, name):
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        try:
            return np.dtype(kind)
        except TypeError:
            raise CheckpointError(
                f"tensor {name} of {self.files[name]} has type {kind}, which is not supported."
            ) from None

    def read(self, name, index):
        import torch

        part = self._tensors[name][index].contiguous()
        if self.dtype(name) == ml_dtypes.bfloat16:  # NumPy knows it only by its bits
            return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes safetensors: one file, or shards of at most ``shard_bytes`` with an index."""
    from safetensors.numpy import save_file

    names: list[list[str]] = []
    size = total = 0
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        if pending:
            save_file(pending, folder / f"shard-{len(names)}.tmp", metadata={"format": "pt"})
            names.append(list(pending))
            pending.clear()

    for name, array in tensors:
        if pending and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(names) == 1:
        os.replace(folder / "shard-0.tmp", folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, held in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        os.replace(folder / f"shard-{i}.tmp", folder / file)
        weight_map |= dict.fromkeys(held, file)
    index: Mapping[str, object] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
