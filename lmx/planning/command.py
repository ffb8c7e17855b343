"""``lmx plan``: one plan, or the best of many, printed and written; and a run that is out of memory, explained."""

import contextlib
from collections.abc import Iterator

import jax
from rich.console import Console

from lmx.config import Config
from lmx.errors import TrainingError
from lmx.paths import check_output
from lmx.planning.plan import make_plan
from lmx.planning.program import OUT_OF_MEMORY, as_it_runs
from lmx.planning.search import describe, first_that_fits, remedies, search
from lmx.planning.show import print_plan, print_shardings, seconds, verdict, write_html, write_json
from lmx.planning.targets import HERE, open_target


def plan(
    config: Config,
    devices: str,
    console: Console,
    json: str | None = None,
    html: str | None = None,
    shardings: bool = False,
    ranked: bool = False,
) -> None:
    """Plans ``config`` on ``devices``, prints what it found, and writes what is asked for.

    Args:
      devices: see :func:`lmx.planning.targets.open_target`.
      json, html: files to write.
      shardings: list every parameter's place.
      ranked: try mesh shapes and remat policies, and show the best.

    Raises:
      LmxError: the config does not fit the devices, or the compiler for them fails.
    """
    for path in (json, html):
        check_output(path)
    target = open_target(devices)
    config, notes = as_it_runs(config)
    if ranked:
        with console.status("compiling mesh shapes …") as status:
            found = search(config, target, told=status.update)
        for number, one in enumerate(found, start=1):
            step = seconds(one.times.step) if one.times and not one.program.error else ""
            console.print(f"{number:>3}. {step:>8}  {verdict(one)}  {describe(one)}", highlight=False, soft_wrap=True)
    with console.status(f"{'estimating' if target.lacks else 'compiling'} for {devices} …"):
        chosen = found[0] if ranked and found else make_plan(config, target)
    print_plan(chosen, console, notes)
    extra = [{"name": "note", "value": note, "unit": ""} for note in notes]
    if chosen.memory.fits is False:
        with console.status("looking for a change that fits …"):
            remedy = first_that_fits(config, target)
        if remedy is None:
            console.print("No change of remat, micro-batches, offload or mesh that was tried fits: use more devices.")
        else:
            change, better = remedy
            console.print(f"It fits with {change}: {verdict(better)}", highlight=False, soft_wrap=True)
            extra.append({"name": "remedy", "value": str(change), "unit": "flags"})
            extra.append({"name": "remedy/memory", "value": better.memory.total, "unit": "bytes"})
    if shardings:
        print_shardings(chosen, console)
    if json:
        write_json(json, chosen, extra, found if ranked else (), shardings)
    if html:
        write_html(html, chosen)
    for path in filter(None, (json, html)):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def explains_out_of_memory(config: Config, console: Console) -> Iterator[None]:
    """Answers an error of memory with the plan of the run on these devices, and a change that needs less.

    Raises:
      TrainingError: in place of what the runtime raised.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if not any(words in reason for words in OUT_OF_MEMORY):
            raise
        target = open_target(HERE)
        console.print("[bold red]out of memory[/]; what the run takes on these devices:")
        config, notes = as_it_runs(config)
        print_plan(make_plan(config, target), console, notes)
        change = next(remedies(config, target), None)
        advice = f"try {change}" if change else "use more devices, or a mesh that splits more of the model"
        raise TrainingError(
            f"the devices ran out of memory ({reason}); {advice}. What is saved stays. `lmx plan` tells what fits "
            "before a run begins."
        ) from error
