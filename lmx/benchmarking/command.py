"""``lmx bench``: runs a suite, prints its table and writes what is asked for."""

import importlib.util
import os
from pathlib import Path

from rich.console import Console

from lmx.benchmarking.cases import SUITES, SYSTEMS, Case, cases
from lmx.benchmarking.measure import matmul_peak, measure, systems
from lmx.benchmarking.show import Results, machine, print_table, write_html
from lmx.errors import ConfigError, LmxError
from lmx.paths import check_output, check_output_folder

BUSY = 0.25  # load of a core, from which another's work shows in what is measured


def bench(
    suite: str | None,
    console: Console,
    json: str | None = None,
    html: str | None = None,
    only: str = "",
    profile: str | None = None,
) -> Results:
    """Measures a suite's cases, one after the other.

    Args:
      suite: "cpu" or "gpu"; none: what this machine has. "gpu" without one runs at small sizes, to be tried out.
      json, html: files to write; the first after every case, so that a long run leaves what it has.
      only: a part of the names of the cases to run, in whatever case; all by default.
      profile: a folder for traces of lmx's work, of which the operations that cost most are printed.

    Raises:
      LmxError: there is no such suite or case, or the peers are not installed.
    """
    for path in (json, html):
        check_output(path)
    check_output_folder(profile)
    _chosen(suite, suite, only)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise LmxError(f"lmx bench needs {' and '.join(missing)} to compare with: pip install 'lmx[bench]'.")
    load = os.getloadavg()[0]
    with systems(SYSTEMS) as workers, console.status("starting") as status:
        about = {name: value for worker in workers.values() for name, value in worker.ask("about").items()}
        platform = "cpu" if about["platform"] == "cpu" else "gpu"
        suite = suite or platform
        if (suite, platform) == ("cpu", "gpu"):
            raise ConfigError("--suite cpu measures the processor, and there is a GPU: set JAX_PLATFORMS=cpu.")
        chosen = _chosen(suite, platform, only)
        about["load before"] = f"{load:.1f}"
        if suite != platform:
            about["no GPU here"] = "the suite runs at small sizes, and its figures mean nothing"
        _tell_of_doubts(about, load, console)
        results = Results(suite, machine(about), matmul_peak(workers, platform))
        try:
            for case in chosen:
                found = measure(suite, platform, case, workers, status.update, Path(profile) if profile else None)
                results.measured.append(found)
                if json:
                    results.write_json(json)
        finally:  # what there is, after Ctrl-C as well
            print_table(results, console)
    for found in results.measured:
        for name, seconds in found.operations.items():
            line = f"{found.case.name}: {1e3 * seconds:9.2f} ms  {name}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if html:
        write_html(html, results)
    for path in filter(None, (json, html)):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return results


def _tell_of_doubts(about: dict[str, str], load: float, console: Console) -> None:
    """Says what the figures will be worth, if it is less than it should be."""
    if why := about.get("no GPU here"):
        console.print(f"[yellow]no GPU here[/]: {why}")
    if load > int(about["cores"]) * BUSY:
        console.print(
            f"[yellow]this machine was busy[/] lately (load {load:.1f}, {about['cores']} cores); if that goes on, "
            "PyTorch's threads will wait for each other far longer than lmx's, and ratios mean little"
        )


def _chosen(suite: str | None, platform: str | None, only: str) -> list[Case]:
    """The cases of a suite, of all of them as long as none is named, with ``only`` in their names."""
    known = [case for name in ([suite] if suite else SUITES) for case in cases(name, platform or name)]
    chosen = [case for case in known if only.lower() in case.name]
    if not chosen:
        names = "; ".join(case.name for case in known)
        raise ConfigError(f"--only {only!r}: no case of {suite or 'any suite'} has that in its name: {names}.")
    return chosen
