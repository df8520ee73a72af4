"""A run directory as something to use: the model, parameters and tokenizer that it holds."""

import collections
import dataclasses
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from alignjax import hub, rewards, sharding
from alignjax.algorithms import ALGORITHMS, Algorithm, rollout, step_reward
from alignjax.algorithms.rollout import Special
from alignjax.checkpoint import load_items, load_metadata, load_params, params_digest
from alignjax.config import Config, resolve
from alignjax.constant_tree import ConstantTrees, reference_metadata
from alignjax.data.loader import Dataset
from alignjax.data.tokenizer import Tokenizer, check_ids, load_tokenizer
from alignjax.data.transform import step_ends
from alignjax.errors import InputError
from alignjax.evaluation import preference
from alignjax.fingerprint import digest, table
from alignjax.generate import Completion, sample_text
from alignjax.model import ModelConfig, build, lora, peft, quantised, weights
from alignjax.model.decoder import Model
from alignjax.prepare import Judge, make_judge, make_prepare
from alignjax.rewards import Reward
from alignjax.types import HParams, Params


class Run(NamedTuple):
  """A trained model and what belongs to it.

  Attributes:
    config: what it was made from.
    step: of the parameters.
    params: on the mesh.
    model, tokenizer, mesh: to use them with.
    metrics: of the last step and the last evaluation (`eval/...`); empty for a run that was loaded.
    metadata: what its checkpoint records beside the arrays.
    stopped: whether a signal ended the training before its last step.
  """

  config: Config
  step: int
  params: Params
  model: Model
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  metrics: dict[str, float]
  metadata: dict[str, Any]
  stopped: bool = False


def load(workdir: epath.PathLike, step: int | None = None) -> Run:
  """The run in `workdir`, with the parameters of one checkpoint (the newest if None), on a mesh of all devices; or the
  model and tokenizer of a folder of Hugging Face's, as a run that has taken no step.

  Raises:
    InputError: not a run directory, no such checkpoint, a damaged one, or a tokenizer that is gone or has changed.
  """
  if hub.is_folder(workdir):
    return _load_folder(str(workdir), step)
  workdir = epath.Path(workdir).expanduser()
  config = read_config(workdir)
  tokenizer = load_tokenizer(config.data.tokenizer)
  check_tokenizer(load_metadata(workdir / "checkpoints", step), tokenizer, config)
  model = make_model(config, tokenizer)
  mesh = sharding.make_mesh()
  trained, _ = model.split(model.abstract(mesh))
  params, metadata = load_params(workdir / "checkpoints", trained, step=step)
  with jax.set_mesh(mesh):
    held = load_base(config, model, tokenizer, mesh, metadata)
  return Run(config, metadata["step"], held | params, model, tokenizer, mesh, {}, metadata)


def _load_folder(path: str, step: int | None) -> Run:
  if step is not None:
    raise InputError(f"{path}: holds a model's weights and no run, so it has no step {step}; leave the step out")
  found = weights.read_config(path)
  name = "reward" if found.head == "scalar" else "sft"
  folder = str(hub.local(path))
  config = resolve(
    {
      "model": dataclasses.asdict(found),
      "data": {"tokenizer": folder},
      "algorithm": {"name": name},
      "run": {"init": path, "steps": 1},
    }
  )
  tokenizer = load_tokenizer(folder)
  model, mesh = make_model(config, tokenizer), sharding.make_mesh()
  params = weights.load(path, model, model.abstract(mesh))
  return Run(config, 0, params, model, tokenizer, mesh, {}, {})


def with_sizes(config: Config, workdir: epath.Path) -> Config:
  """The config with the sizes and options of the model that `run.init` names; how they are computed is its own.

  They are its own too where there is no such run or folder, which is an error for whoever needs the weights; and those
  that the run in `workdir` has recorded, if it has begun from there.

  Raises:
    InputError: a config that can not be read, or of a model that is not supported.
  """
  init = config.run.init
  if not init:
    return config
  if hub.is_folder(init):
    return dataclasses.replace(config, model=_folder_config(config, init))
  for place in (epath.Path(init).expanduser(), workdir):
    if (place / "config.json").exists() and (place != workdir or read_config(place).run.init == init):
      return dataclasses.replace(config, model=read_config(place).model.computed_as(config.model))
  return config


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
  return dataclasses.replace(own, tied=found.tied or ALGORITHMS[config.algorithm.name].HEAD == "scalar")


