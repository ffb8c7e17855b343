"""The command line: parses, calls one function, prints. Errors are one paragraph and exit status 2."""

import argparse
import functools
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lmx.errors import LmxError

DESCRIPTION = "lmx: language models in JAX, from a config to a checkpoint, a report and an answer."
EXAMPLES = """examples:
  lmx train --config experiments/quickstart.py --workdir runs/quickstart
  lmx train --config experiments/gpt2.py:124m --workdir runs/gpt2 --config.train.steps=1000
  lmx launch slurm --config experiments/gpt2.py:124m --workdir runs/gpt2 --devices h100:32
  lmx generate --workdir runs/quickstart --prompt "The statement" --temperature 0.8
"""
FORMATS = "hf is what transformers opens; peft the low-rank adapters alone (lmx)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (0 done, 2 bad input, 128 + signal when stopped by one)."""
    parser = _parser()
    args, overrides = parser.parse_known_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    console = Console()
    try:
        if overrides and not hasattr(args, "config"):
            raise LmxError(f"unknown argument {overrides[0]!r}; see `lmx {args.command} --help`.")
        return args.run(args, overrides, console) or 0
    except LmxError as error:
        if args.debug:
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lmx", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"lmx {importlib.metadata.version('lmx')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run, summary: str, group=commands, **options) -> argparse.ArgumentParser:
        sub = group.add_parser(
            name, help=summary, description=summary, formatter_class=formatter, allow_abbrev=False, **options
        )
        sub.set_defaults(run=run, command=sub.prog.removeprefix("lmx "))
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    overrides = "Any field is set by --config.SECTION.FIELD=VALUE; `lmx train --help-config` lists them all."
    train = command("train", _train, "Train a config, or go on with the run that the workdir holds.", epilog=overrides)
    train.add_argument("--config", metavar="FILE[:VARIANT]", help="experiment file, such as experiments/gpt2.py:124m")
    train.add_argument("--workdir", metavar="DIR", help="where the run is kept; made if it is not there")
    train.add_argument("--help-config", action="store_true", help="list every field of a config and what it means")
    told = train.add_argument_group("several processes", "found by themselves under SLURM, Open MPI, GKE and TPU pods")
    told.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is")
    told.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    told.add_argument("--process-id", type=int, metavar="I", help="this one, from 0")

    plan = command("plan", _plan, "Say whether a config fits devices, and what it would take there.", epilog=overrides)
    plan.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiment file")
    plan.add_argument("--devices", default="here", metavar="KIND:SIZE", help="v5p:8x8x16, h100:64, or here (here)")
    plan.add_argument("--json", metavar="FILE", help="also write every number here")
    plan.add_argument("--html", metavar="FILE", help="also write a page with pictures here")
    plan.add_argument("--shardings", action="store_true", help="list where each parameter goes")
    plan.add_argument("--search", action="store_true", help="rank mesh shapes and remat policies")

    _add_launch(command("launch", _launch, "Write a job for several machines, and submit it.", epilog=overrides))

    evaluate = command("eval", _eval, "Score a trained model on held-out data.")
    evaluate.add_argument("--workdir", required=True, metavar="DIR", help="a training run")
    evaluate.add_argument("--data", metavar="SOURCE", help="another source than the config's data.eval")
    evaluate.add_argument(
        "--task", default="held_out", metavar="NAME", help="held_out (the default), or unigram: the baseline"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the scores here")

    generate = command("generate", _generate, "Continue a prompt, or answer it with an encoder-decoder.")
    generate.add_argument("--workdir", required=True, metavar="DIR", help="a training run or an exported folder")
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens (128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (0: from all)"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that hold P (1: from all)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")

    predict = command("predict", _predict, "Classify texts with a fine-tuned model.")
    predict.add_argument("--workdir", required=True, metavar="DIR", help="a training run or an exported folder")
    predict.add_argument("--text", action="append", required=True, metavar="TEXT", help="may be given several times")
    predict.add_argument("--pair", action="append", metavar="TEXT", help="the second text of each pair")

    convert = command("convert", _convert, "Write a model in another form, to and from published checkpoints.")
    convert.add_argument(
        "source", metavar="SRC", help="a run, an exported folder, a published checkpoint or a hub name"
    )
    convert.add_argument("target", metavar="DST", help="the folder to write; it must not exist, or be empty")
    convert.add_argument("--format", choices=("hf", "lmx", "peft"), default="lmx", help=FORMATS)

    tokenizer = command("tokenizer", _tokenizer, "Train a SentencePiece tokenizer.")
    tokenizer.add_argument("--data", required=True, metavar="SOURCE", help="such as text:books/*.txt")
    tokenizer.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    tokenizer.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="special pieces included (32000)")
    tokenizer.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    tokenizer.add_argument("--num-sentinels", type=int, default=0, metavar="N", help="T5's <extra_id_0> … (0)")
    tokenizer.add_argument("--field", default="text", metavar="NAME", help="field of the records that holds the text")
    tokenizer.add_argument("--lowercase", action="store_true", help="lower-case the text first")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")

    data = commands.add_parser("data", help="Prepare a corpus, look at examples, compare texts.")
    data.set_defaults(run=_help_of(data), command="data", debug=False)
    group = data.add_subparsers(title="commands", metavar="COMMAND")
    _add_data_commands(functools.partial(command, group=group), overrides)
    return parser


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("engine", metavar="ENGINE", help="slurm, gke or skypilot")
    launch.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiment file")
    launch.add_argument("--workdir", required=True, metavar="DIR", help="where the run is kept, seen by all machines")
    launch.add_argument("--devices", required=True, metavar="KIND:SIZE", help="v5p:8x8x16 or h100:64")
    launch.add_argument("--name", metavar="NAME", help="of the job (after the config)")
    launch.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of every process")
    launch.add_argument("--max-restarts", type=int, default=10, metavar="N", help="most restarts after failures (10)")
    launch.add_argument("--output", metavar="FILE", help="also write the job here; into a folder, under its name")
    launch.add_argument("--submit", action="store_true", help="hand the job over; otherwise it is only shown")
    more = launch.add_argument_group("options of engines")

    def option(*names: str, engines: str, **settings) -> None:
        settings["help"] += f" ({engines})"
        more.add_argument(*names, default=argparse.SUPPRESS, **settings)

    option("--time", metavar="D-HH:MM:SS", help="limit of each start", engines="slurm")
    option("--partition", metavar="NAME", help="queue", engines="slurm")
    option("--account", metavar="NAME", help="to be charged", engines="slurm")
    sbatch = "another parameter of submitit, such as qos=high"
    option("--sbatch", action="append", metavar="NAME=VALUE", help=sbatch, engines="slurm")
    option("--setup", action="append", metavar="COMMAND", help="shell before the run", engines="slurm, skypilot")
    option("--image", metavar="NAME", help="container with lmx and the config", engines="gke")
    mounts = "a bucket or a volume for the workdir, such as gs://bucket:/runs"
    option("--mount", action="append", metavar="SOURCE:/PATH", help=mounts, engines="gke, skypilot")
    option("--namespace", metavar="NAME", help="of Kubernetes", engines="gke")
    option("--queue", metavar="NAME", help="Kueue's local queue", engines="gke")
    option("--infra", metavar="CLOUD/REGION", help="where to look for machines", engines="skypilot")
    option("--spot", action="store_true", help="machines that may be taken away", engines="gke, skypilot")


