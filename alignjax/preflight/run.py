"""All steps of a run estimated; and where they do not fit, the levers that would make them."""

import dataclasses
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from alignjax.errors import InputError
from alignjax.preflight import chip as chips
from alignjax.preflight.chip import Chip
from alignjax.preflight.estimate import Estimate, estimate
from alignjax.preflight.flops import matmul_flops
from alignjax.preflight.steps import Vocabulary, decode_reads, host_columns, make_program
from alignjax.runs.build import completions_of, make_mesh, minibatches_of
from alignjax.runs.config import Config
from alignjax.system import sharding


class Place(NamedTuple):
  """Where a run is to run: the topology's name, how many slices of it, its chip (None: a CPU) and devices."""

  topology: str
  slices: int
  chip: Chip | None
  devices: Any


class Preflight(NamedTuple):
  """What the compiler says of a run.

  Attributes:
    place: where.
    mesh: sizes of its axes.
    parameters: of the model, whether trained or not.
    tokens: of an iteration's rows, padding included.
    useful_flops: of an update on each device, without what the backward pass recomputes of layers.
    reads: what a decode step of a rollout must read on each device, in bytes: "weights", "cache"; {} without.
    estimates: of each step.
    levers: (name, fits, largest total of a step in bytes) of what was tried because it did not fit.
  """

  place: Place
  mesh: dict[str, int]
  parameters: int
  tokens: int
  useful_flops: float
  reads: Mapping[str, int]
  estimates: list[Estimate]
  levers: list[tuple[str, bool, int]]

  @property
  def fits(self) -> bool:
    """Whether every step does."""
    return all(estimate.memory.fits for estimate in self.estimates)

  @property
  def mfu_ceiling(self) -> float:
    """The useful share of the chips' peak in an update that takes as long as its bound; 0 where that is not known."""
    update = next((e for e in self.estimates if e.step == "update"), None)
    if update is None or not update.seconds or not self.place.chip:
      return 0.0
    return self.useful_flops / (self.place.chip.flops * update.step_seconds)

  @property
  def decode(self) -> dict[str, float]:
    """A decode step by the compiler's cycles against the least time in which its bytes are read; {} where unknown."""
    rollout = next((e for e in self.estimates if e.step == "rollout" and e.totals and e.totals.body), None)
    chip = self.place.chip
    if rollout is None or not (chip and chip.clock):
      return {}
    floor, seconds = sum(self.reads.values()) / chip.hbm, rollout.totals.body.cycles / chip.clock
    bytes_ = {f"{name}_bytes": size for name, size in self.reads.items()}
    return bytes_ | {"floor_seconds": floor, "seconds": seconds, "ratio": seconds / floor}

  def to_dict(self) -> dict[str, Any]:
    """As JSON types."""
    return {
      "what": "compiler estimate, not a measurement",
      "compiler": chips.compiler(self.place.chip),
      "topology": self.place.topology,
      "slices": self.place.slices,
      "devices": len(self.place.devices),
      "chip": self.place.chip._asdict() if self.place.chip else None,
      "mesh": self.mesh,
      "parameters": self.parameters,
      "tokens_per_step": self.tokens,
      "fits": self.fits,
      "useful_flops": self.useful_flops,
      "mfu_ceiling": self.mfu_ceiling,
      **({"decode": self.decode} if self.decode else {}),
      "host_peak_bytes": _peak(),
      "steps": [estimate.to_dict() for estimate in self.estimates],
      "levers": [{"lever": name, "fits": fits, "largest_step_bytes": size} for name, fits, size in self.levers],
    }


def place_of(topology: str, slices: int = 1) -> Place:
  """The place of that name, "v5e:4x4" or "cpu:8", and so many slices of it, side by side: mesh.data is a multiple.

  Raises:
    InputError: no such topology.
  """
  return Place(topology, slices, *chips.devices(topology, slices))


