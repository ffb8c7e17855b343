"""What preparing a corpus costs beside tokenizing it, and whether its memory grows with the corpus.

    python -m benchmarks.preparation [--megabytes 100] [--json FILE]

The text is the documentation and source of the packages that are installed, a record a file. Each preparation is
`lmx data prepare --processes 1`, a process of its own, with half of the text and with all of it. Seconds are of CPU,
so that others on the machine count less. `share` is the part of the whole that the tokenizer takes by itself, over the
same documents (those that are left) in the same portions: what is missing to 100 % is reading, cleaning, hashing,
MinHash, duplicates, splitting, writing and the start of Python. Prints a row of a Markdown table for each.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from lmx.config import Tokenizer
from lmx.text.corpora import open_source
from lmx.text.packing import CHARACTERS_AT_ONCE
from lmx.text.tokenizers import load_tokenizer, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".rst", ".md", ".txt", ".py")
VOCABULARY, TRAINING_CHARACTERS = 8000, 4_000_000
GOAL = 0.8


def write_corpus(folder: Path, megabytes: float) -> list[Path]:
    """Writes two files of records, each half of the text."""
    files = sorted(path for path in Path(sysconfig.get_path("purelib")).rglob("*") if path.suffix in SUFFIXES)
    files.sort(key=lambda path: hash_of(path))  # the halves are alike
    paths = [folder / "first.jsonl", folder / "second.jsonl"]
    queue = iter(files)
    for path in paths:
        with path.open("w", encoding="utf-8") as out:
            while out.tell() < megabytes * 10**6 / 2:
                try:
                    text = next(queue).read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return paths


def hash_of(path: Path) -> str:
    """A name's place in a mixed order that is always the same."""
    import hashlib

    return hashlib.sha256(path.name.encode()).hexdigest()


def make_tokenizers(folder: Path, source: Path) -> dict[str, str]:
    """A tokenizer of each kind, by what is given to --tokenizer."""
    import tokenizers

    records = open_source(f"jsonl:{source}")
    texts = [records[i]["text"] for i in range(min(len(records), 400))]
    section = Tokenizer(kind="sentencepiece", vocab_size=VOCABULARY, training_characters=TRAINING_CHARACTERS)
    make_tokenizer(section, lambda: texts).save(folder / "sentencepiece")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts[:100], trainer)
    (folder / "tokenizer.json").write_text(bpe.to_str())
    return {
        "sentencepiece": str(folder / "sentencepiece"),
        "bytes": "bytes",
        "tokenizer.json": str(folder / "tokenizer.json"),
    }


def prepare(sources: list[Path], tokenizer: str, output: Path) -> dict[str, float]:
    """Runs the command; CPU seconds, wall seconds and the most memory that it held, in MiB."""
    command = [sys.executable, "-m", "lmx", "data", "prepare", "--processes", "1", "--output", str(output)]
    command += ["--tokenizer", tokenizer, *(part for source in sources for part in ("--source", f"jsonl:{source}"))]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} ended with {status}")
    seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "wall": time.perf_counter() - begin, "memory": usage.ru_maxrss / 1024}


def tokenizer_alone(output: Path) -> tuple[float, float]:
    """Bytes of the documents of a prepared folder, and CPU seconds that its tokenizer takes for them."""
    tokenizer, size, seconds = load_tokenizer(output / "tokenizer"), 0, 0.0
    for split in ("train", "validation"):
        source = open_source(f"prepared:{output}@{split}")
        texts: list[str] = []
        for i in range(len(source)):
            texts.append(source[i]["text"])
            if sum(map(len, texts)) >= CHARACTERS_AT_ONCE or i == len(source) - 1:
                begin = time.process_time()
                tokenizer.encode_batch(texts)
                seconds += time.process_time() - begin
                size += sum(len(text.encode()) for text in texts)
                texts = []
    return size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="", help="about the machine, for the file")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = []
    print("| tokenizer | text, MB | left, MB | alone, MB/s a core | whole, MB/s a core | share | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_corpus(folder, args.megabytes)
        for kind, tokenizer in make_tokenizers(folder, sources[0]).items():
            for chosen in (sources[:1], sources):
                read = sum(path.stat().st_size for path in chosen) / 10**6
                output = folder / f"{kind}-{len(chosen)}"
                whole = prepare(chosen, tokenizer, output)
                size, alone = tokenizer_alone(output)
                share, left = alone / whole["seconds"], size / 10**6
                told = (left / alone, left / whole["seconds"])
                row = f"{told[0]:.2f} | {told[1]:.2f} | {share:.0%} | {whole['memory']:.0f}"
                print(f"| {kind} | {read:.0f} | {left:.0f} | {row} |", flush=True)
                base = f"{kind}/{read:.0f}MB"
                rows += [
                    {"name": f"{base}/alone", "value": told[0], "unit": "MB/s a core"},
                    {"name": f"{base}/whole", "value": told[1], "unit": "MB/s a core", "ratio": share, "goal": GOAL},
                    {"name": f"{base}/wall", "value": whole["wall"], "unit": "s"},
                    {"name": f"{base}/memory", "value": whole["memory"], "unit": "MiB"},
                ]
                if args.json:
                    contents = {"machine": f"{os.cpu_count()} cores", "note": args.note, "rows": rows}
                    args.json.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
