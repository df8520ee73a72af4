"""A config's parts, put together: its model, its algorithm, its data, and the rewards that judge its completions."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from alignjax import rewards
from alignjax.algorithms import ALGORITHMS, Algorithm, Parts, rollout, step_reward
from alignjax.algorithms.algorithm import Options, Special
from alignjax.algorithms.policy_update import PassesOptions
from alignjax.algorithms.sampling_options import SamplingOptions
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import Tokenizer, check_ids, load_tokenizer
from alignjax.data.transform import step_ends
from alignjax.errors import InputError
from alignjax.losses.objective import Term, terms
from alignjax.model import ModelConfig, build, lora
from alignjax.model.decoder import Model
from alignjax.model.huggingface import weights
from alignjax.rewards import Reward
from alignjax.runs.checkpoint import load_metadata, params_digest
from alignjax.runs.config import Config, MeshConfig
from alignjax.runs.frozen_params import reference_metadata
from alignjax.runs.trust import check_code
from alignjax.runs.workdir import read_config, whole_run
from alignjax.system import hub, sharding
from alignjax.training.iteration import Judge, make_judge
from alignjax.training.learner import KEPT


def open_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer of a config that `with_sizes` has completed.

  Raises:
    InputError: as `load_tokenizer`; or it would be that of `run.init`, which is not there.
  """
  if not config.data.tokenizer and config.run.init:
    raise InputError(
      f"run.init={config.run.init}: no such run or folder, and data.tokenizer names none; "
      f"{hub.hint(config.run.init)}name one that is there"
    )
  return load_tokenizer(config.data.tokenizer)


def with_sizes(config: Config, workdir: epath.Path) -> Config:
  """The config with the sizes and options of the model that `run.init` names, and its tokenizer where it names none
  itself; how the model is computed is its own.

  They are its own too where there is no such run or folder, which is an error for whoever needs the weights; and those
  that the run in `workdir` has recorded, if it has begun from there.

  Raises:
    InputError: a config that can not be read, or of a model that is not supported.
  """
  init = config.run.init
  if not init:
    return config
  if hub.is_folder(init):
    return _with_tokenizer(dataclasses.replace(config, model=_folder_config(config, init)), init)
  for place in (epath.Path(init).expanduser(), workdir):
    if (place / "config.json").exists() and (place != workdir or read_config(place).run.init == init):
      found = read_config(place)
      if not config.model.module:
        check_code(place / "config.json", [found.model.module])
      sized = dataclasses.replace(config, model=found.model.computed_as(config.model))
      return _with_tokenizer(sized, found.data.tokenizer)
  return config


def _with_tokenizer(config: Config, path: str) -> Config:
  if config.data.tokenizer:
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def _folder_config(config: Config, path: str) -> ModelConfig:
  """The config of the model in a Hugging Face folder, computed as the run's own is."""
  if config.model.module:
    raise InputError(f"{path}: weights of Hugging Face are not those of model.module={config.model.module}; drop one")
  found = weights.read_config(path)
  own = found.computed_as(config.model)
  if found.head == "scalar":
    if own.score_heads not in (1, found.score_heads):
      raise InputError(f"model.score_heads={own.score_heads}: {path} has {found.score_heads}; take as many, or 1")
    return dataclasses.replace(own, score_heads=found.score_heads)
  # What scores needs no unembedding.
  return dataclasses.replace(own, tied=found.tied or ALGORITHMS[config.algorithm.name].head == "scalar")


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of a config, of these devices or all.

  Raises:
    InputError: as `sharding.make_mesh`.
  """
  sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor, "sequence": mesh.sequence}
  return sharding.make_mesh(**sizes, devices=devices)


def make_model(config: Config, tokenizer: Tokenizer) -> Model:
  """The model of a config, with the tokenizer's vocabulary where none is set, the head that the algorithm needs, and
  LoRA factors where they have a rank; and what the algorithm trains beside a policy.

  Raises:
    InputError: model.vocab is smaller than the tokenizer's vocabulary, there are heads that nothing reads, prompts are
      shared where the model can not, its moments can not be offloaded, or lora.targets fits no matrix.
  """
  if config.optimizer.offload and config.model.module:
    raise InputError("optimizer.offload: a model of model.module need not stack its layers; leave it False")
  size = config.model.vocab or tokenizer.vocab_size
  _check_vocabulary("model.vocab", size, config, tokenizer)
  recipe = ALGORITHMS[config.algorithm.name]
  head = recipe.head
  if head == "none" and config.model.score_heads > 1:
    raise InputError(
      f"model.score_heads={config.model.score_heads}: algorithm.name={config.algorithm.name} scores nothing; use 1"
    )
  if config.data.share_prompts and (config.model.module or config.model.window):
    why = "windows, which count the columns between" if config.model.window else "a model.module of its own"
    raise InputError(f"data.share_prompts=True: is not to be had with {why}; use False")
  model = build.make(dataclasses.replace(config.model, vocab=size, head=head))
  model = lora.adapt(model, config.lora) if config.lora.rank else model
  return recipe.adapt(model, config.options)


def _check_vocabulary(name: str, size: int, config: Config, tokenizer: Tokenizer) -> None:
  """Raises InputError where a model of a vocabulary of `size` has no embedding for some of the tokenizer's tokens."""
  if size < tokenizer.vocab_size:
    raise InputError(
      f"{name}={size}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens; name the "
      "model's own tokenizer, or train with model.vocab=0"
    )


