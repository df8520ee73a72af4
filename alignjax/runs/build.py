"""A config's parts, put together: its model, its algorithm, its data, and the rewards of its completions."""

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
from alignjax.data.tokenizer import HasVocabulary, Tokenizer, check_ids, load_tokenizer
from alignjax.data.transform import step_ends
from alignjax.errors import InputError
from alignjax.losses import objective
from alignjax.losses.objective import Term, own_names, terms
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
from alignjax.training.iteration import HostScorer, make_host_scorer
from alignjax.training.learner import KEPT


def open_tokenizer(config: Config) -> Tokenizer:
  """Loads the tokenizer of a config that `with_sizes` has completed.

  Raises:
    InputError: as `load_tokenizer`; or the tokenizer would be that of `run.init`, which does not exist.
  """
  if not config.data.tokenizer and config.run.init:
    raise InputError(
      f"run.init={config.run.init}: no such run or folder, and data.tokenizer names none; "
      f"{hub.hint(config.run.init)}name one that is there"
    )
  return load_tokenizer(config.data.tokenizer)


def with_sizes(config: Config, workdir: epath.Path) -> Config:
  """Returns the config with the sizes and options of the model that `run.init` names; as it is without `run.init`.

  It also takes that model's tokenizer if the config names none. How the model is computed stays as configured. If
  `run.init` does not exist any more, the sizes are those that a run in `workdir` recorded when it began from there;
  without such a record the config stays as it is, and loading the weights is the error.

  Raises:
    InputError: a config that cannot be read, or of a model that is not supported; or its record names Python that may
      not be imported.
  """
  init = config.run.init
  if not init:
    return config
  if hub.is_folder(init):
    return _with_tokenizer(dataclasses.replace(config, model=_folder_config(config, init)), init)
  for place in (epath.Path(init).expanduser(), workdir):
    if (place / "config.json").exists() and (place != workdir or read_config(place).run.init == init):
      source = read_config(place)
      if not config.model.module:
        check_code(place / "config.json", [source.model.module])
      sized = dataclasses.replace(config, model=source.model.computed_as(config.model))
      return _with_tokenizer(sized, source.data.tokenizer)
  return config


def _with_tokenizer(config: Config, path: str) -> Config:
  if config.data.tokenizer:
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def _folder_config(config: Config, path: str) -> ModelConfig:
  """Returns the config of the model in a Hugging Face folder, computed as the run's config says."""
  if config.model.module:
    raise InputError(f"{path}: weights of Hugging Face are not those of model.module={config.model.module}; drop one")
  stored = weights.read_config(path)
  model = stored.computed_as(config.model)
  if stored.head == "scalar":
    if model.score_heads not in (1, stored.score_heads):
      raise InputError(f"model.score_heads={model.score_heads}: {path} has {stored.score_heads}; take as many, or 1")
    return dataclasses.replace(model, score_heads=stored.score_heads)
  # A reward model needs no unembedding.
  return dataclasses.replace(model, tied=stored.tied or ALGORITHMS[config.algorithm.name].head == "scalar")


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Makes the mesh of a config from these devices, or from all if None.

  Raises:
    InputError: the sizes do not cover the devices, or the slices of TPUs (`sharding.make_mesh`).
  """
  sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor, "sequence": mesh.sequence}
  return sharding.make_mesh(**sizes, devices=devices)


def make_model(config: Config, tokenizer: HasVocabulary) -> Model:
  """Makes the model of a config, with the head that the algorithm needs.

  Its vocabulary is the tokenizer's if model.vocab is 0. It has LoRA factors if lora.rank is set, and whatever the
  algorithm trains besides the policy, such as a critic.

  Args:
    config: of the run, completed by `with_sizes`.
    tokenizer: anything with a `vocab_size`.

  Raises:
    InputError: model.vocab is smaller than the tokenizer's vocabulary, nothing reads the score heads, the model cannot
      share prompts, its moments cannot be offloaded, or lora.targets matches no matrix.
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
    model_kind = "sliding-window attention" if config.model.window else "a model.module of its own"
    raise InputError(f"data.share_prompts=True: is not supported with {model_kind}; use False")
  model = build.make(dataclasses.replace(config.model, vocab=size, head=head))
  if config.lora.rank:
    model = lora.adapt(model, config.lora)
  return recipe.adapt(model, config.options)


def _check_vocabulary(name: str, size: int, config: Config, tokenizer: HasVocabulary) -> None:
  """Raises InputError if a vocabulary of `size` is smaller than the tokenizer's; `name` is where the size is set."""
  if size < tokenizer.vocab_size:
    raise InputError(
      f"{name}={size}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens; name the "
      "model's own tokenizer, or train with model.vocab=0"
    )


