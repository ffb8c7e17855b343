"""The command line: parses, calls one function, prints. Errors are one paragraph and exit status 2."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lmx.allocator import compute_on_main_thread, keep_freed_memory
from lmx.arguments import make_parser
from lmx.errors import LmxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status (0 done, 2 bad input, 128 + signal when stopped by one)."""
    args, overrides = make_parser().parse_known_args(arguments)
    if args.command is None:
        args.print_help()
        return 2
    console = Console()
    keep_freed_memory()
    try:
        if overrides and not hasattr(args, "config"):
            raise LmxError(f"unknown argument {overrides[0]!r}; see `lmx {args.command} --help`.")
        return COMMANDS[args.command](args, overrides, console) or 0
    except LmxError as error:
        if args.debug:
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


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

    _set_up_jax()
    processes.start(args.coordinator, args.num_processes, args.process_id)
    from lmx.planning.command import explains_out_of_memory
    from lmx.training.loop import train

    with processes.ends_with_peers(args.workdir), explains_out_of_memory(config, console):
        console = console if processes.is_first() else Console(quiet=True)
        result = train(config, args.workdir, console=console, profile=args.profile)
    return 128 + signal.Signals[result.ended] if result.ended.startswith("SIG") else 0


def _plan(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    if args.devices != "here":  # compilers for devices that are not there must not look for them
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from lmx.config_files import read_config_file

    config = read_config_file(args.config, overrides)
    from lmx.planning.command import plan

    _set_up_jax()
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

    _set_up_jax()
    scores = evaluate_workdir(args.workdir, source=args.data, task=args.task, console=console)
    for name, value in scores.items():
        console.print(f"{name} = {value:.6g}", highlight=False)
    if args.json:
        rows = [{"name": name, "value": value, "unit": ""} for name, value in scores.items()]
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


def _generate(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    import lmx

    _set_up_jax()
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "length_penalty", "seed")
    settings = {name: getattr(args, name) for name in (*names, "draft_tokens", "int8_cache")}
    model = lmx.load(args.workdir)
    if args.int8_weights:
        model = model.quantized()
    if args.draft:
        settings["draft"] = lmx.load(args.draft)
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
    from lmx.paths import new_folder
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
    output = new_folder(args.output)
    source = open_source(args.data, (args.field,))
    tokenizer = make_tokenizer(settings, lambda: (source[i][args.field] for i in range(len(source))))
    tokenizer.save(output)
    console.print(f"{tokenizer.vocab_size:,} pieces in {output}", highlight=False)


def _bench(args: argparse.Namespace, overrides: list[str], console: Console) -> None:
    from lmx.benchmarking.command import bench

    bench(args.suite, console, args.json, args.html, args.only, args.profile)


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


def _set_up_jax() -> None:
    """Keeps compiled programs between commands, where JAX is not told otherwise, and memory between steps."""
    import jax

    compute_on_main_thread()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "lmx" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


COMMANDS = {
    "train": _train,
    "plan": _plan,
    "launch": _launch,
    "eval": _eval,
    "generate": _generate,
    "predict": _predict,
    "convert": _convert,
    "tokenizer": _tokenizer,
    "bench": _bench,
    "data prepare": _prepare,
    "data inspect": _inspect,
    "data overlap": _overlap,
}

if __name__ == "__main__":
    sys.exit(main())