def make_algorithm(config: Config, model: Model, tokenizer: Tokenizer, workdir: epath.Path) -> Algorithm:
  """The algorithm of a config for `model`, with the models of the runs that its options name.

  A run keeps what it needs of another in its own directory: once it has begun, the other may be gone.

  Raises:
    InputError: such a run can not be read, is one of LoRA factors, or has the wrong head: a reward model's where a
      policy is meant, or the other way round; its reward model is not of the kind that `step_reward` asks for; or
      its domain is another one's.
  """
  recipe = ALGORITHMS[config.algorithm.name]
  models = {}
  for name, head in recipe.models.items():
    if (workdir / name).exists():
      found = ModelConfig(**reference_metadata(workdir / name)["model"])
      check_code(workdir / name, [found.module], given=[config.model.module])
      models[name] = build.make(found)
    elif source := getattr(config.options, name):
      models[name] = _model_of(f"algorithm.{name}", source, config, tokenizer)
      if name == rollout.IN_GRAPH:
        step_reward.check_model(source, _algorithm_of(source), config.options.step_reward)
      if models[name].config.head != head:
        found = "a policy and no reward model" if head == "scalar" else "a reward model and no policy"
        raise InputError(f"algorithm.{name}={source}: is {found}; name another run")
  parts = Parts(config.optimizer.microbatches, tuple(models.items()))
  if isinstance(config.options, SamplingOptions):
    if config.options.domain and config.options.reward_model and not (workdir / "domain").exists():
      _check_domain(config.options.domain, config.options.reward_model)
    separator = step_separator(config, workdir)
    ends = step_ends(tokenizer, separator) if separator else ()
    parts = parts._replace(special=Special(tokenizer.stop_id, tokenizer.pad_id, ends))
  objectives = terms(config.algorithm.loss, recipe.family)
  recipe.check(objectives, config.options)
  return _built(config.algorithm.name, model, objectives, config.options, parts)


# Equal runs of a process, such as the rounds of `iterate`, have one algorithm, whose functions JAX traces once.
@functools.lru_cache(maxsize=KEPT)
def _built(name: str, model: Model, objectives: tuple[Term, ...], options: Options, parts: Parts) -> Algorithm:
  return ALGORITHMS[name].make(model, objectives, options, parts)


def _model_of(key: str, source: str, config: Config, tokenizer: Tokenizer) -> Model:
  """The model of the run, or of the Hugging Face folder, that `key` names."""
  if hub.is_folder(source):
    found = _folder_config(config, source)
    _check_vocabulary(f"{source}: vocab", found.vocab, config, tokenizer)
    check_ids(tokenizer, source)
    return build.make(found)
  path = whole_run(key, source)
  found = read_config(path)
  check_code(path / "config.json", [found.model.module], given=[config.model.module])
  return make_model(found, tokenizer)


def _algorithm_of(source: str) -> str:
  """The algorithm of the run at `source`; "" of a Hugging Face folder."""
  return "" if hub.is_folder(source) else read_config(epath.Path(source).expanduser()).algorithm.name


def _check_domain(source: str, reward_model: str) -> None:
  """Raises InputError where the domain at `source` is not that of the reward model."""
  place = lambda run: epath.Path(run).expanduser() / "checkpoints"
  if hub.is_folder(reward_model) or load_metadata(place(source)).get("domain_of") != params_digest(place(reward_model)):
    raise InputError(
      f"algorithm.domain={source}: is not the domain of algorithm.reward_model={reward_model} as it is now; write that "
      f"with `alignjax domain --workdir {reward_model} --out DIR`"
    )


