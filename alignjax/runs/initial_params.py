"""The parameters that a run begins with, fresh or another run's, and the frozen base under its LoRA factors."""

import dataclasses
from typing import Any

import jax
from etils import epath

from alignjax.algorithms import Algorithm
from alignjax.data.tokenizer import Tokenizer, check_ids
from alignjax.errors import InputError
from alignjax.model import quantised
from alignjax.model.decoder import Model
from alignjax.model.huggingface import peft, weights
from alignjax.runs.build import make_model
from alignjax.runs.checkpoint import load_metadata, load_params
from alignjax.runs.config import Config
from alignjax.runs.workdir import check_tokenizer, whole_run
from alignjax.system import hub
from alignjax.system.fingerprint import digest, table
from alignjax.types import Params


def check_sources(workdir: epath.Path, config: Config) -> None:
  """Raises InputError if a run that is new in `workdir` begins with another run that does not exist.

  Only the runs of run.init and run.reference are checked; a Hugging Face folder is not.
  """
  if (workdir / "config.json").exists():
    return
  sources = {"run.init": config.run.init}
  if not config.lora.rank:  # with factors it is refused, whether it is there or not
    sources["run.reference"] = config.run.reference
  for key, source in sources.items():
    if source and not hub.is_folder(source):
      load_metadata(whole_run(key, source) / "checkpoints")


def starting_params(
  config: Config, model: Model, tokenizer: Tokenizer, abstract: Params, step: int | None = None
) -> tuple[Params, int]:
  """Loads or makes the parameters that a run begins with; returns them and the step they come from (0 if fresh).

  They are those of the run that `run.init` names, at `step` (its result if None), or those of that Hugging Face folder.
  Whatever it lacks, such as a head, a critic or LoRA factors, is fresh. Factors, and a head, may come from a PEFT
  adapter instead (`lora.init`). The base is as stored: `starting_point` converts it to the form `lora.base`.

  Args:
    config: of the run.
    model, tokenizer: of the run.
    abstract: the wanted parameters, with shardings.
    step: of the run that `run.init` names.

  Raises:
    InputError: no such run, or one of another model; a LoRA run, whose checkpoints lack the base.
  """
  loaded = {}
  loaded_step = 0
  without_factors = {name: tree for name, tree in abstract.items() if name != "lora"}
  optional = tuple(name for name in ("score", "value") if name in abstract)
  if hub.is_folder(config.run.init):
    check_ids(tokenizer, config.run.init)
    loaded = weights.load(config.run.init, model, without_factors, optional)
  elif config.run.init:
    source = whole_run("run.init", config.run.init) / "checkpoints"
    check_tokenizer(load_metadata(source, step), tokenizer, config)
    loaded, metadata = load_params(source, without_factors, step=step, fresh=optional)
    loaded_step = metadata["step"]
  if config.lora.init:
    loaded |= peft.load_adapter(config.lora, abstract)
  missing = [name for name in abstract if name not in loaded]
  shardings = jax.tree.map(lambda x: x.sharding, {name: abstract[name] for name in missing})

  def init(key):
    return {name: tree for name, tree in model.init(key).items() if name in missing}

  fresh = jax.jit(init, out_shardings=shardings)(jax.random.key(config.run.seed))
  return loaded | fresh, loaded_step


def starting_point(
  config: Config, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Params, Params, dict[str, Any]]:
  """Returns (trained params, frozen base in the form `lora.base`, base record for the checkpoints).

  The record says where the base is from, at which step, and the digest of its form and arrays. The digest is that of
  the arrays as stored, because quantised codes may differ by the rounding of the machine that made them. Base and
  record are {} if the whole model is trained.

  Args:
    config: of the run.
    model, tokenizer, mesh: of the run.
    step: of the run that `run.init` names; its result if None.

  Raises:
    InputError: as `starting_params`.
  """
  as_stored = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=""))
  stored = make_model(as_stored, tokenizer)
  params, loaded_step = starting_params(as_stored, stored, tokenizer, stored.abstract(mesh), step)
  params, held = stored.split(params)
  if not held:
    return params, {}, {}
  form = config.lora.base
  described: dict[str, Any] = table({"params": held})
  if form:
    described = {"form": form, "arrays": described}
  record = {"init": config.run.init, "step": loaded_step, "digest": digest(described)}
  if form:
    shardings = jax.tree.map(lambda x: x.sharding, model.split(model.abstract(mesh))[1])
    weights = stored.split(stored.weights())[1]
    held = jax.jit(lambda held: quantised.hold(held, weights, form), out_shardings=shardings)(held)
  return params, held, record


def load_base(
  config: Config, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, metadata: dict[str, Any]
) -> Params:
  """Reads and verifies the base under a run's LoRA factors; {} if the whole model is trained.

  The base is stored once, in the run that `run.init` names. Without `run.init`, it is made again from run.seed.

  Args:
    config: of the run.
    model, tokenizer, mesh: of the run.
    metadata: of the run's checkpoint, with the record of the base.

  Raises:
    InputError: the base does not exist any more, is damaged, or is not the one that the checkpoint was trained on.
  """
  if not model.trained:
    return {}
  record = metadata["base"]
  step = None
  place = f"run.seed={config.run.seed}"
  if config.run.init:
    step = record["step"]
    place = f"{config.run.init}, step {step}"
  without_adapter = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init=""))
  _, held, now = starting_point(without_adapter, model, tokenizer, mesh, step)
  if now["digest"] != record["digest"]:
    raise InputError(
      f"run.init: the base ({place}) is not the one under these LoRA factors (digest {now['digest'][:12]}, "
      f"not {record['digest'][:12]}); bring that one back"
    )
  return held


def starting_constants(
  config: Config,
  algorithm: Algorithm,
  model: Model,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
  params: Params,
  held: Params,
) -> dict[str, Params]:
  """Returns the constant trees that a run begins with, by name: its own start as the reference, and other runs' models.

  Args:
    config, algorithm, model, tokenizer, mesh: of the run.
    params, held: the trained params and the base that `starting_point` returned.

  Raises:
    InputError: another run does not exist, is damaged, or was trained with another tokenizer.
  """
  sources = {name: getattr(config.options, name) for name in algorithm.models if name != "reference"}
  if config.run.reference:
    sources["reference"] = config.run.reference
  own_start = held or {name: params[name] for name in algorithm.model_of("reference", model).weights()}
  trees = {"reference": own_start}
  for name, source in sources.items():
    trees[name] = _load_other(config, source, algorithm.model_of(name, model), tokenizer, mesh)
  return trees


def _load_other(config: Config, source: str, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Params:
  """Loads the parameters of `model` from the run at `source` (its result), or from that Hugging Face folder."""
  abstract = model.abstract(mesh)
  if hub.is_folder(source):
    return weights.load(source, model, abstract)
  checkpoints = epath.Path(source).expanduser() / "checkpoints"
  check_tokenizer(load_metadata(checkpoints), tokenizer, config)
  return load_params(checkpoints, abstract)[0]
