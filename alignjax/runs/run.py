"""Loads a run directory to use its model, parameters and tokenizer."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from alignjax.algorithms import Algorithm
from alignjax.data.field import Dialogue, as_dialogue
from alignjax.data.tokenizer import Tokenizer, load_tokenizer
from alignjax.errors import InputError, check_path
from alignjax.model.decoder import Model
from alignjax.model.huggingface import weights
from alignjax.runs.build import make_model
from alignjax.runs.checkpoint import load_items, load_metadata, load_params
from alignjax.runs.config import Config, resolve
from alignjax.runs.frozen_params import ConstantTrees
from alignjax.runs.initial_params import load_base
from alignjax.runs.trust import check_code, permitted, trusting
from alignjax.runs.workdir import check_tokenizer, read_config, replaced, without_permissions
from alignjax.sampling.generate import Completion, sample_text
from alignjax.system import hub, ranges, sharding
from alignjax.training import earlier
from alignjax.types import HParams, Params


class Run(NamedTuple):
  """A trained model, with its parameters, tokenizer and config.

  Attributes:
    config: of the run.
    step: of the parameters.
    params: on the mesh.
    model, tokenizer, mesh: to use the parameters with.
    metrics: of the last step and the last evaluation (`eval/...`); empty for a run that was loaded.
    metadata: of its checkpoint.
    stopped: True if a signal ended the training before its last step.
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


def load(workdir: epath.PathLike, step: int | None = None, *, trust_code: bool | Collection[str] = False) -> Run:
  """Loads the run in `workdir`, with the parameters of one checkpoint, on a mesh of all devices.

  A Hugging Face folder is loaded as a run that has taken no step.

  Args:
    workdir: of the run, or the folder.
    step: of the checkpoint; the run's result if None.
    trust_code: True permits the import of the Python that the run's own record names (model.module, a loss); a name or
      a collection of names permits these alone. It can do anything; the environment variable
      ALIGNJAX_TRUST_RUN_CODE=1 permits it too.

  Raises:
    InputError: not a run directory, no such checkpoint, a damaged one, a tokenizer that is missing or has changed, or
      Python that may not be imported.
  """
  check_path("workdir", workdir)
  if step is not None:
    ranges.check("step", step, ranges.Whole)
  if hub.is_folder(workdir):
    return _load_folder(str(workdir), step)
  workdir = epath.Path(workdir).expanduser()
  with trusting(trust_code is True):
    given = permitted(trust_code)
    config = without_permissions(read_config(workdir, given))
    check_code(workdir / "config.json", [config.model.module], given)
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
  """Loads a Hugging Face folder as a run that has taken no step; errors as in `load`."""
  if step is not None:
    raise InputError(f"{path}: holds a model's weights and no run, so it has no step {step}; leave the step out")
  model_config = weights.read_config(path)
  folder = str(hub.local(path))
  config = resolve(
    {
      "model": dataclasses.asdict(model_config),
      "data": {"tokenizer": folder},
      "algorithm": {"name": "reward" if model_config.head == "scalar" else "sft"},
      "run": {"init": path, "steps": 1},
    }
  )
  tokenizer = load_tokenizer(folder)
  model = make_model(config, tokenizer)
  mesh = sharding.make_mesh()
  params = weights.load(path, model, model.abstract(mesh))
  return Run(config, 0, params, model, tokenizer, mesh, {}, {})