def read_config(workdir: epath.Path) -> Config:
  """The config that a run directory records.

  Raises:
    InputError: there is none, or it can not be read.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(f"{workdir}: not a run directory, it has no config.json; name a --workdir of alignjax train")
  try:
    return resolve(json.loads(path.read_text())["config"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, not a config, or another version's
    raise InputError(f"{path}: not the config of a run ({error}); choose another --workdir") from error


def make_model(config: Config, tokenizer: Tokenizer) -> Model:
  """The model of a config, with the tokenizer's vocabulary where none is set, the head that the algorithm needs, and
  LoRA factors where they have a rank; and what the algorithm trains beside a policy.

  Raises:
    InputError: model.vocab is smaller than the tokenizer's vocabulary, there are heads that nothing reads, prompts are
      shared where the model can not, or lora.targets fits no matrix.
  """
  size = config.model.vocab or tokenizer.vocab_size
  check_vocabulary("model.vocab", size, config, tokenizer)
  module = ALGORITHMS[config.algorithm.name]
  head = module.HEAD
  if head == "none" and config.model.score_heads > 1:
    raise InputError(
      f"model.score_heads={config.model.score_heads}: algorithm.name={config.algorithm.name} scores nothing; use 1"
    )
  if config.data.share_prompts and (config.model.module or config.model.window):
    why = "windows, which count the columns between" if config.model.window else "a model.module of its own"
    raise InputError(f"data.share_prompts=True: is not to be had with {why}; use False")
  model = build.make(dataclasses.replace(config.model, vocab=size, head=head))
  model = lora.adapt(model, config.lora) if config.lora.rank else model
  return module.adapt(model, **config.options) if hasattr(module, "adapt") else model


def check_vocabulary(name: str, size: int, config: Config, tokenizer: Tokenizer) -> None:
  """Raises InputError where a model of a vocabulary of `size` has no embedding for some of the tokenizer's tokens."""
  if size < tokenizer.vocab_size:
    raise InputError(
      f"{name}={size}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens; name the "
      "model's own tokenizer, or train with model.vocab=0"
    )


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
    source = _whole("run.init", config.run.init) / "checkpoints"
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


def _whole(key: str, directory: str) -> epath.Path:
  """The directory of the run that `key` names, unless its checkpoints are of LoRA factors: they lack the base."""
  path = epath.Path(directory).expanduser()
  if (path / "config.json").exists() and read_config(path).lora.rank:
    raise InputError(
      f"{key}={directory}: holds LoRA factors without their base; make a run of both with "
      f"`alignjax adapter merge --workdir {directory} --out DIR` and name that"
    )
  return path


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


def make_algorithm(config: Config, model: Model, tokenizer: Tokenizer, workdir: epath.Path) -> Algorithm:
  """The algorithm of a config for `model`, with the models of the runs that its options name.

  A run keeps what it needs of another in its own directory: once it has begun, the other may be gone.

  Raises:
    InputError: such a run can not be read, is one of LoRA factors, or has the wrong head: a reward model's where a
      policy is meant, or the other way round; its reward model is not of the kind that `step_reward` asks for; or
      its domain is another one's.
  """
  module = ALGORITHMS[config.algorithm.name]
  models = {}
  for name, head in getattr(module, "MODELS", {}).items():
    if (workdir / name).exists():
      models[name] = build.make(ModelConfig(**reference_metadata(workdir / name)["model"]))
    elif source := config.options[name]:
      models[name] = _model_of(f"algorithm.{name}", source, config, tokenizer)
      if name == rollout.IN_GRAPH:
        step_reward.check_model(source, _algorithm_of(source), config.options["step_reward"])
      if models[name].config.head != head:
        found = "a policy and no reward model" if head == "scalar" else "a reward model and no policy"
        raise InputError(f"algorithm.{name}={source}: is {found}; name another run")
  own = (config.options.get("domain"), config.options.get(rollout.IN_GRAPH))
  if all(own) and not (workdir / "domain").exists():
    _check_domain(*own)
  if samples(config):
    separator = step_separator(config, workdir)
    ends = step_ends(tokenizer, separator) if separator else ()
    models["special"] = Special(tokenizer.stop_id, tokenizer.pad_id, ends)
  return module.make(model, config.algorithm.loss, config.optimizer.microbatches, **(config.options | models))