def with_rows(config: Config, place: Place) -> Config:
  """The config with as many more rows as its mesh there divides."""
  mesh = make_mesh(config.mesh, place.devices)
  multiple = sharding.rows_multiple(mesh, config.optimizer.microbatches, minibatches_of(config), completions_of(config))
  return config.replace(data__rows=-(-config.data.rows // multiple) * multiple)


def with_levers(found: Preflight, config: Config, vocabulary: Vocabulary, tell=print) -> Preflight:
  """The same, and what becomes of the run with each lever: compiled one by one, each told when it is known."""
  tried = []
  for name, changed in levers(config, len(found.place.devices)):
    try:
      other = preflight(changed, vocabulary, found.place, lambda line: None, until_one_does_not_fit=True)
    except InputError as error:
      tell(f"lever {name}: {error}")
      continue
    tried.append((name, other.fits, max(e.memory.total for e in other.estimates)))
    tell(f"lever {name}: {'fits' if other.fits else 'does not fit'}, {tried[-1][2] / 2**30:.2f} GiB")
  return found._replace(levers=tried)


def preflight(
  config: Config, vocabulary: Vocabulary, place: Place, tell=print, until_one_does_not_fit: bool = False
) -> Preflight:
  """Compiles every step of a run for a place.

  Args:
    config: of the run; its data need not exist.
    vocabulary: of the tokenizer; what the model's sizes say goes first.
    place: of `place_of`.
    tell: takes a line of progress.
    until_one_does_not_fit: whether to stop there.

  Raises:
    InputError: the config, in that place.
  """
  mesh = make_mesh(config.mesh, place.devices)
  estimates = []
  # The abstract mesh: no operation may run on devices that are not there.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = make_program(config, vocabulary, mesh)
    without_kernels = make_program(_model(config, attention="xla"), vocabulary, mesh)
    batch = program.batch
    for step, plain in zip(program.steps, without_kernels.steps, strict=True):
      found, given = estimate(step, batch, program, place.chip, len(place.devices), plain)
      if given:
        batch = _rows_placed(given, mesh)
        if step.name == "rollout":
          batch |= host_columns(config, len(batch["tokens"]), mesh)
      estimates.append(found)
      tell(f"{step.name}: {found.memory.total / 2**30:.2f} GiB a device, compiled in {found.compile_seconds:.0f} s")
      if until_one_does_not_fit and not found.memory.fits:
        break
    useful = 0.0 if until_one_does_not_fit else _useful_flops(config, vocabulary, mesh, batch, place)
    reads = decode_reads(config, program.model, mesh)
  parameters = program.model.num_params()
  return Preflight(place, dict(mesh.shape), parameters, program.tokens, useful, reads, estimates, levers=[])


def _rows_placed(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """The batch with a layout where a step that could not be compiled gave none: rows as the data's."""
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  layout = lambda x: x.sharding or (rows if x.ndim else whole)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(x))
  return jax.tree.map(place, batch)


def _useful_flops(config, vocabulary, mesh, batch, place) -> float:
  """Matmuls of an update on each device where no layer is recomputed."""
  plain = _model(config, remat="none", attention="xla")
  update = next(step for step in make_program(plain, vocabulary, mesh).steps if step.name == "update")
  return matmul_flops(update.function.trace(*update.arguments(batch)).jaxpr.jaxpr) / len(place.devices)


def _model(config: Config, **changes) -> Config:
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _peak() -> int:
  """Bytes of memory that this process has taken at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def levers(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
  """What a run that does not fit may change, the cheapest first, each by itself: a name and the changed config."""
  model, data, mesh = config.model, config.data, config.mesh
  shards = devices // (mesh.tensor * mesh.sequence)
  if model.remat not in ("full", "offload"):
    yield "model.remat=full", config.replace(model__remat="full")
  if model.dtype == "float32":
    yield "model.dtype=bfloat16 and model.remat=full", config.replace(model__dtype="bfloat16", model__remat="full")
  if model.remat != "offload":
    yield "model.remat=offload", config.replace(model__remat="offload")
  if config.optimizer.keeps_moments and not config.optimizer.offload and not model.module:
    yield "optimizer.offload=True", config.replace(optimizer__offload=True)
  for times in (2, 4):
    parts = config.optimizer.microbatches * times
    if data.rows % (parts * shards) == 0:
      yield f"optimizer.microbatches={parts}", config.replace(optimizer__microbatches=parts)
  if config.algorithm.name in ("preference", "unpaired") and not config.run.reference_cache and not config.lora.rank:
    yield "run.reference_cache=DIR", config.replace(run__reference_cache="cache")
  tensor = mesh.tensor * 4
  if devices % tensor == 0 and devices > tensor and model.kv_heads % tensor == 0:
    yield f"mesh.tensor={tensor}", config.replace(mesh__fsdp=-1, mesh__tensor=tensor)
  if config.optimizer.name == "adamw":
    yield "optimizer.name=lion (one moment)", config.replace(optimizer__name="lion")
  if not config.lora.rank and config.algorithm.name not in ("process_reward",):
    yield "lora.rank=16, lora.base=bfloat16", config.replace(lora__rank=16, lora__base="bfloat16")


def to_json(found: Preflight) -> str:
  """As the text of a file."""
  return json.dumps(found.to_dict(), indent=2) + "\n"