def rows_of(run: Run) -> int:
  """Returns the rows of a batch of the run's data, rounded up to what its mesh splits (not always that of training)."""
  shards = sharding.ways("batch", run.mesh)
  return -(-run.config.data.rows // shards) * shards


def beside_params(workdir: epath.Path, run: Run, algorithm: Algorithm) -> tuple[dict[str, Params], HParams]:
  """Loads the other trees that `prepare` takes, and the running statistics, of the run's step.

  A warning names each value that differs from the stored one.

  Args:
    workdir: of the run.
    run: loaded from there.
    algorithm: of the run, from `make_algorithm`.

  Returns:
    The constant and the synced trees by name, and the running statistics by name.

  Raises:
    InputError: one of them is missing or damaged.
  """
  constants = ConstantTrees(algorithm, run.model, run.mesh, run.model.split(run.params)[1])
  constant = {name: constants.load(name, workdir, run.metadata[name]) for name in algorithm.constant}
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(run.mesh))
  items = {
    "running": dict.fromkeys(algorithm.running, scalar),
    "synced": {name: algorithm.model_of(name, run.model).abstract(run.mesh) for name in algorithm.synced},
  }
  items = {name: tree for name, tree in items.items() if tree}
  fresh = [f"running/{name}" for name in algorithm.running]
  saved = {}
  if items:
    saved = load_items(workdir / "checkpoints", items, step=run.step, fresh=fresh)
  running, notes = earlier.fill(saved.get("running", {}), items.get("running", {}), algorithm)
  for line in (*replaced(workdir), *notes):
    warnings.warn(line, stacklevel=2)
  return constant | saved.get("synced", {}), running


def check_writes(run: Run) -> None:
  """Raises InputError if a run's model writes no text, because it is a reward model."""
  if run.model.config.head != "none":
    raise InputError("a reward model scores and does not write; sample from a policy's run")


def sample(
  run: Run, prompts: Sequence[str | list[dict[str, str]]], *, num: int = 1, seed: int = 0, **options: Any
) -> list[list[Completion]]:
  """Samples `num` completions for each prompt from a run's policy.

  Args:
    run: of a policy.
    prompts: a string, which is a user's turn, or the messages of a dialogue.
    num: completions per prompt.
    seed: other seeds give other completions.
    **options: max_new_tokens (128 if left out), temperature, top_k, top_p, batch_size of `generate.sample_text`.

  Raises:
    InputError: the run is a reward model's, a prompt is malformed, or an option is unknown or out of range.
  """
  if not isinstance(run, Run):
    raise InputError(f"run is a {type(run).__name__}; give what load or fit returns")
  check_writes(run)
  ranges.check("num", num, ranges.Count)
  ranges.check("seed", seed, ranges.Seed)
  if unknown := sorted(options.keys() - SAMPLING):
    raise InputError(f"{unknown[0]}={options.get(unknown[0])!r}: no such option; use {', '.join(SAMPLING)}")
  rendered = [_rendered(run, messages, f"prompts[{i}]") for i, messages in enumerate(_dialogues(prompts))]
  with jax.set_mesh(run.mesh):
    completions = sample_text(
      run.model,
      run.params,
      run.tokenizer,
      [prompt for prompt in rendered for _ in range(num)],
      key=jax.random.key(seed),
      prompt_ids=[i for i in range(len(rendered)) for _ in range(num)],
      sample_ids=[k for _ in rendered for k in range(num)],
      **({"max_new_tokens": 128} | options),
    )
  return [completions[i : i + num] for i in range(0, len(completions), num)]


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "batch_size")


def _dialogues(prompts: Any) -> list[Dialogue]:
  """Returns the prompts of `sample` as messages."""
  if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
    raise InputError(f"prompts is a {type(prompts).__name__}; it must be a list of texts or dialogues, as in ['Why?']")
  dialogues = []
  for place, prompt in enumerate(prompts):
    if isinstance(prompt, Mapping):
      raise InputError(f"prompts[{place}] is a message; each must be a text or a list of messages: write [[...]]")
    dialogues.append(as_dialogue(prompt, f"prompts[{place}]", "user"))
    if not dialogues[-1]:
      raise InputError(f"prompts[{place}] has no messages; each must be a text or a list of messages")
  return dialogues


def _rendered(run: Run, messages: Dialogue, field: str) -> list[int]:
  """Renders a prompt as tokens, up to the start of the answer; `field` names it in errors."""
  if not any(message["content"].strip() for message in messages):
    raise InputError(f"{field}: the prompt is empty; write something")
  try:
    return run.tokenizer.render(messages, add_generation_prompt=True)
  except InputError as error:
    raise InputError(f"{field}: {error}") from error