def _model_of(key: str, source: str, config: Config, tokenizer: Tokenizer) -> Model:
  """The model of the run, or of the Hugging Face folder, that `key` names."""
  if hub.is_folder(source):
    found = _folder_config(config, source)
    check_vocabulary(f"{source}: vocab", found.vocab, config, tokenizer)
    check_ids(tokenizer, source)
    return build.make(found)
  return make_model(read_config(_whole(key, source)), tokenizer)


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
  if not config.options.get("step_reward") or not config.options[rollout.IN_GRAPH]:
    return ""  # the algorithm refuses the one without the other
  if (kept := workdir / rollout.IN_GRAPH).exists():
    return reference_metadata(kept)["step_separator"]
  return read_config(epath.Path(config.options[rollout.IN_GRAPH]).expanduser()).data.step_separator


def description(name: str, model: Model, config: Config, workdir: epath.Path) -> dict[str, Any]:
  """What a run writes beside the constant tree `name`, of `model`: JSON."""
  separator = step_separator(config, workdir) if name == rollout.IN_GRAPH else ""
  return {"model": dataclasses.asdict(model.config)} | ({"step_separator": separator} if separator else {})


def samples(config: Config) -> bool:
  """Whether the run is online: it learns from its own completions."""
  return "rewards" in config.options


def open_judge(config: Config, tokenizer: Tokenizer, dataset: Dataset | None, mesh: jax.sharding.Mesh) -> Judge | None:
  """The rewards of an online run's completions for a data set's prompts that Python functions give; None for none.

  Raises:
    InputError: an unknown reward, or one that lacks a library, or a field of the prompts' records.
  """
  if dataset is None or not samples(config):
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


def load_other(config: Config, source: str, model: Model, tokenizer: Tokenizer, abstract: Params) -> Params:
  """The newest parameters of the run at `source`, or those in that Hugging Face folder, of `model`.

  Raises:
    InputError: there are none, they are damaged, or were trained with another tokenizer.
  """
  if hub.is_folder(source):
    return weights.load(source, model, abstract)
  checkpoints = epath.Path(source).expanduser() / "checkpoints"
  check_tokenizer(load_metadata(checkpoints), tokenizer, config)
  return load_params(checkpoints, abstract)[0]


def check_tokenizer(metadata: dict[str, Any], tokenizer: Tokenizer, config: Config) -> None:
  """Raises InputError where a checkpoint was trained with another tokenizer."""
  if metadata["tokenizer"] != tokenizer.fingerprint:
    raise InputError(
      f"data.tokenizer={config.data.tokenizer} is not the tokenizer that the checkpoint was trained with; "
      "name that file, or bring it back"
    )


def evaluate(workdir: epath.PathLike, data: str = "", step: int | None = None) -> dict[str, Any]:
  """Held-out numbers of a run's checkpoint.

  A reward model of pairs gets accuracy with its interval, and calibration; any other run the means of its loss and
  metrics.

  Args:
    workdir: of the run.
    data: records; "" takes the run's own held-out ones.
    step: of the checkpoint; the newest if None.

  Raises:
    InputError: no run, no checkpoint, no held-out records.
  """
  workdir = epath.Path(workdir).expanduser()
  run = load(workdir, step)
  config = dataclasses.replace(run.config.data, eval=data) if data else run.config.data
  module = ALGORITHMS[run.config.algorithm.name]
  kind = module.data(run.config.algorithm.loss, **run.config.options)
  dataset = Dataset.open(config, run.tokenizer, kind, "eval", run.config.run.seed)
  numbers = {"workdir": str(workdir), "step": run.step, "examples": len(dataset)}
  with jax.set_mesh(run.mesh):
    if module.HEAD == "scalar" and kind == "preference":
      margins = preference.reward_margins(run.model, run.params, dataset.epoch())
      return numbers | preference.summary(list(margins.values()))
    algorithm = make_algorithm(run.config, run.model, run.tokenizer, workdir)
    frozen, running = beside_params(workdir, run, algorithm)
    means = make_mean_metrics(algorithm, open_judge(run.config, run.tokenizer, dataset, run.mesh))
    hparams = {name: jnp.float32(value) for name, value in run.config.hparams.items()}
    return numbers | means(frozen, run.params, hparams, dataset.epoch(), run.mesh, running)


