"""The loop: from a config and a workdir to a trained model, whatever interrupts it."""

import dataclasses
import functools
import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lmx.config import Config
from lmx.errors import TrainingError
from lmx.parallel.compile import axis_name, compile_step
from lmx.parallel.hardware import hardware_of
from lmx.parallel.processes import barrier, first_alone, gather, host_share
from lmx.parallel.sharding import moved_dimensions, put_batch
from lmx.parallel.watchdog import Watchdog
from lmx.paths import user_path
from lmx.training.checkpoints import Checkpoints
from lmx.training.experiment import Experiment, build
from lmx.training.initial import check_init_from, initial_state
from lmx.training.lock import WorkdirLock
from lmx.training.metrics import MetricsWriter, Throughput
from lmx.training.optimizers import eval_params, make_schedule
from lmx.training.pending import Pending, means
from lmx.training.profiling import FOLDER, Profiler
from lmx.training.progress import Progress, tell_reader
from lmx.training.report import write_report
from lmx.training.samples import sample_prompt, write_samples
from lmx.training.state import TrainState
from lmx.training.step import SKIPPED, make_eval_step, make_train_step
from lmx.training.stopping import Interrupt, has_converged
from lmx.training.workdir import check_same_experiment, checked_data_files, explains_full_disk, write_config

