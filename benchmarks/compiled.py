"""The training steps of `lmx bench --suite gpu` that have a goal, compiled for cards that are not here: what they hold.

    python -m benchmarks.compiled [--devices v5p:2x2x1 …] [--only TEXT] [--json FILE]

Needs the extra `plan` (Python 3.12 or later) for TPUs and `gpu` for GPUs, and no such device. Each step is compiled
with the attention that is chosen for the hardware, and with plain attention, and as a loop over layers where a stack
has more than are written out, which compiles sooner. A device has the suite's rows and all parameters. Where that does
not fit, parameters are split over the devices, and then the rows are halved, a quarter, …; what plain attention takes
where it does not fit is what the compiler says that it would. Buffers are those between the program's operations, not
what an operation goes through inside. What the JSON file holds already is not compiled again.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from lmx.benchmarking.cases import Case, cases
from lmx.config import Config
from lmx.kernels.linear_cross_entropy import GPU_VOCAB
from lmx.objectives.mlm import num_chosen
from lmx.planning.program import Program, compile_program
from lmx.planning.targets import open_target

DEVICES = ("v5p:2x2x1", "v6e:2x2", "h100:1", "h200:1")
MOST = 0.5  # of plain attention's temporaries
MIB = 2**20
CALLS = {"cudnn": r"__cudnn\$fmha\w+", "pallas": r"custom_call_target=\"tpu_custom_call\""}


def steps_with_goals() -> list[Case]:
    """The training steps of the suite that have a goal, each program once: what its rows hold makes no other."""
    found = []
    for case in cases("gpu", "gpu"):
        if case.kind == "training" and (case.goal or case.utilization) and case.config not in [c.config for c in found]:
            found.append(case)
    return found


def compiled_forms(case: Case, devices: str) -> dict[str, dict]:
    """What there is to say of a step's program with our attention and with plain, both on what fits with ours."""
    rows = case.config.train.global_batch_size
    sizes = [(rows, "data"), *((rows >> halved, "fsdp") for halved in range(rows.bit_length()))]
    for size in sizes:
        ours = compiled(case, devices, "auto", *size)
        if ours["fits"]:
            break
    return {"auto": ours, "plain": compiled(case, devices, "plain", *size)}


def compiled(case: Case, devices: str, attention: str, rows: int, split: str) -> dict:
    """What there is to say of a step's program for so many rows a device, with devices along one axis of the mesh."""
    target = open_target(devices)
    config = case.config.replace(model={"attention": attention, "scan_layers": True}, mesh={"data": 1} | {split: -1})
    program = compile_program(config.replace(train={"global_batch_size": rows * len(target.devices)}), target)
    text = program.compiled.as_text() if program.compiled else ""
    return {
        "attention": "; ".join(map(str, program.experiment.attention_forms())),
        "rows": rows,
        "split": split,
        "seconds": program.seconds,
        "fits": program.compiled is not None,
        "temporaries": _temporaries(program),
        "calls": {name: len(re.findall(call, text)) for name, call in CALLS.items()},
        "squares": large_buffers(text, config.replace(train={"global_batch_size": rows})),
    }


def _temporaries(program: Program) -> int:
    if program.compiled is not None:
        return program.compiled.memory_analysis().temp_size_in_bytes
    needed = re.search(r"required for HLO temporaries \(([\d.]+)([GM])\)", program.error)
    return int(float(needed[1]) * {"G": 2**30, "M": MIB}[needed[2]])


def large_buffers(text: str, config: Config) -> list[str]:
    """The buffers of [length, length], and those of all logits of a device's rows, in a program.

    In whatever order and type: logits are what has an axis of the vocabulary, padded or not, and at least as many
    numbers as all of them; so that a gradient of the table, which has fewer, is none.
    """
    lengths = {config.data.length}
    predicted = config.data.length
    if config.model.architecture == "encoder_decoder":
        lengths.add(predicted := config.data.target_length)
    if config.objective.name == "mlm":
        predicted = num_chosen(config.data.length, config.objective.mask_rate)
    vocab = config.model.vocab_size
    logits = config.train.global_batch_size * predicted * vocab
    found = set()
    fused = False
    for line in text.splitlines():
        if line and not line.startswith(" "):  # a computation begins or ends; the bodies of fusions hold no buffers
            fused = "fused" in line or "fusion" in line.split("(")[0]
        shape = re.match(r"\s+(?:ROOT )?%?\S+ = (b?f\d+)\[([\d,]+)\]", line)
        if fused or not shape:
            continue
        sizes = [int(size) for size in shape[2].split(",")]
        is_square = sum(size in lengths for size in sizes) >= 2 and math.prod(sizes) >= config.data.length**2
        has_vocab = any(vocab <= size < vocab + GPU_VOCAB for size in sizes)
        if is_square or (has_vocab and math.prod(sizes) >= logits):
            found.add(f"{shape[1]}[{shape[2]}]")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=DEVICES)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = json.loads(args.json.read_text())["steps"] if args.json and args.json.is_file() else {}
    training = [case for case in steps_with_goals() if args.only in case.name]
    table = Table(
        "step", "devices", "attention", "rows", "split", "temporaries, MiB", "with plain", "ratio", "large buffers"
    )
    for devices in args.devices:
        for case in training:
            name = f"{case.name} on {devices}"
            if name not in steps:
                steps[name] = compiled_forms(case, devices)
                _write(args.json, steps)
            ours, plain = steps[name]["auto"], steps[name]["plain"]
            table.add_row(
                case.name,
                devices,
                ours["attention"],
                str(ours["rows"]),
                ours["split"],
                *(f"{one['temporaries'] / MIB:,.0f}{'' if one['fits'] else ', does not fit'}" for one in (ours, plain)),
                f"{ours['temporaries'] / plain['temporaries']:.2f}",
                ", ".join(ours["squares"]) or "none",
            )
            print(name, json.dumps({"auto": ours, "plain": plain}), flush=True)
    Console(width=160).print(table)


def _write(path: Path | None, steps: dict) -> None:
    if path is None:
        return
    rows = []
    for name, forms in steps.items():
        ours, plain = forms["auto"]["temporaries"], forms["plain"]["temporaries"]
        row = {"name": f"{name}: temporaries", "value": ours, "unit": "bytes"}
        rows.append(row | {"ratio": ours / plain, "goal": MOST})
        large = [shape for shape in forms["auto"]["squares"] if shape.startswith("f32")]
        rows.append({"name": f"{name}: float32 of [length, length or vocab]", "value": len(large), "unit": ""})
    path.write_text(json.dumps({"rows": rows, "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
