"""How much memory it takes to open a large checkpoint onto a mesh: peak resident memory beyond the shards themselves.

    python benchmarks/loading.py [--layers 20] [--json FILE]

Writes sharded safetensors of a Llama of that many layers (about 2 GB with 20) to a temporary folder, opens them in a
new process onto eight CPU devices (fsdp 4 x tensor 2), and prints what it held at most beyond what it held before and
the bytes of the shards, as a multiple of the largest tensor. CPU devices keep their shards in the same memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
GOAL = 1.2  # times the largest tensor


def write(folder: Path, layers: int) -> None:
    """The checkpoint, in shards of half a gigabyte."""
    from lmx.interop.families import family_of
    from lmx.interop.family import build_model
    from lmx.interop.files import write_tensors

    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"down_proj": (width, inner), "embed_tokens": (vocab, width), "lm_head": (vocab, width)}
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (inner, width))
    shapes |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    family = family_of("llama")
    rng = np.random.default_rng(0)

    def tensors():
        for weight in family.weights(build_model(family.model(config, ("lm",)))):
            kind = weight.theirs.split(".")[-2]
            if weight.theirs.endswith(".weight") and kind not in ("score", "q_norm", "k_norm"):
                yield weight.theirs, rng.random(shapes.get(kind, (width,)), np.float32)

    write_tensors(folder, tensors(), shard_bytes=5 * 10**8)


def measure(folder: Path) -> dict[str, float]:
    """Opens the checkpoint; bytes held before, at most and by the shards, and seconds."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from lmx.config import Mesh
    from lmx.interop.pretrained import load_params, model_config, open_checkpoint
    from lmx.parallel.sharding import Layout

    layout = Layout.of(Mesh(data=1, fsdp=4, tensor=2))
    config, tensors = open_checkpoint(folder)
    model = model_config(config, tensors, ("lm",))
    jax.block_until_ready(jax.numpy.zeros(8))
    before, start = _peak(), time.perf_counter()
    params, _ = load_params(folder, config, tensors, model, layout)
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    largest = max(int(np.prod(shape)) * 4 for shape in tensors.shapes.values())
    seconds = time.perf_counter() - start
    return {"before": before, "peak": _peak(), "shards": shards, "largest": largest, "seconds": seconds}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.layers)
        command = [sys.executable, __file__, "--measure", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    above = found["peak"] - found["before"] - found["shards"]
    print(
        f"{found['shards'] / 1e9:.2f} GB of shards in {found['seconds']:.1f} s; before {found['before'] / 1e9:.2f} GB, "
    )
    print(f"at most {found['peak'] / 1e9:.2f} GB: {above / 1e6:.0f} MB above the shards, ", end="")
    print(f"{above / found['largest']:.2f} x the largest tensor ({found['largest'] / 1e6:.0f} MB; goal {GOAL})")
    if args.json:
        rows = [
            {"name": "loading: peak above the shards", "value": above, "unit": "B", "ratio": above / found["largest"]}
            | {"goal": GOAL},
            {"name": "loading: time", "value": found["seconds"], "unit": "s"},
        ]
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
