"""Which change would make a run fit, and which mesh would make it fast: found by planning them."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from lmx.config import Config, to_dict
from lmx.errors import LmxError
from lmx.model_config import layer_period
from lmx.parallel.mesh import AXES
from lmx.parallel.pipeline import MICROBATCHES_A_STAGE
from lmx.planning.estimates import estimated_collectives
from lmx.planning.plan import Plan, bandwidth, count_parts, make_plan, tokens_and_flops
from lmx.planning.program import abstract_experiment
from lmx.planning.targets import Target

MOST_TENSOR = 16  # beyond, a device's part of a matrix product is too thin to be worth its collectives
CANDIDATES = 6  # compiled, of all that are ranked
STATE_BYTES = 16  # of a parameter, its gradient and AdamW's two moments, in float32


@dataclasses.dataclass(frozen=True)
class Change:
    """A way to run the same experiment: the same batch, the same curve."""

    fields: dict[str, object]
    config: Config

    def __str__(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())


def first_that_fits(config: Config, target: Target) -> tuple[Change, Plan] | None:
    """The least change with which the run fits, verified by compiling it; none where none of those tried does.

    Tried in this order: recomputing all of a layer and fewer rows at once, each on top of the ones before; on top of
    these the optimizer's state in the hosts' memory; all devices along fsdp, or along fsdp and tensor; then both.
    """
    for change in remedies(config, target):
        try:
            plan = make_plan(change.config, target)
        except LmxError:
            continue
        if plan.memory.fits:
            return change, plan
    return None


def remedies(config: Config, target: Target) -> Iterator[Change]:
    """Changes that lower memory, the cheapest first."""
    fields: dict[str, object] = {}
    experiment = abstract_experiment(config, target)
    if config.model.remat != "full":
        fields["model.remat"] = "full"
        yield _changed(config, fields)
    rows = experiment.split.rows_per_device
    smaller = [n for n in _divisors(rows) if n < rows and n >= experiment.mesh.shape["stage"]]
    for n in sorted({smaller[len(smaller) // 2], smaller[0]} if smaller else (), reverse=True):
        fields["train.max_rows_per_device"] = n
        yield _changed(config, fields)
    offload = {"optimizer.offload": True}
    offloads = not config.optimizer.offload and target.hardware is not None
    if offloads:
        yield _changed(config, fields | offload)
    devices, batch = len(target.devices), config.train.global_batch_size
    split = []
    for tensor in (1, 2, 4, 8, 16):
        fsdp = devices // tensor
        if tensor * fsdp == devices and batch % fsdp == 0 and tensor <= max(1, config.model.num_heads):
            split.append(_mesh_fields(dict.fromkeys(AXES, 1) | {"fsdp": fsdp, "tensor": tensor}))
    for sizes in split:
        yield _changed(config, fields | sizes)
    for sizes in split if offloads else ():
        yield _changed(config, fields | offload | sizes)


def search(
    config: Config,
    target: Target,
    remats: tuple[str, ...] = ("none", "dots_no_batch", "full"),
    told: Callable[[str], None] = lambda what: None,
) -> list[Plan]:
    """Mesh shapes and remat policies, compiled and ranked: what fits first, then the shortest step.

    Every mesh that the model's and the batch's sizes allow is ranked by its estimated step; the best few are compiled
    with each policy.

    Args:
      told: is given what is being compiled.
    """
    plans = []
    for sizes in ranked_meshes(config, target)[:CANDIDATES]:
        for remat in remats:
            change = _changed(config, _mesh_fields(sizes) | {"model.remat": remat})
            told(f"{change} …")
            try:
                plans.append(make_plan(change.config, target))
            except LmxError:
                continue
    return sorted(plans, key=lambda plan: (not plan.memory.fits, plan.times.step if plan.times else 0.0))


def ranked_meshes(config: Config, target: Target) -> list[dict[str, int]]:
    """The meshes that are possible: first those whose devices have room for their part of the state, and among these
    the one with the shortest estimated step."""
    found = list(meshes(config, len(target.devices)))
    if not found:
        return []
    experiment = abstract_experiment(_changed(config, _mesh_fields(found[0])).config, target)
    parameters, (tokens, flops) = count_parts(experiment.abstract_params), tokens_and_flops(experiment)
    hardware = target.hardware

    def estimate(sizes: dict[str, int]) -> float:
        """Seconds, or where the devices' speeds are not known, bytes sent."""
        rows = config.train.global_batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        parts = math.ceil(rows / (config.train.max_rows_per_device or rows))
        sent = estimated_collectives(experiment.config, parameters, sizes, tokens, parts)
        if hardware is None:
            step = sum(one.sent for one in sent)
        else:
            mesh = SimpleNamespace(axis_names=AXES, shape=sizes)
            network = sum(one.sent / bandwidth(one, mesh, hardware) for one in sent)
            step = max(network, 3 * flops * tokens / (len(target.devices) * hardware.peak_flops))
        stages = sizes["stage"]
        return step * (1 + (stages - 1) / (MICROBATCHES_A_STAGE * stages))

    def has_room(sizes: dict[str, int]) -> bool:
        state = STATE_BYTES * sum(parameters.values()) * sizes["data"] / len(target.devices)
        return hardware is None or state <= hardware.memory

    return sorted(found, key=lambda sizes: (not has_room(sizes), estimate(sizes)))


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Every product of data, fsdp, tensor, expert and stage that the sizes of model and batch and the strategy allow.

    The axis of the sequence is not among them: it is for rows that are too long for a device, whatever that costs.
    """
    if config.train.strategy != "pjit":
        yield dict.fromkeys(AXES, 1) | {"data": devices}
        return
    model, batch = config.model, config.train.global_batch_size
    groups = model.num_layers // layer_period(model) if model.scan_layers else 1
    for tensor in (n for n in _divisors(devices) if n <= MOST_TENSOR and model.num_heads % n == 0):
        for stage in (n for n in _divisors(devices // tensor) if groups % n == 0):
            for expert in _divisors(devices // tensor // stage):
                if expert > 1 and (model.experts.num_experts == 0 or model.experts.num_experts % expert):
                    continue
                replicas = devices // tensor // stage // expert
                if batch % (replicas * expert * stage):
                    continue
                for data in _divisors(replicas):
                    sizes = {"data": data, "fsdp": replicas // data, "tensor": tensor, "expert": expert, "stage": stage}
                    yield dict.fromkeys(AXES, 1) | sizes


def _mesh_fields(sizes: dict[str, int]) -> dict[str, object]:
    return {f"mesh.{axis}": size for axis, size in sizes.items()}


def _changed(config: Config, fields: dict[str, object]) -> Change:
    sections: dict[str, dict] = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return Change(dict(fields), config.replace(**sections))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def describe(plan: Plan) -> str:
    """The mesh and policy of a plan, as flags."""
    sizes = {axis: size for axis, size in plan.program.experiment.mesh.shape.items()}
    fields = {f"mesh.{axis}": size for axis, size in sizes.items() if size > 1 or axis == "data"}
    return str(Change(fields | {"model.remat": to_dict(plan.config)["model"]["remat"]}, plan.config))
