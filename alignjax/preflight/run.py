"""The estimates of all steps of a run, and the levers that would make them fit if they do not."""

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
from alignjax.preflight.steps import Vocabulary, decode_reads, make_program, with_host_rewards
from alignjax.runs.build import completions_of, make_mesh, minibatches_of
from alignjax.runs.config import Config
from alignjax.system import sharding
from alignjax.types import Batch


class Place(NamedTuple):
  """The place of a run.

  Attributes:
    topology: its name.
    slices: their number.
    chip: of each device; None: a CPU.
    devices: all of them, in order; they need not be present.
  """

  topology: str
  slices: int
  chip: Chip | None
  devices: Any


class Preflight(NamedTuple):
  """The compiler's estimates of a run.

  Attributes:
    place: where it would run.
    mesh: the sizes of its axes.
    parameters: their number in the model, trained or not.
    tokens: of an iteration's rows, padding included.
    useful_flops: of an update on each device, without the layers that the backward pass recomputes.
    reads: bytes that a decode step of a rollout must read on each device: "weights", "cache"; {} without rollouts.
    estimates: of each step.
    levers: (name, fits, largest total of a step in bytes) of each lever that was tried because the run did not fit.
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
    """True if every step fits."""
    return all(estimate.memory.fits for estimate in self.estimates)

  @property
  def mfu_ceiling(self) -> float:
    """The useful share of the chips' peak in an update that takes as long as its bound; 0 if that is not known."""
    update = next((estimate for estimate in self.estimates if estimate.step == "update"), None)
    if update is None or not update.seconds or not self.place.chip:
      return 0.0
    return self.useful_flops / (self.place.chip.flops * update.step_seconds)

  @property
  def decode(self) -> dict[str, float]:
    """A decode step: the bytes that it reads, the least seconds for that, and its seconds by the compiler's cycles.

    {} if they are not known.
    """
    chip = self.place.chip
    rollouts = (estimate for estimate in self.estimates if estimate.step == "rollout")
    bodies = (estimate.totals.body for estimate in rollouts if estimate.totals)
    body = next(filter(None, bodies), None)
    if body is None or not (chip and chip.clock):
      return {}
    floor = sum(self.reads.values()) / chip.hbm
    seconds = body.cycles / chip.clock
    sizes = {f"{name}_bytes": size for name, size in self.reads.items()}
    return sizes | {"floor_seconds": floor, "seconds": seconds, "ratio": seconds / floor}

  def to_dict(self) -> dict[str, Any]:
    """Returns the estimates as JSON types."""
    record = {
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
    }
    if self.decode:
      record["decode"] = self.decode
    record["host_peak_bytes"] = _peak()
    record["steps"] = [estimate.to_dict() for estimate in self.estimates]
    record["levers"] = [{"lever": name, "fits": fits, "largest_step_bytes": size} for name, fits, size in self.levers]
    return record


def place_of(topology: str, slices: int = 1) -> Place:
  """Returns the place with that topology, "v5e:4x4" or "cpu:8", and so many slices of it.

  mesh.data must be a multiple of the slices. Like `chip.devices`, it makes JAX use CPUs alone in this process.

  Raises:
    InputError: there is no such topology.
  """
  return Place(topology, slices, *chips.devices(topology, slices))


