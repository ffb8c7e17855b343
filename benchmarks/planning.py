"""What the large configs take, by plan: does each fit where it should run, and how far does it scale?

    python -m benchmarks.planning presets [--json FILE]    # the large configs on TPU pods and GPU nodes
    python -m benchmarks.planning scaling [--json FILE]    # one model and the same rows a chip, 16 to 2,048 chips

Needs the extra `plan` (Python 3.12 or later) for TPUs and `gpu` for GPUs, and no such device. Each plan is a process of
its own; what the JSON file holds already is not planned again. Prints a row of a Markdown table for each.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
PRESETS = (
    ("gpt3.py:175b", "v5p:8x8x16"),
    ("t5.py:11b", "v5p:4x4x4"),
    ("switch.py:c_2048", "v4:8x8x8"),
    ("gpt2.py:1558m", "v5e:4x4"),
    ("bert.py:large", "v6e:4x4"),
    ("gpt2.py:1558m", "h100:8"),
    ("gpt3.py:13b", "h100:64"),
)
SCALED, ROWS_A_CHIP = "gpt3.py:6.7b", 4
TORI = ("2x2x4", "4x4x4", "4x8x8", "8x8x16", "8x16x16")


def plan(config: str, devices: str, *overrides: str) -> dict:
    """The rows of a plan by name, with what limits the step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "lmx", "plan", "--config", str(ROOT / "experiments" / config)]
        command += ["--devices", devices, "--json", str(path), *(f"--config.{one}" for one in overrides)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        contents = json.loads(path.read_text())
    return {row["name"]: row["value"] for row in contents["rows"]} | {"limit": contents["limit"]}


def cases(which: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Config, devices and overrides of each plan."""
    if which == "presets":
        return [(config, devices, ()) for config, devices in PRESETS]
    found = []
    for torus in TORI:
        chips = math.prod(map(int, torus.split("x")))
        found.append((SCALED, f"v5p:{torus}", (f"train.global_batch_size={ROWS_A_CHIP * chips}",)))
    return found


def line(config: str, devices: str, found: dict) -> str:
    """A row of the table."""
    mesh = " × ".join(f"{name[5:]} {size}" for name, size in found.items() if name.startswith("mesh/") and size > 1)
    state = (found["memory/parameters"] + found["memory/optimizer"]) / GIB
    capacity = f"{found['memory/capacity'] / GIB:.1f}, {'fits' if found['fits'] else 'does not fit'}"
    step, bound = found.get("seconds/step"), found.get("utilization")
    numbers = f"{step:.2f} s | {bound:.0%}, {found['limit']}" if step else "– | –"
    total = "–" if found["memory"] is None else f"{found['memory'] / GIB:.1f}"
    return (
        f"| `{config}` | `{devices}` | {mesh} | {state:.2f} | {total} of {capacity} | "
        f"{numbers} | {found['compile']:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("presets", "scaling"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plans = json.loads(args.json.read_text())["plans"] if args.json and args.json.is_file() else {}
    print(
        "| config | devices | mesh | state, GiB | compiled, GiB a device | step at least | bound of MFU | compiling |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for config, devices, overrides in cases(args.which):
        name = f"{config} on {devices}"
        if name not in plans:
            plans[name] = plan(config, devices, *overrides)
        print(line(config, devices, plans[name]), flush=True)
        if args.json:
            rows = [
                {"name": f"{name}: {key}", "value": plans[name].get(key), "unit": unit}
                for name in plans
                for key, unit in (("memory", "bytes"), ("fits", ""), ("seconds/step", "s"), ("utilization", "fraction"))
            ]
            args.json.write_text(json.dumps({"rows": rows, "plans": plans}, indent=2) + "\n")


if __name__ == "__main__":
    main()
