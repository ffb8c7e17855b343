"""The arguments of every command, and what they mean."""

import argparse
import functools
import importlib.metadata
import os

DESCRIPTION = "lmx: language models in JAX, from a config to a checkpoint, a report and an answer."
EXAMPLES = """examples:
  lmx train --config experiments/quickstart.py --workdir runs/quickstart
  lmx train --config experiments/gpt2.py:124m --workdir runs/gpt2 --config.train.steps=1000
  lmx launch slurm --config experiments/gpt2.py:124m --workdir runs/gpt2 --devices h100:32
  lmx generate --workdir runs/quickstart --prompt "The statement" --temperature 0.8
"""
FORMATS = "hf is what transformers opens; peft the low-rank adapters alone (lmx)"
OVERRIDES = "Any field is set by --config.SECTION.FIELD=VALUE; `lmx train --help-config` lists them all."


def make_parser() -> argparse.ArgumentParser:
    """The parser. What it returns has ``command``, such as "data prepare", or none, and that one's ``print_help``."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lmx", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"lmx {importlib.metadata.version('lmx')}")
    parser.set_defaults(command=None, print_help=parser.print_help, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, summary: str, group=commands, **options) -> argparse.ArgumentParser:
        sub = group.add_parser(
            name, help=summary, description=summary, formatter_class=formatter, allow_abbrev=False, **options
        )
        sub.set_defaults(command=sub.prog.removeprefix("lmx "))
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_train(command("train", "Train a config, or go on with the run that the workdir holds.", epilog=OVERRIDES))
    _add_plan(command("plan", "Say whether a config fits devices, and what it would take there.", epilog=OVERRIDES))
    _add_launch(command("launch", "Write a job for several machines, and submit it.", epilog=OVERRIDES))
    _add_eval(command("eval", "Score a trained model on held-out data."))
    _add_generate(command("generate", "Continue a prompt, or answer it with an encoder-decoder."))
    _add_predict(command("predict", "Classify texts with a fine-tuned model."))
    _add_convert(command("convert", "Write a model in another form, to and from published checkpoints."))
    _add_tokenizer(command("tokenizer", "Train a SentencePiece tokenizer."))
    _add_bench(command("bench", "Time lmx beside PyTorch and transformers on this machine."))
    data = commands.add_parser("data", help="Prepare a corpus, look at examples, compare texts.")
    data.set_defaults(print_help=data.print_help)
    _add_data_commands(functools.partial(command, group=data.add_subparsers(title="commands", metavar="COMMAND")))
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--config", metavar="FILE[:VARIANT]", help="experiment file, such as experiments/gpt2.py:124m")
    train.add_argument("--workdir", metavar="DIR", help="where the run is kept; made if it is not there")
    train.add_argument("--profile", action="store_true", help="trace a few steps, and print what costs most")
    train.add_argument("--help-config", action="store_true", help="list every field of a config and what it means")
    told = train.add_argument_group("several processes", "found by themselves under SLURM, Open MPI, GKE and TPU pods")
    told.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is")
    told.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    told.add_argument("--process-id", type=int, metavar="I", help="this one, from 0")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiment file")
    plan.add_argument("--devices", default="here", metavar="KIND:SIZE", help="v5p:8x8x16, h100:64, or here (here)")
    plan.add_argument("--json", metavar="FILE", help="also write every number here")
    plan.add_argument("--html", metavar="FILE", help="also write a page with pictures here")
    plan.add_argument("--shardings", action="store_true", help="list where each parameter goes")
    plan.add_argument("--search", action="store_true", help="rank all mesh shapes and remat policies; compiles many")


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


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--workdir", required=True, metavar="DIR", help="a training run")
    evaluate.add_argument("--data", metavar="SOURCE", help="another source than the config's data.eval")
    evaluate.add_argument(
        "--task", default="held_out", metavar="NAME", help="held_out (the default), or unigram: the baseline"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the scores here")


def _add_generate(generate: argparse.ArgumentParser) -> None:
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
    generate.add_argument("--num-beams", type=int, default=1, metavar="N", help="follow so many texts at a time (1)")
    generate.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="of beams: over the length to the power P (1)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    generate.add_argument("--draft", metavar="DIR", help="a smaller model with the same tokenizer that proposes tokens")
    generate.add_argument("--draft-tokens", type=int, default=4, metavar="N", help="proposed at a time (4)")
    generate.add_argument("--int8-weights", action="store_true", help="keep kernels and tables in eight bits")
    generate.add_argument("--int8-cache", action="store_true", help="keep keys and values in eight bits")


def _add_predict(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("--workdir", required=True, metavar="DIR", help="a training run or an exported folder")
    predict.add_argument("--text", action="append", required=True, metavar="TEXT", help="may be given several times")
    predict.add_argument("--pair", action="append", metavar="TEXT", help="the second text of each pair")


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument(
        "source", metavar="SRC", help="a run, an exported folder, a published checkpoint or a hub name"
    )
    convert.add_argument("target", metavar="DST", help="the folder to write; it must not exist, or be empty")
    convert.add_argument("--format", choices=("hf", "lmx", "peft"), default="lmx", help=FORMATS)


def _add_tokenizer(tokenizer: argparse.ArgumentParser) -> None:
    tokenizer.add_argument("--data", required=True, metavar="SOURCE", help="such as text:books/*.txt")
    tokenizer.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    tokenizer.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="special pieces included (32000)")
    tokenizer.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    tokenizer.add_argument("--num-sentinels", type=int, default=0, metavar="N", help="T5's <extra_id_0> … (0)")
    tokenizer.add_argument("--field", default="text", metavar="NAME", help="field of the records that holds the text")
    tokenizer.add_argument("--lowercase", action="store_true", help="lower-case the text first")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--suite", choices=("cpu", "gpu"), help="(what this machine has)")
    bench.add_argument("--only", default="", metavar="TEXT", help="only work with this in its name, such as gpt2")
    bench.add_argument("--json", metavar="FILE", help="also write every number here, as it is measured")
    bench.add_argument("--html", metavar="FILE", help="also write a page with a picture here")
    bench.add_argument("--profile", metavar="DIR", help="trace lmx's work into here, and print what costs most")


def _add_data_commands(command) -> None:
    from lmx.preparation.cleaning import describe_steps

    steps = f"cleaning steps, in this order:\n{describe_steps()}\n\n{OVERRIDES}"
    prepare = command("prepare", "Clean, deduplicate, split and tokenize a corpus, once.", epilog=steps)
    prepare.add_argument(
        "--source", action="append", required=True, metavar="SOURCE", help="may be given several times"
    )
    prepare.add_argument("--output", required=True, metavar="DIR", help="the folder to write, or to go on with")
    prepare.add_argument("--tokenizer", metavar="WHAT", help="bytes (the default), characters, or a tokenizer's path")
    prepare.add_argument("--config", metavar="FILE[:VARIANT]", help="an experiment whose tokenizer and field are taken")
    prepare.add_argument("--field", metavar="NAME", help="field of the records that holds the text (text)")
    prepare.add_argument("--documents", choices=("file", "line"), default="file", help="of text: files (file)")
    prepare.add_argument(
        "--unreadable", choices=("stop", "skip"), default="stop", help="lines of jsonl:, documents of text: (stop)"
    )
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

    inspect = command("inspect", "Show examples as the model sees them.", epilog=OVERRIDES)
    inspect.add_argument("--config", metavar="FILE[:VARIANT]", help="experiment file; default: next-token prediction")
    inspect.add_argument("--source", metavar="SOURCE", help="another source than the config's data.train")
    inspect.add_argument("--tokenizer", metavar="WHAT", help="as for prepare")
    inspect.add_argument("--rows", type=int, default=4, metavar="N", help="to show (4)")
    inspect.add_argument("--batches", type=int, default=20, metavar="N", help="to count over (20)")
    inspect.add_argument("--html", metavar="FILE", help="also write a page here")

    overlap = command("overlap", "Say how much of an evaluation set stands in the training text.")
    overlap.add_argument("--train", required=True, metavar="SOURCE", help="the training text")
    overlap.add_argument("--eval", required=True, metavar="SOURCE", help="the evaluation set")
    overlap.add_argument("--n", type=int, default=13, metavar="N", help="words of a run that is looked up (13)")
    overlap.add_argument("--field", default="text", metavar="NAME", help="field of the records that holds the text")
    overlap.add_argument("--json", metavar="FILE", help="also write every number here")