def step_separator(config: Config, workdir: epath.Path) -> str:
  """What separates the steps that an online run's process reward model judges; "" where it has none."""
  options = config.options
  if not isinstance(options, SamplingOptions) or not options.step_reward or not options.reward_model:
    return ""  # the algorithm refuses the one without the other
  if (kept := workdir / rollout.IN_GRAPH).exists():
    return reference_metadata(kept)["step_separator"]
  return read_config(epath.Path(options.reward_model).expanduser()).data.step_separator


def description(name: str, model: Model, config: Config, workdir: epath.Path) -> dict[str, Any]:
  """What a run writes beside the constant tree `name`, of `model`: JSON."""
  separator = step_separator(config, workdir) if name == rollout.IN_GRAPH else ""
  return {"model": dataclasses.asdict(model.config)} | ({"step_separator": separator} if separator else {})


def samples(config: Config) -> bool:
  """Whether the run is online: it learns from its own completions."""
  return isinstance(config.options, SamplingOptions)


def sampling_of(config: Config) -> SamplingOptions:
  """The sampling options of a run that is online."""
  assert isinstance(config.options, SamplingOptions), config.algorithm.name
  return config.options


def longest_row(config: Config) -> int:
  """Tokens of a row at most, with a completion if the run samples them."""
  completion = config.options.max_new_tokens if isinstance(config.options, SamplingOptions) else 0
  return config.data.row_length + completion


def completions_of(config: Config) -> int:
  """Completions that a run samples for each prompt; 1 if it samples none."""
  return config.options.num_generations if isinstance(config.options, SamplingOptions) else 1


def minibatches_of(config: Config) -> int:
  """In how many parts a run takes its completions in a pass; 1 if it samples none."""
  return config.options.minibatches if isinstance(config.options, PassesOptions) else 1


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises InputError where a run's rows can not be split over its parts and devices."""
  completions = completions_of(config)
  rows = config.data.rows * completions
  parts = config.optimizer.microbatches
  sharding.check_rows(rows, longest_row(config), parts, mesh, minibatches_of(config), completions)


def records_of(config: Config) -> str:
  """The kind of records that a run learns from."""
  return ALGORITHMS[config.algorithm.name].kind(config.algorithm.loss, config.options)


def open_data(config: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
  """What a run learns from, and what it is evaluated on; None where that is nothing.

  Raises:
    InputError: as `Dataset.open`; or all that there is weighs nothing.
  """
  kind = records_of(config)
  split = lambda name: Dataset.open(config.data, tokenizer, kind, name, config.run.seed)
  train = split("train")
  _check_classes(config, train)
  return train, split("eval") if config.data.eval or config.data.holdout else None


def _check_classes(config: Config, dataset: Dataset) -> None:
  """Raises InputError where every labelled completion is of a class whose weight is 0: the loss would always be 0."""
  names = ("undesirable_weight", "desirable_weight")
  if any(name not in config.hparams for name in names):
    return
  weights = [config.hparams[name] for name in names]
  if not any(weight * count for weight, count in zip(weights, dataset.labels, strict=True)):
    low, high = dataset.labels
    raise InputError(
      f"data.train={config.data.train}: nothing to learn from: {high:,} desirable completions of weight "
      f"{weights[1]:g}, {low:,} undesirable of weight {weights[0]:g}; change algorithm.desirable_weight or the data"
    )


def open_judge(config: Config, tokenizer: Tokenizer, dataset: Dataset | None, mesh: jax.sharding.Mesh) -> Judge | None:
  """The rewards of an online run's completions for a data set's prompts that Python functions give; None for none.

  Raises:
    InputError: an unknown reward, or one that lacks a library, or a field of the prompts' records.
  """
  if dataset is None or not isinstance(config.options, SamplingOptions):
    return None
  functions, weights = rollout.host_rewards(config.options), rollout.weights(config.options)
  _check_fields(functions, dataset)
  return make_judge(functions, [name for name in functions if weights[name]], tokenizer, dataset, mesh)


def _check_fields(functions: Mapping[str, Reward], dataset: Dataset) -> None:
  """Raises InputError where a reward needs a field that no record of the data set has."""
  needs = {need for function in functions.values() for need in getattr(function, "needs", ())}
  fields: set[str] = set()
  for record in dataset.examples.records:
    if needs <= fields:
      return
    fields |= dataset.record(int(record)).keys()
  try:
    rewards.require(functions, fields)
  except InputError as error:
    raise InputError(f"data.{dataset.split}: {error}") from error
