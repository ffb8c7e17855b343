"""Fuzzes the readers with atheris (libFuzzer), each for a while; what it finds is kept in ``tests/fuzz/corpus/``.

    python -m tests.fuzz.run [--seconds 600] [--json FILE] [TARGET …]

Needs the package atheris beside lmx's own extra `hf`. Each target is a process of its own with a bound on memory and on
the time of one input. What made a reader crash, hang or fill the memory is written to ``corpus/TARGET/``, from where
``test_corpus.py`` replays it; the process is then started again for what is left of its time.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")
MOST_MEGABYTES, MOST_SECONDS, MOST_BYTES = 3000, 20, 4096
ONE = "LMX_FUZZED_TARGET"


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzzes a target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["lmx", "tests.fuzz.targets"]):
        from tests.fuzz.targets import call, seeds
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds(name):
            call(name, seed, Path(folder))  # so that what is imported on demand is there

        def one(content: bytes) -> None:
            call(name, content, Path(folder))

        atheris.Setup(arguments, one)
        atheris.Fuzz()


def run(name: str, seconds: float) -> dict:
    """Fuzzes a target in processes of its own; returns how often it was called, and what was found."""
    from tests.fuzz.targets import seeds

    begin, executions, found = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        inputs, artifacts = Path(folder) / "inputs", Path(folder) / "found"
        inputs.mkdir()
        artifacts.mkdir()
        for seed in seeds(name):
            (inputs / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        while (left := round(begin + seconds - time.monotonic())) > 0:
            options = [f"-max_total_time={left}", f"-rss_limit_mb={MOST_MEGABYTES}", f"-timeout={MOST_SECONDS}"]
            options += [f"-max_len={MOST_BYTES}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1", str(inputs)]
            environment = os.environ | {ONE: name, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-m", "tests.fuzz.run", *options]
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace")
            told = done.stdout + done.stderr
            counts = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)\s", told, re.MULTILINE)
            executions += max((int(a or b) for a, b in counts), default=0)
            if done.returncode == 0:
                break
            new = [path for path in artifacts.iterdir()]
            if not new:
                raise RuntimeError(f"{name} ended with status {done.returncode}:\n{told[-3000:]}")
            for path in new:
                kept = CORPUS / name / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(path.read_bytes())
                path.unlink()
                found.append(kept.name)
            print(f"{name}: {found[-1]}\n{told[-2500:]}", flush=True)
            if len(found) >= 5:  # one defect is found over and over: mend it first
                break
    return {
        "name": name,
        "value": executions,
        "unit": "executions",
        "seconds": round(time.monotonic() - begin),
        "found": found,
    }


def main() -> None:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.targets:
        rows.append(run(name, args.seconds))
        print(rows[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if ONE in os.environ:
        fuzz(os.environ[ONE], [sys.argv[0], *sys.argv[1:]])
    else:
        main()