def make_algorithm(config: Config, model: Model, tokenizer: Tokenizer, workdir: epath.Path) -> Algorithm:
  """Makes the algorithm of a config for `model`, with the models of the runs that its options name.

  A run copies the other runs' models into its own directory: once it has begun, the other runs may be deleted.

  Args:
    config: of the run.
    model: of `make_model`.
    tokenizer: of the run.
    workdir: of the run; it need not exist yet.

  Raises:
    InputError: such a run cannot be read, holds LoRA factors, or has the wrong head (a reward model instead of a
      policy, or the other way round); the reward model is not of the kind that `step_reward` asks for; the domain
      is that of another reward model; or an unknown or contradictory loss or option.
  """
  recipe = ALGORITHMS[config.algorithm.name]
  models = {}
  for name, head in recipe.models.items():
    if (workdir / name).exists():
      models[name] = _copied_model(config, workdir, name)
    elif source := getattr(config.options, name):
      models[name] = _model_of(f"algorithm.{name}", source, config, tokenizer)
      if name == rollout.IN_GRAPH:
        step_reward.check_model(source, _algorithm_of(source), sampling_of(config).step_reward)
      if models[name].config.head != head:
        kinds = "a policy and no reward model" if head == "scalar" else "a reward model and no policy"
        raise InputError(f"algorithm.{name}={source}: is {kinds}; name another run")
  parts = Parts(config.optimizer.microbatches, tuple(models.items()))
  if isinstance(config.options, SamplingOptions):
    if config.options.domain and config.options.reward_model and not (workdir / "domain").exists():
      _check_domain(config.options.domain, config.options.reward_model)
    ends: tuple[tuple[int, ...], ...] = ()
    if separator := step_separator(config, workdir):
      ends = step_ends(tokenizer, separator)
    parts = parts._replace(special=Special(tokenizer.stop_id, tokenizer.pad_id, ends))
  objectives = terms(config.algorithm.loss, recipe.family)
  recipe.check(objectives, config.options)
  return _built(config.algorithm.name, model, objectives, config.options, parts)


# Equal runs of a process, such as the rounds of `iterate`, share one algorithm, so JAX traces its functions once.
@functools.lru_cache(maxsize=KEPT)
def _built(name: str, model: Model, objectives: tuple[Term, ...], options: Options, parts: Parts) -> Algorithm:
  return ALGORITHMS[name].make(model, objectives, options, parts)


def copied_models(config: Config, workdir: epath.Path) -> dict[str, Model]:
  """Makes the models of the constant trees that a run has of other runs, by name; no loss is needed for that.

  Arguments and errors as in `_copied_model`.
  """
  names = [name for name in ALGORITHMS[config.algorithm.name].models if (workdir / name).exists()]
  copied = tuple((name, _copied_model(config, workdir, name)) for name in names)
  return rollout.models(Parts(models=copied))


def _copied_model(config: Config, workdir: epath.Path, name: str) -> Model:
  """Makes the model of another run, such as "reward_model", whose parameters a run has in its own directory.

  Args:
    config: of the run; its model.module may be that of the other model, too.
    workdir: of the run, which has begun.
    name: of the constant tree.

  Raises:
    InputError: the record beside the parameters cannot be read, or names Python that may not be imported.
  """
  stored = ModelConfig(**reference_metadata(workdir / name)["model"])
  check_code(workdir / name, [stored.module], given=[config.model.module])
  return build.make(stored)


def _model_of(key: str, source: str, config: Config, tokenizer: Tokenizer) -> Model:
  """Makes the model of the run, or of the Hugging Face folder, at `source`, which the config's `key` names."""
  if hub.is_folder(source):
    folder_config = _folder_config(config, source)
    _check_vocabulary(f"{source}: vocab", folder_config.vocab, config, tokenizer)
    check_ids(tokenizer, source)
    return build.make(folder_config)
  path = whole_run(key, source)
  source_config = read_config(path)
  check_code(path / "config.json", [source_config.model.module], given=[config.model.module])
  return make_model(source_config, tokenizer)


def _algorithm_of(source: str) -> str:
  """Returns the name of the algorithm of the run at `source`; "" for a Hugging Face folder."""
  if hub.is_folder(source):
    return ""
  return read_config(epath.Path(source).expanduser()).algorithm.name


def _check_domain(source: str, reward_model: str) -> None:
  """Raises InputError if the domain at `source` was not fitted to the reward model's current parameters."""
  if not hub.is_folder(reward_model):
    domain_of = load_metadata(epath.Path(source).expanduser() / "checkpoints").get("domain_of")
    if domain_of == params_digest(epath.Path(reward_model).expanduser() / "checkpoints"):
      return
  raise InputError(
    f"algorithm.domain={source}: is not the domain of algorithm.reward_model={reward_model} as it is now; write that "
    f"with `alignjax domain --workdir {reward_model} --out DIR`"
  )


def step_separator(config: Config, workdir: epath.Path) -> str:
  """Returns the text between the steps that an online run's process reward model scores; "" if it has no such model.

  It is read from the copy in `workdir` if there is one, otherwise from the reward model's run.
  """
  options = config.options
  if not isinstance(options, SamplingOptions) or not options.step_reward or not options.reward_model:
    return ""  # the algorithm refuses step_reward without a reward model
  if (kept := workdir / rollout.IN_GRAPH).exists():
    return reference_metadata(kept)["step_separator"]
  return read_config(epath.Path(options.reward_model).expanduser()).data.step_separator