def beside_params(workdir: epath.Path, run: Run, algorithm: Algorithm) -> tuple[dict[str, Params], HParams]:
  """The other trees that `prepare` takes, and the running statistics, as of the run's step."""
  constants = ConstantTrees(algorithm, run.model, run.mesh, run.model.split(run.params)[1])
  constant = {name: constants.load(name, workdir, run.metadata[name]) for name in algorithm.constant}
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(run.mesh))
  items = {
    "running": dict.fromkeys(algorithm.running, scalar),
    "synced": {name: algorithm.model_of(name, run.model).abstract(run.mesh) for name in algorithm.synced},
  }
  items = {name: tree for name, tree in items.items() if tree}
  saved = load_items(workdir / "checkpoints", items, step=run.step) if items else {}
  return constant | saved.get("synced", {}), saved.get("running", {})


def make_mean_metrics(algorithm: Algorithm, judge: Judge | None = None) -> Callable[..., dict[str, float]]:
  """Returns f(frozen, params, hparams, batches, mesh, running={}): means of loss and metrics over batches of this
  host's rows. What `prepare` makes of the running statistics is dropped after each batch.
  """
  prepare, loss = make_prepare(algorithm, judge), jax.jit(algorithm.loss)
  counts = jax.jit(algorithm.counts)

  def mean_metrics(frozen, params, hparams, batches, mesh, running=types.MappingProxyType({})):
    totals, count = collections.Counter(), 0.0
    for number, batch in enumerate(batches):
      batch = sharding.to_mesh(batch, mesh) | running
      key = jax.random.fold_in(jax.random.key(0), number)
      batch, _ = prepare(algorithm.trees(frozen, params, hparams), batch, key)
      batch |= counts(batch)
      value, metrics = loss(algorithm.beside(frozen) | params, batch, hparams)
      metrics, weight = jax.device_get((metrics | {"loss": value}, batch[algorithm.count]))
      count += float(weight)
      totals.update({name: float(x) * float(weight) for name, x in metrics.items()})
    return algorithm.finish({name: total / count for name, total in totals.items()})

  return mean_metrics


def check_writes(run: Run) -> None:
  """Raises InputError where a run's model gives no text."""
  if run.model.config.head != "none":
    raise InputError("a reward model scores and does not write; sample from a policy's run")


def sample(
  run: Run, prompts: Sequence[str | list[dict[str, str]]], *, num: int = 1, seed: int = 0, **options: Any
) -> list[list[Completion]]:
  """`num` completions for each prompt (a string, or messages) from a run's policy.

  Args:
    run: of a policy.
    prompts: what the user says, or a dialogue.
    num: completions per prompt.
    seed: other seeds, other completions.
    **options: max_new_tokens, temperature, top_k, top_p, batch_size of `generate.sample_text`.

  Raises:
    InputError: the run is a reward model's, or an option is out of range.
  """
  check_writes(run)
  dialogues = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
  rendered = [run.tokenizer.render(dialogue, add_generation_prompt=True) for dialogue in dialogues]
  with jax.set_mesh(run.mesh):
    completions = sample_text(
      run.model,
      run.params,
      run.tokenizer,
      [prompt for prompt in rendered for _ in range(num)],
      key=jax.random.key(seed),
      prompt_ids=[i for i in range(len(rendered)) for _ in range(num)],
      sample_ids=[k for _ in rendered for k in range(num)],
      **options,
    )
  return [completions[i : i + num] for i in range(0, len(completions), num)]
