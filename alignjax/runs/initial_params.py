"""The parameters that a run begins with, fresh or another's, and the base that it holds under LoRA factors."""

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
  """Raises InputError where a run that is new in `workdir` begins with one that is not there."""
  if (workdir / "config.json").exists():
    return
  for key, source in (("run.init", config.run.init), ("run.reference", config.run.reference)):
    if source and not hub.is_folder(source):
      load_metadata(whole_run(key, source) / "checkpoints")


def starting_params(
  config: Config, model: Model, tokenizer: Tokenizer, abstract: Params, step: int | None = None
) -> tuple[Params, int]:
  """The parameters that a run begins with, and the step of the run they come from (0 for fresh ones).

  They are those of the run that `run.init` names, at `step` (the newest if None), or of that folder of Hugging Face's;
  what is not there, a head, a critic or LoRA factors, is fresh. Factors, and a head, may be a PEFT adapter's instead
  (`lora.init`). The base is as stored: `starting_point` puts it in its form.

  Raises:
    InputError: no such run, or another model's; a LoRA run, whose checkpoints lack the base.
  """
  loaded, found = {}, 0
  plain = {name: tree for name, tree in abstract.items() if name != "lora"}
  fresh = tuple(name for name in ("score", "value") if name in abstract)
  if hub.is_folder(config.run.init):
    check_ids(tokenizer, config.run.init)
    loaded = weights.load(config.run.init, model, plain, fresh)
  elif config.run.init:
    source = whole_run("run.init", config.run.init) / "checkpoints"
    check_tokenizer(load_metadata(source, step), tokenizer, config)
    loaded, metadata = load_params(source, plain, step=step, fresh=fresh)
    found = metadata["step"]
  if config.lora.init:
    loaded |= peft.load_adapter(config.lora, abstract)
  missing = [name for name in abstract if name not in loaded]
  shardings = jax.tree.map(lambda x: x.sharding, {name: abstract[name] for name in missing})
  init = lambda key: {name: tree for name, tree in model.init(key).items() if name in missing}
  fresh = jax.jit(init, out_shardings=shardings)(jax.random.key(config.run.seed))
  return loaded | fresh, found


def starting_point(
  config: Config, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Params, Params, dict[str, Any]]:
  """What a run begins to train, what it holds in the form `lora.base`, and what its checkpoints say of that.

  They say whose base it is, its form, and the digest of both: of the arrays as stored, for codes may differ by the
  rounding of the machine that made them. All but the first are {} where all of the model is trained.

  Args:
    step: of the run that `run.init` names; the newest if None.

  Raises:
    InputError: as `starting_params`.
  """
  as_stored = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=""))
  stored = make_model(as_stored, tokenizer)
  params, found = starting_params(as_stored, stored, tokenizer, stored.abstract(mesh), step)
  params, held = stored.split(params)
  if not held:
    return params, {}, {}
  form, arrays = config.lora.base, table({"params": held})
  described = {"form": form, "arrays": arrays} if form else arrays
  record = {"init": config.run.init, "step": found, "digest": digest(described)}
  if form:
    shardings = jax.tree.map(lambda x: x.sharding, model.split(model.abstract(mesh))[1])
    weights = stored.split(stored.weights())[1]
    held = jax.jit(lambda held: quantised.hold(held, weights, form), out_shardings=shardings)(held)
  return params, held, record


def load_base(
  config: Config, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, metadata: dict[str, Any]
) -> Params:
  """The base under a run's LoRA factors, from where the run had it, verified; {} where all of the model is trained.

  It is kept in one place, the run that `run.init` names (or, of a run without, made anew from run.seed).

  Raises:
    InputError: it is gone, damaged, or not what the run's checkpoint was trained on.
  """
  if not model.trained:
    return {}
  record = metadata["base"]
  own = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init=""))
  _, held, now = starting_point(own, model, tokenizer, mesh, record["step"] if config.run.init else None)
  if now["digest"] != record["digest"]:
    place = f"{config.run.init}, step {record['step']}" if config.run.init else f"run.seed={config.run.seed}"
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
  """The constant trees that a run begins with, by name: other runs' newest parameters, and its own as the reference.

  Args:
    config, algorithm, model, tokenizer, mesh: of the run.
    params, held: what `starting_point` gave.

  Raises:
    InputError: another run's are gone, damaged, or were trained with another tokenizer.
  """
  of = lambda name: algorithm.model_of(name, model)
  sources = {name: getattr(config.options, name) for name in algorithm.models if name != "reference"}
  if config.run.reference:
    sources["reference"] = config.run.reference
  own = held or {name: params[name] for name in of("reference").weights()}
  others = {name: _load_other(config, source, of(name), tokenizer, mesh) for name, source in sources.items()}
  return {"reference": own} | others


def _load_other(config: Config, source: str, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Params:
  """The newest parameters of the run at `source`, or those in that Hugging Face folder, of `model`."""
  abstract = model.abstract(mesh)
  if hub.is_folder(source):
    return weights.load(source, model, abstract)
  checkpoints = epath.Path(source).expanduser() / "checkpoints"
  check_tokenizer(load_metadata(checkpoints), tokenizer, config)
  return load_params(checkpoints, abstract)[0]