ADVICE = (
    "Try a lower optimizer.learning_rate, more optimizer.warmup_steps, a smaller optimizer.clip_norm, or "
    "model.dtype='float32'; a look at the data near that step may help too."
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How training ended.

    Attributes:
      step: optimizer steps done in all.
      metrics: the newest value of every metric.
      ended: "complete", "converged", or the name of the signal that stopped it.
    """

    step: int
    metrics: dict[str, float]
    ended: str


def train(
    config: Config,
    workdir: str | Path,
    *,
    console: Console | None = None,
    devices: Any = None,
    profile: bool = False,
) -> Result:
    """Trains, or goes on with the run that ``workdir`` holds.

    Args:
      config: the experiment.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/, tokenizer/, samples.txt, report.html.
      console: where progress is printed.
      devices: what to compute on; none is every device there is.
      profile: trace a few steps, into ``workdir/profile/``, and print what costs most.

    Raises:
      LmxError: bad input (before anything is written), a workdir with another run, or a loss that is
        no longer finite.
    """
    console = console or Console()
    workdir = user_path(workdir).resolve()
    check_same_experiment(workdir, config)
    experiment = build(config, workdir, console, devices)
    batches = experiment.train_batches()
    experiment.eval_batches()  # a held-out source that can't be opened is an error now, not at the first evaluation
    sample_prompt(experiment)
    if not (workdir / "config.json").is_file():  # a run that has begun does not need what it began from
        check_init_from(experiment)
    barrier("built")  # nobody reads the workdir while it is being written
    with explains_full_disk(workdir), WorkdirLock(workdir):
        first_alone(lambda: _write_beginning(experiment, workdir, console))
        _print_header(experiment, workdir, console)
        with (
            Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints,
            Interrupt() as interrupt,
            Watchdog(config.train.stalled_after, workdir) as watchdog,
        ):
            run = _Run(experiment, workdir, batches, checkpoints, console, watchdog, profile)
            try:
                return run.finish(run.loop(interrupt))
            finally:
                run.close()


def _write_beginning(experiment: Experiment, workdir: Path, console: Console) -> None:
    """What stands in a workdir before the first step, once the data is known to be that of the run."""
    files = [path for source in experiment.sources.values() for path in source.files]
    tell = functools.partial(tell_reader, console)
    data_files = checked_data_files(workdir, files, experiment.config.data.on_change, tell)
    experiment.tokenizer.save(workdir / "tokenizer")
    write_config(workdir, experiment.config, experiment.asked, experiment.num_params()[0], data_files)


class _Run:
    """The moving parts of a run: state, position, and what is waiting to be logged."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        batches: Any,
        checkpoints: Checkpoints,
        console: Console,
        watchdog: Watchdog,
        profile: bool,
    ):
        config = experiment.config
        self.experiment, self.config, self.workdir = experiment, config, workdir
        self.batches, self.checkpoints, self.console, self.watchdog = batches, checkpoints, console, watchdog
        optimizer = experiment.optimizer()
        self.state, resumed = initial_state(experiment, optimizer, checkpoints, console)
        if resumed is not None:
            batches.set_state(resumed.position)
        self.pending = Pending(resumed.pending if resumed else ())
        self.step = int(self.state.step)
        self.train_step = compiled_train_step(experiment, optimizer, self.state)
        if profile:
            self.train_step = Profiler(self.train_step, workdir / FOLDER, console)
        self.eval_step = compiled_eval_step(experiment, jax.tree.map(lambda x: x.sharding, self.state.params))
        self.writer = MetricsWriter(workdir, resume_step=self.step)
        self.eval_losses = [line["eval/loss"] for line in self.writer.resumed if "eval/loss" in line]
        self.latest = {name: value for line in self.writer.resumed for name, value in line.items() if name != "step"}
        self.skipped = sum(int(line.get("train/skipped", 0)) for line in self.writer.resumed)
        self.throughput = throughput(experiment)
        self.tokens = 0  # of this process since the last line
        self.compiled: set[str] = set()

    def loop(self, interrupt: Interrupt) -> str:
        """Trains until something ends it; returns what did."""
        train = self.config.train
        if self.step >= train.steps:
            self.console.print(
                f"[bold green]complete[/]: {self.workdir} has done all of its {train.steps:,} steps", soft_wrap=True
            )
            return "complete"
        if self._converged():
            self.console.print(
                f"[bold green]converged[/]: {self.workdir} stopped early, as train.early_stop_evals asks",
                soft_wrap=True,
            )
            return "converged"
        with Progress(self.console, train.steps, self.step) as progress:
            if self.step == 0:  # what an untrained model scores, for the curve to start from
                self._write(self._evaluate(progress))
            while True:
                self._advance()
                evaluating = self.step % train.eval_every == 0 or self.step >= train.steps
                stopped = self._agreed(interrupt.signal, evaluating)  # read once: a later signal is the next step's
                metrics = {}
                if self.step % train.log_every == 0 or evaluating:
                    metrics = self._fetch()
                progress.update(self.step, metrics or None)
                if evaluating:
                    metrics |= self._evaluate(progress)
                if metrics:
                    self._write(metrics)
                converged = self._converged()
                done = self.step >= train.steps or converged
                if self.step % train.checkpoint_every == 0 or done or stopped is not None:
                    self._save(metrics)
                if done:
                    return "converged" if converged else "complete"
                if stopped is not None:
                    return stopped.name

    def finish(self, ended: str) -> Result:
        """Waits for what is being written, and says where everything is."""
        self.checkpoints.wait()
        if jax.process_index() == 0:
            report = write_report(self.workdir)
            self.console.print(f"[bold]{ended}[/] at step {self.step:,}; report: {report}", soft_wrap=True)
        if ended.startswith("SIG"):
            self.console.print(
                "Everything up to this step is saved; run the same command again to go on.", soft_wrap=True
            )
        return Result(self.step, self.latest, ended)

    def _converged(self) -> bool:
        return has_converged(self.eval_losses, self.config.train.early_stop_evals, self.config.train.early_stop_delta)

    def _advance(self) -> None:
        """One step; returns as soon as the device has it to do."""
        with self.throughput.waiting():
            batch = next(self.batches)
        self.tokens += sum(int((batch[name] > 0).sum()) for name in batch if name.endswith("segments"))
        self._compiles("step")
        self.state, metrics = self.train_step(self.state, put_batch(batch, self.experiment.mesh))
        self.pending.add(metrics)
        self.step += 1
        self.watchdog.beat(self.step)

    def _compiles(self, what: str) -> None:
        """Lets the watchdog rest where ``what`` comes for the first time: it is compiled first."""
        if what not in self.compiled:
            self.compiled.add(what)
            self.watchdog.rest()

    def close(self) -> None:
        """Ends what writes files."""
        if isinstance(self.train_step, Profiler):
            self.train_step.close()
        self.writer.close()

    def _agreed(self, stopped: signal.Signals | None, evaluating: bool) -> signal.Signals | None:
        """The signal that stops the run after this step. Several processes must stop at the same one, so they ask
        each other when metrics are fetched and they wait for the devices anyhow."""
        if jax.process_count() == 1:
            return stopped
        if not evaluating and self.step % self.config.train.log_every:
            return None
        heard = gather([stopped or 0])
        return signal.Signals(heard.max()) if heard.any() else None

    def _fetch(self) -> dict[str, float]:
        """Means since the last line, with the speed; a value that is not finite ends the run."""
        self._check_pending()
        copies = jax.process_count() // host_share(self.experiment.mesh)[1]  # of every row, over the processes
        self.throughput.count(int(gather([self.tokens]).sum()) // copies)
        self.tokens = 0
        line = self.pending.take()
        self.skipped += int(line.get(SKIPPED, 0))
        return {f"train/{name}": value for name, value in line.items()} | self.throughput.read()

    def _write(self, metrics: dict[str, float]) -> None:
        self.writer.write(self.step, metrics)
        self.latest |= metrics

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        self.throughput.pause()
        self._compiles("evaluation")
        beat = functools.partial(self.watchdog.beat, self.step)
        metrics = evaluate(self.experiment, self.eval_step, eval_params(self.state), beat=beat)
        self.eval_losses.append(metrics["eval/loss"])
        progress.evaluated(self.step, metrics)
        if jax.process_count() == 1:  # decoding computes where the parameters are, and here that is not all of them
            write_samples(self.workdir, self.step, self.experiment, self.state)
        self.throughput.resume()
        return metrics

    def _save(self, metrics: dict[str, float]) -> None:
        """Saves, once everything up to here is known to be finite."""
        self._check_pending()  # waits for the device, which is time of the steps
        self.throughput.pause()
        self.writer.sync()
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), metrics, self.pending.saved())
        self.watchdog.beat(self.step)
        self.throughput.resume()

    def _check_pending(self) -> None:
        """Raises where the steps since the last line are not what a run can go on from."""
        if (broken := self.pending.broken(self.step)) is not None:
            raise self._diverged(*broken)
        skipped, most = self.skipped + self.pending.skipped(), self.config.train.max_skipped
        if skipped > most:
            raise TrainingError(
                f"{skipped} batches up to step {self.step} were skipped: their loss or gradients were not finite; "
                f"train.max_skipped is {most}. {ADVICE}"
            )

    def _diverged(self, step: int, broken: list[str]) -> TrainingError:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        kept = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
        return TrainingError(
            f"{', '.join(broken)} of step {step} is not finite. {kept}, in {self.checkpoints.folder}. {ADVICE} "
            "train.on_nan='skip' leaves out single batches like this one."
        )


