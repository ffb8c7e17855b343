"""`shakespeare_char` from start to finish, beside a loop in PyTorch: wall time and the last held-out loss.

    python benchmarks/shakespeare.py --text FILE [--steps 2000] [--repeats 1] [--json FILE]

All of a run counts: starting Python, reading the text, compiling (no cache of programs knows any before the run),
2,000 steps, and going through the whole held-out text before the first step and after each 250; what lmx writes as it
goes (checkpoints, metrics, samples, a report) too.
The loop is what one would write: a GPT-2 of transformers in the same sizes, with SDPA attention, the fused AdamW,
random windows of the text, the same learning rates (numbers in a file, as the peers do not import JAX), freed memory
kept as lmx keeps it, eager and by torch.compile. Runs are processes of their own and take turns.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmx.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("lmx", "eager", "compiled")
CACHES = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # of compiled programs
CONFIG = "experiments/shakespeare_char.py"


def run_lmx(text: Path, steps: int, folder: Path) -> float:
    """Trains by the command line; the last held-out loss."""
    command = [sys.executable, "-m", "lmx", "train", "--config", CONFIG, "--workdir", str(folder / "run")]
    command += [f"--config.data.train=text:{text}[:90%]", f"--config.data.eval=text:{text}[90%:]"]
    command += [f"--config.train.steps={steps}"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["eval/loss"] for line in map(json.loads, lines) if "eval/loss" in line][-1]


def what_peers_do(steps: int) -> dict[str, Any]:
    """The config's sections, and the learning rate of each step."""
    from lmx.config_files import read_config_file
    from lmx.training.optimizers import make_schedule

    config = read_config_file(str(ROOT / CONFIG)).replace(train={"steps": steps})
    schedule = make_schedule(config.optimizer, steps)
    return dataclasses.asdict(config) | {"rates": [float(schedule(step)) for step in range(steps)]}


def run_peer(text: Path, config: dict[str, Any], compiled: bool) -> float:
    """The loop in PyTorch; the last held-out loss."""
    keep_freed_memory()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model, optimized, train = (SimpleNamespace(**config[section]) for section in ("model", "optimizer", "train"))
    length, rows, steps = config["data"]["length"], train.global_batch_size, train.steps
    characters = text.read_text(encoding="utf-8")
    vocabulary = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([vocabulary[character] for character in characters])
    cut = round(0.9 * len(ids))
    training, held_out = ids[:cut], ids[cut:]
    torch.manual_seed(0)
    sizes = {"n_layer": model.num_layers, "n_head": model.num_heads, "n_embd": model.embed_dim, "n_positions": length}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), attn_implementation="sdpa", **sizes, **dropout))
    betas = (optimized.b1, optimized.b2)
    optimizer = torch.optim.AdamW(gpt.parameters(), betas=betas, weight_decay=optimized.weight_decay, fused=True)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = gpt(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    compute = torch.compile(loss_of) if compiled else loss_of

    @torch.no_grad()
    def evaluate() -> float:
        gpt.eval()
        windows = (len(held_out) - 1) // length // rows * rows
        inputs = held_out[: windows * length].view(-1, rows, length)
        targets = held_out[1 : windows * length + 1].view(-1, rows, length)
        losses = [float(compute(x, y)) for x, y in zip(inputs, targets, strict=True)]
        gpt.train()
        return statistics.mean(losses)

    loss = evaluate()
    for step, rate in enumerate(config["rates"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(training) - length - 1, (rows,))
        windows = torch.stack([training[start : start + length + 1] for start in starts])
        compute(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), optimized.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % train.eval_every == 0 or step + 1 == steps:
            loss = evaluate()
    return loss


def timed(system: str, text: Path, config: dict[str, Any]) -> dict[str, float]:
    """A run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "loss"
        (work := Path(folder) / "config.json").write_text(json.dumps(config))
        command = [sys.executable, __file__, "--text", str(text)]
        command += ["--one", system, "--config", str(work), "--result", str(result)]
        caches = {name: str(Path(folder) / name) for name in CACHES}
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | caches)
        return {"seconds": time.perf_counter() - start, "loss": float(result.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    text = args.text.resolve()
    if args.one:
        config = json.loads(args.config.read_text())
        with tempfile.TemporaryDirectory() as folder:
            if args.one == "lmx":
                loss = run_lmx(text, config["train"]["steps"], Path(folder))
            else:
                loss = run_peer(text, config, args.one == "compiled")
        args.result.write_text(str(loss))
        return
    config = what_peers_do(args.steps)
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(args.repeats):
        for system in SYSTEMS:
            runs[system].append(timed(system, text, config))
            print(f"{system}: {runs[system][-1]['seconds']:.1f} s, loss {runs[system][-1]['loss']:.4f}", flush=True)
    rows = []
    for system, found in runs.items():
        rows.append(
            {"name": f"{system}: held-out loss", "value": statistics.median(x["loss"] for x in found), "unit": "nats"}
        )
        rows.append(
            {"name": f"{system}: wall time", "value": statistics.median(x["seconds"] for x in found), "unit": "s"}
        )
    best = min(row["value"] for row in rows if row["unit"] == "s" and not row["name"].startswith("lmx"))
    rows[1] |= {"ratio": best / rows[1]["value"], "goal": 1.0}
    print(f"the better peer takes {rows[1]['ratio']:.2f} of lmx's time")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