def description(name: str, model: Model, config: Config, workdir: epath.Path) -> dict[str, Any]:
  """Makes the JSON that a run writes with the constant tree `name`, whose model is `model`.

  `frozen_params.reference_metadata` reads it.
  """
  described: dict[str, Any] = {"model": dataclasses.asdict(model.config)}
  if name == rollout.IN_GRAPH and (separator := step_separator(config, workdir)):
    described["step_separator"] = separator
  return described


def own_losses(config: Config) -> list[str]:
  """The losses of the user's own that a config names, "module:function"."""
  return own_names(config.algorithm.loss, ALGORITHMS[config.algorithm.name].family)


def loss_digests(config: Config) -> dict[str, dict[str, str]]:
  """{"losses": sha256 of the file by user's loss}, for the record of a run; {} if it has none of the user's own."""
  digests = objective.digests(config.algorithm.loss, ALGORITHMS[config.algorithm.name].family)
  return {"losses": digests} if digests else {}


def samples(config: Config) -> bool:
  """Returns True if the run is online, which means that it learns from its own completions."""
  return isinstance(config.options, SamplingOptions)


def sampling_of(config: Config) -> SamplingOptions:
  """Returns the sampling options of an online run; AssertionError for another (`samples`)."""
  assert isinstance(config.options, SamplingOptions), config.algorithm.name
  return config.options


def longest_row(config: Config) -> int:
  """Returns the most tokens in a row; in an online run a row includes its completion."""
  if isinstance(config.options, SamplingOptions):
    return config.data.row_length + config.options.max_new_tokens
  return config.data.row_length


def completions_of(config: Config) -> int:
  """Returns the number of completions that a run samples for each prompt; 1 if it samples none."""
  if isinstance(config.options, SamplingOptions):
    return config.options.num_generations
  return 1


def minibatches_of(config: Config) -> int:
  """Returns the number of minibatches that a pass over the completions is split into; 1 if the run samples none."""
  if isinstance(config.options, PassesOptions):
    return config.options.minibatches
  return 1


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises InputError if a run's rows cannot be split over its microbatches, minibatches and devices.

  Args:
    config: of the run; an online run has a row for each completion.
    mesh: of the run.
  """
  completions = completions_of(config)
  rows = config.data.rows * completions
  parts = config.optimizer.microbatches
  sharding.check_rows(rows, longest_row(config), parts, mesh, minibatches_of(config), completions)


def check_reference(config: Config, model: Model, algorithm: Algorithm) -> None:
  """Raises InputError if the run cannot have the reference that is asked for.

  LoRA factors have no reference that follows the policy, and run.reference needs a loss with a frozen reference.
  """
  if model.trained and algorithm.synced:
    raise InputError("lora.rank: a reference that follows the policy's weights is not to be had of factors; use 0")
  if config.run.reference and (model.trained or "reference" not in algorithm.constant):
    why = "the reference is the base under the factors" if model.trained else "the loss has no frozen reference"
    raise InputError(f"run.reference={config.run.reference}: {why}; leave it empty")


def records_of(config: Config) -> str:
  """Returns the kind of records that a run learns from, a key of `data.format.KINDS`."""
  return ALGORITHMS[config.algorithm.name].kind(config.algorithm.loss, config.options)


def open_data(config: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
  """Opens a run's training data and its held-out data; the second is None if the config names none.

  Args:
    config: its data section and run.seed are read; the algorithm decides the kind of records.
    tokenizer: of the run.

  Raises:
    InputError: a file that cannot be read, or a malformed record (`Dataset.open`); or every labelled completion has
      weight 0.
  """
  kind = records_of(config)
  train_data = Dataset.open(config.data, tokenizer, kind, "train", config.run.seed)
  _check_classes(config, train_data)
  eval_data = None
  if config.data.eval or config.data.holdout:
    eval_data = Dataset.open(config.data, tokenizer, kind, "eval", config.run.seed)
  return train_data, eval_data


def _check_classes(config: Config, dataset: Dataset) -> None:
  """Raises InputError if every labelled completion is of a class whose weight is 0: the loss would always be 0."""
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


def open_host_scorer(
  config: Config, tokenizer: Tokenizer, dataset: Dataset | None, mesh: jax.sharding.Mesh
) -> HostScorer | None:
  """Returns the scorer of an online run's completions for a data set's prompts; None if no reward is a Python function.

  Args:
    config: of the run.
    tokenizer: decodes the completions.
    dataset: of the prompts; None gives None.
    mesh: where the scores go.

  Raises:
    InputError: an unknown reward, or one that lacks a library or a field of the prompts' records.
  """
  if dataset is None or not isinstance(config.options, SamplingOptions):
    return None
  functions = rollout.host_rewards(config.options)
  weights = rollout.weights(config.options)
  _check_fields(functions, dataset)
  return make_host_scorer(functions, [name for name in functions if weights[name]], tokenizer, dataset, mesh)


def _check_fields(functions: Mapping[str, Reward], dataset: Dataset) -> None:
  """Raises InputError if a reward needs a field that no record of the data set has."""
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