def evaluate(
    experiment: Experiment,
    eval_step: Any,
    params: Any,
    source: str | None = None,
    beat: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Means over the held-out data, each row once: ``eval/loss`` (nats) and the objective's other terms.

    Of a mixture also ``eval/loss/NAME`` and the other terms of each source, over its own rows.

    Args:
      eval_step: of :func:`compiled_eval_step`.
      params: the parameters to score, on the mesh.
      source: other data than the config's ``data.eval``.
      beat: called after every batch.
    """

    def score(batch: dict) -> Any:
        scored = eval_step(params, put_batch(batch, experiment.mesh))
        beat()
        return scored

    terms, limit = {}, experiment.config.eval.max_batches or None
    for name, batches in experiment.eval_batches_by_source(source).items():
        terms[name] = jax.device_get([score(batch) for batch in itertools.islice(batches, limit)])
    found = {f"eval/{term}": value for term, value in means(sum(terms.values(), [])).items()}
    for name, own in terms.items() if len(terms) > 1 else ():
        found |= {f"eval/{term}/{name}": value for term, value in means(own).items()}
    return found


def compiled_train_step(experiment: Experiment, optimizer: Any, state: TrainState) -> Any:
    """The train step, compiled by ``train.strategy`` for the layout of ``state``."""
    config = experiment.config
    step = make_train_step(
        experiment.model,
        experiment.objective,
        optimizer,
        make_schedule(config.optimizer, config.train.steps),
        trainable=experiment.trainable(),
        microbatches=experiment.split.microbatches,
        seed=config.seed,
        axis_name=axis_name(config.train.strategy),
        offload=config.optimizer.offload,
        skip_nonfinite=config.train.on_nan == "skip",
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return compile_step(step, config.train.strategy, experiment.layout, shardings, updates=True)


def compiled_eval_step(experiment: Experiment, shardings: Any) -> Any:
    """The evaluation step, compiled by ``train.strategy`` for parameters that lie by ``shardings``."""
    strategy = experiment.config.train.strategy
    step = make_eval_step(experiment.model, experiment.objective, axis_name(strategy))
    return compile_step(step, strategy, experiment.layout, shardings, updates=False)


def throughput(experiment: Experiment) -> Throughput:
    """The meter of this run's speed; it knows utilization where the device's peak is known."""
    tokens, flops = experiment.row_tokens_and_flops()
    hardware = hardware_of(experiment.mesh.devices.flat[0])
    return Throughput(3 * flops / tokens, None if hardware is None else hardware.peak_flops * experiment.mesh.size)


def _print_header(experiment: Experiment, workdir: Path, console: Console) -> None:
    """What is about to run, and how: nothing is chosen silently."""
    config, mesh = experiment.config, experiment.mesh
    total, trained = experiment.num_params()
    number = f"{total:,} parameters" + (f" ({trained:,} of them trained)" if trained < total else "")
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    lines = [
        ("workdir", str(workdir)),
        ("model", f"{number}, {config.model.architecture}, objective {config.objective.name}"),
        ("vocabulary", f"{config.model.vocab_size:,} ({type(experiment.tokenizer).__name__})"),
        ("devices", f"{mesh.size} x {device.device_kind} ({axes}), strategy {config.train.strategy}"),
        ("batch", str(experiment.split)),
        *experiment.forms().items(),
    ]
    if jax.process_count() > 1 and sample_prompt(experiment):
        lines.append(("samples", "none: they are written in runs of one process alone"))
    lines += [("data", line) for line in experiment.describe_data()]
    for name, value in lines:
        console.print(f"[bold]{name:>11}[/]  {value}", highlight=False, soft_wrap=True)
    for warning in moved_dimensions(experiment.abstract_params, experiment.layout):
        console.print(f"[yellow]{'sharding':>11}[/]  {warning}", highlight=False, soft_wrap=True)