def _add_data_commands(command, overrides: str) -> None:
    from lmx.preparation.cleaning import describe_steps

    steps = f"cleaning steps, in this order:\n{describe_steps()}\n\n{overrides}"
    prepare = command("prepare", _prepare, "Clean, deduplicate, split and tokenize a corpus, once.", epilog=steps)
    prepare.add_argument(
        "--source", action="append", required=True, metavar="SOURCE", help="may be given several times"
    )
    prepare.add_argument("--output", required=True, metavar="DIR", help="the folder to write, or to go on with")
    prepare.add_argument("--tokenizer", metavar="WHAT", help="bytes (the default), characters, or a tokenizer's path")
    prepare.add_argument("--config", metavar="FILE[:VARIANT]", help="an experiment whose tokenizer and field are taken")
    prepare.add_argument("--field", metavar="NAME", help="field of the records that holds the text (text)")
    prepare.add_argument("--documents", choices=("file", "line"), default="file", help="of text: files (file)")
    prepare.add_argument(
        "--steps", default="default", metavar="A,B", help="cleaning steps and groups, see below (default)"
    )
    prepare.add_argument("--min-words", type=int, default=5, metavar="N", help="fewer drop a document (5)")
    prepare.add_argument("--duplicates", choices=("keep", "exact", "near"), default="near", help="dropped (near)")
    prepare.add_argument("--similarity", type=float, default=0.8, metavar="S", help="of near-duplicates, Jaccard (0.8)")
    prepare.add_argument("--validation", type=float, default=0.01, metavar="P", help="share that is held out (0.01)")
    prepare.add_argument("--part-megabytes", type=float, default=16, metavar="M", help="of the sources, a shard (16)")
    prepare.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="(as many as cores)")
    prepare.add_argument("--runner", metavar="NAME", help="run by Apache Beam instead, such as DataflowRunner")
    prepare.add_argument("--runner-option", action="append", default=[], metavar="--NAME=VALUE", help="for Beam")

    inspect = command("inspect", _inspect, "Show examples as the model sees them.", epilog=overrides)
    inspect.add_argument("--config", metavar="FILE[:VARIANT]", help="experiment file; default: next-token prediction")
    inspect.add_argument("--source", metavar="SOURCE", help="another source than the config's data.train")
    inspect.add_argument("--tokenizer", metavar="WHAT", help="as for prepare")
    inspect.add_argument("--rows", type=int, default=4, metavar="N", help="to show (4)")
    inspect.add_argument("--batches", type=int, default=20, metavar="N", help="to count over (20)")
    inspect.add_argument("--html", metavar="FILE", help="also write a page here")

    overlap = command("overlap", _overlap, "Say how much of an evaluation set stands in the training text.")
    overlap.add_argument("--train", required=True, metavar="SOURCE", help="the training text")
    overlap.add_argument("--eval", required=True, metavar="SOURCE", help="the evaluation set")
    overlap.add_argument("--n", type=int, default=13, metavar="N", help="words of a run that is looked up (13)")
    overlap.add_argument("--field", default="text", metavar="NAME", help="field of the records that holds the text")
    overlap.add_argument("--json", metavar="FILE", help="also write every number here")


