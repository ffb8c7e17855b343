"""What the remat policies save: bytes that the compiled step of GPT-2 124M needs on this machine, by policy.

    python -m benchmarks.remat [--rows 8] [--length 1024] [--json FILE]

Nothing is computed. The bytes are the compiler's (``memory_analysis``): the state, and all that stands beside it while
a step runs.
"""

import argparse
import json
from pathlib import Path

from lmx.config_files import read_config_file
from lmx.models import stack
from lmx.planning.program import compile_program
from lmx.planning.targets import HERE, open_target

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.6  # of what is needed without
MIB = 2**20


def peak(remat: str, rows: int, length: int) -> int:
    """Bytes of the step under a policy."""
    config = read_config_file(f"{ROOT / 'experiments/gpt2.py'}:124m").replace(
        model={"remat": remat}, data={"length": length}, train={"global_batch_size": rows, "max_rows_per_device": None}
    )
    found = compile_program(config, open_target(HERE)).compiled.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for remat in ("none", *stack.REMAT_POLICIES):
        size = peak(remat, args.rows, args.length)
        rows.append({"name": f"gpt2 124m, remat {remat}: peak", "value": size, "unit": "bytes"})
        ratio = size / rows[0]["value"]
        if remat == "full":
            rows[-1] |= {"ratio": ratio, "goal": GOAL}
        print(f"remat {remat:>13}  {size / MIB:>10,.0f} MiB  {ratio:.2f} of none", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