def with_rows(config: Config, place: Place) -> Config:
  """Returns the config with its rows rounded up to the next number that the mesh of that place divides.

  Raises:
    InputError: the mesh does not cover the place's devices.
  """
  mesh = make_mesh(config.mesh, place.devices)
  multiple = sharding.rows_multiple(mesh, config.optimizer.microbatches, minibatches_of(config), completions_of(config))
  return config.replace({"data.rows": -(-config.data.rows // multiple) * multiple})


def with_levers(result: Preflight, config: Config, vocabulary: Vocabulary, tell=print) -> Preflight:
  """Returns the result with the outcome of each lever, compiled by itself; `tell` gets a line about it.

  A lever that the run cannot have is told, and left out of the result.

  Args:
    result: of `preflight`, for this config.
    config: of the run.
    vocabulary: as for `preflight`.
    tell: takes a line of text.
  """
  outcomes = []
  for name, changed in levers(config, len(result.place.devices)):
    try:
      trial = preflight(changed, vocabulary, result.place, lambda line: None, until_one_does_not_fit=True)
    except InputError as error:
      tell(f"lever {name}: {error}")
      continue
    largest = max(estimate.memory.total for estimate in trial.estimates)
    outcomes.append((name, trial.fits, largest))
    tell(f"lever {name}: {'fits' if trial.fits else 'does not fit'}, {largest / 2**30:.2f} GiB")
  return result._replace(levers=outcomes)


def preflight(
  config: Config, vocabulary: Vocabulary, place: Place, tell=print, until_one_does_not_fit: bool = False
) -> Preflight:
  """Compiles every step of a run for a place.

  Args:
    config: of the run; its data need not exist.
    vocabulary: of the tokenizer; the model's own size takes precedence.
    place: of `place_of`.
    tell: takes a line of progress.
    until_one_does_not_fit: True to stop after the first step that does not fit; `useful_flops` is 0 then.

  Raises:
    InputError: the config is invalid in that place, or the compiler fails.
  """
  mesh = make_mesh(config.mesh, place.devices)
  estimates = []
  # The abstract mesh: no operation may run on devices that are not present.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = make_program(config, vocabulary, mesh)
    without_kernels = make_program(_model(config, attention="xla"), vocabulary, mesh)
    batch = program.batch
    for step, plain in zip(program.steps, without_kernels.steps, strict=True):
      step_estimate, outputs = estimate(step, batch, program, place.chip, len(place.devices), plain)
      if outputs:
        batch = _rows_placed(outputs, mesh)
        if step.name == "rollout":
          batch = with_host_rewards(config, batch, mesh)
      estimates.append(step_estimate)
      memory = step_estimate.memory
      tell(f"{step.name}: {memory.total / 2**30:.2f} GiB a device, compiled in {step_estimate.compile_seconds:.0f} s")
      if until_one_does_not_fit and not memory.fits:
        break
    useful_flops = 0.0
    if not until_one_does_not_fit:
      useful_flops = _useful_flops(config, vocabulary, mesh, batch, place)
    reads = decode_reads(config, program.model, mesh)
  parameters = program.model.num_params()
  return Preflight(place, dict(mesh.shape), parameters, program.tokens, useful_flops, reads, estimates, levers=[])


def _rows_placed(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
  """Gives an abstract batch shardings; if a step that could not be compiled gave none, the rows are split as data."""

  def placed(part, default):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), part)

  whole = sharding.replicated(mesh)
  return Batch(
    placed(batch.rows, sharding.batch_sharding(mesh)), placed(batch.totals, whole), placed(batch.running, whole)
  )


def _useful_flops(config, vocabulary, mesh, batch, place) -> float:
  """Counts the FLOPs of the matmuls of an update on each device, if no layer is recomputed."""
  plain = _model(config, remat="none", attention="xla")
  update = next(step for step in make_program(plain, vocabulary, mesh).steps if step.name == "update")
  return matmul_flops(update.function.trace(*update.arguments(batch)).jaxpr.jaxpr) / len(place.devices)


def _model(config: Config, **changes) -> Config:
  """Returns the config with these changes of its model."""
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _peak() -> int:
  """Returns the peak memory of this process in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if sys.platform == "darwin":
    return peak
  return peak * 1024


def levers(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
  """Yields the changes that could make a run fit, the cheapest first: a name and the changed config of each.

  Args:
    config: of the run; a lever that it has pulled already is left out.
    devices: their number.
  """
  model = config.model
  mesh = config.mesh
  shards = devices // (mesh.tensor * mesh.sequence)
  if model.remat not in ("full", "offload"):
    yield "model.remat=full", config.replace({"model.remat": "full"})
  if model.dtype == "float32":
    yield (
      "model.dtype=bfloat16 and model.remat=full",
      config.replace({"model.dtype": "bfloat16", "model.remat": "full"}),
    )
  if model.remat != "offload":
    yield "model.remat=offload", config.replace({"model.remat": "offload"})
  if config.optimizer.keeps_moments and not config.optimizer.offload and not model.module:
    yield "optimizer.offload=True", config.replace({"optimizer.offload": True})
  for times in (2, 4):
    parts = config.optimizer.microbatches * times
    if config.data.rows % (parts * shards) == 0:
      yield f"optimizer.microbatches={parts}", config.replace({"optimizer.microbatches": parts})
  if config.algorithm.name in ("preference", "unpaired") and not config.run.reference_cache and not config.lora.rank:
    yield "run.reference_cache=DIR", config.replace({"run.reference_cache": "cache"})
  tensor = mesh.tensor * 4
  if devices % tensor == 0 and devices > tensor and model.kv_heads % tensor == 0:
    yield f"mesh.tensor={tensor}", config.replace({"mesh.fsdp": -1, "mesh.tensor": tensor})
  if config.optimizer.name == "adamw":
    yield "optimizer.name=lion (one moment)", config.replace({"optimizer.name": "lion"})
  if not config.lora.rank and config.algorithm.name not in ("process_reward",):
    yield "lora.rank=16, lora.base=bfloat16", config.replace({"lora.rank": 16, "lora.base": "bfloat16"})


def to_json(result: Preflight) -> str:
  """Returns the text of the JSON file."""
  return json.dumps(result.to_dict(), indent=2) + "\n"