def _train(args: argparse.Namespace, overrides: list[str], console: Console) -> int:
    from lmx.config_files import describe_fields, read_config_file

    if args.help_config:
        console.print(describe_fields(), highlight=False, markup=False)
        return 0
    for name in ("config", "workdir"):
        if getattr(args, name) is None:
            raise LmxError(f"lmx train needs --{name}; see `lmx train --help`.")
    config = read_config_file(args.config, overrides)
    from lmx.parallel import processes

    processes.start(args.coordinator, args.num_processes, args.process_id)
    from lmx.training.loop import train

    _use_compilation_cache()
    from lmx.planning.command import explains_out_of_memory

    with processes.ends_with_peers(args.workdir), explains_out_of_memory(config, console):
        result = train(config, args.workdir, console=console if processes.is_first() else Console(quiet=True))
    return 128 + signal.Signals[result.ended] if result.ended.startswith("SIG") else 0


def _plan(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    if args.devices != "here":  # compilers for devices that are not there must not look for them
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from lmx.config_files import read_config_file

    config = read_config_file(args.config, overrides)
    from lmx.planning.command import plan

    _use_compilation_cache()
    plan(config, args.devices, console, args.json, args.html, args.shardings, args.search)


def _launch(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.launching import command
    from lmx.launching.job import make_job

    options = command.given_options(args.engine, vars(args))
    job = make_job(args.config, overrides, args.workdir, args.devices, args.name, args.env, args.max_restarts)
    prepared = command.prepare(args.engine, job, options)
    notes = [f"{job}; {prepared.checked}"]
    if args.output:
        notes.append(f"written: {command.write(args.output, job, prepared)}")
    print(prepared.text, end="")
    print(*notes, sep="\n", file=sys.stderr)  # so that the job alone can be piped
    if args.submit:
        print(f"submitted: {command.submit(args.engine, job, options, prepared)}", file=sys.stderr)
    else:
        print("dry run: nothing was submitted; --submit does it", file=sys.stderr)


def _eval(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.evaluation.held_out import evaluate_workdir

    _use_compilation_cache()
    scores = evaluate_workdir(args.workdir, source=args.data, task=args.task, console=console)
    for name, value in scores.items():
        console.print(f"{name} = {value:.6g}", highlight=False)
    if args.json:
        rows = [{"name": name, "value": value, "unit": ""} for name, value in scores.items()]
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


def _generate(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    import lmx

    _use_compilation_cache()
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    model = lmx.load(args.workdir)
    texts = model.generate(args.prompt, **settings)
    for prompt, text in zip(args.prompt, texts, strict=True):
        continued = prompt if model.config.model.architecture == "decoder" else ""
        console.print(continued + text, highlight=False, markup=False, soft_wrap=True)


def _predict(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    import lmx

    if args.pair and len(args.pair) != len(args.text):
        raise LmxError(f"--text was given {len(args.text)} times and --pair {len(args.pair)}; give one for the other.")
    texts = list(zip(args.text, args.pair, strict=True)) if args.pair else args.text
    for text, prediction in zip(texts, lmx.load(args.workdir).predict(texts), strict=True):
        line = json.dumps({"text": text, **prediction}, ensure_ascii=False)
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _convert(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    import lmx
    from lmx.training.progress import transfer

    with transfer(console, f"reading {args.source}") as progress:
        model = lmx.load(args.source, progress=progress)
    with transfer(console, f"writing {args.target}") as progress:
        model.save(args.target, format=args.format, progress=progress)
    config = model.config.model
    console.print(
        f"{config.architecture}, {config.num_layers} layers, {config.embed_dim} wide: {Path(args.target).resolve()}",
        highlight=False,
    )


def _tokenizer(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.config import Tokenizer
    from lmx.schema import check_section
    from lmx.text.corpora import open_source
    from lmx.text.tokenizers import make_tokenizer

    settings = Tokenizer(
        kind="sentencepiece",
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        num_sentinels=args.num_sentinels,
        byte_fallback=not args.no_byte_fallback,
        lowercase=args.lowercase,
    )
    check_section(settings, "tokenizer.")
    source = open_source(args.data, (args.field,))
    tokenizer = make_tokenizer(settings, lambda: (source[i][args.field] for i in range(len(source))))
    tokenizer.save(args.output)
    console.print(f"{tokenizer.vocab_size:,} pieces in {Path(args.output).resolve()}", highlight=False)


def _help_of(parser: argparse.ArgumentParser):
    def run(args: argparse.Namespace, overrides: list[str], console: Console) -> int:
        parser.print_help()
        return 2

    return run


def _prepare(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.preparation.command import prepare_from

    prepare_from(args, _config(args, overrides), console)


def _inspect(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.preparation.command import config_to_inspect
    from lmx.preparation.inspect import inspect

    config = config_to_inspect(_config(args, overrides), args.source, args.tokenizer)
    inspect(config, console, args.rows, args.batches, args.html)


def _overlap(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.preparation.overlap import overlap

    overlap(args.train, args.eval, args.n, console, args.field, args.json)


def _config(args: argparse.Namespace, overrides: list[str]):
    """The config of ``--config``, where it is given."""
    from lmx.config_files import read_config_file

    if args.config is None:
        if overrides:
            raise LmxError(f"{overrides[0]!r} changes a config, and none is given; see `lmx {args.command} --help`.")
        return None
    return read_config_file(args.config, overrides)


def _use_compilation_cache() -> None:
    """Keeps compiled programs between commands, where JAX is not told otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "lmx" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    sys.exit(main())
