"""Writes given parameters as a run directory: one checkpoint, to sample from, evaluate, or name in `run.init`."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from alignjax.algorithms import ALGORITHMS
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.runs import defaults
from alignjax.runs.build import make_mesh, make_model
from alignjax.runs.checkpoint import save_single
from alignjax.runs.config import Config
from alignjax.system import hosts, output, sharding
from alignjax.training.optim import make_optimizer
from alignjax.training.step import create_state
from alignjax.types import HParams, Params


def begin(config: Config, params: Params, workdir: epath.PathLike) -> None:
  """Writes a run at step 0 with given parameters, such as those of your own pretraining.

  The run of a policy is written as one of sft, which needs no other trees.

  Args:
    config: names the model and the tokenizer that the parameters belong to.
    params: of the model, of any dtype; for a Flax module, the result of `model.flax.params_of`.
    workdir: an empty folder, or one to be made.

  Raises:
    InputError: the parameters are not those of the config's model, the tokenizer cannot be read, or `workdir` is not
      empty.
  """
  with whole(workdir, "workdir") as folder:
    if ALGORITHMS[config.algorithm.name].head == "none":
      config = config.replace({"algorithm.name": "sft", "algorithm.loss": ""})
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = make_mesh(config.mesh)
    abstract = make_model(config, tokenizer).abstract(mesh)
    _check_same(params, abstract)
    metadata = {"config": config.to_dict(), "tokenizer": tokenizer.fingerprint, "step": 0}

    def place(x, to):
      return jax.device_put(jnp.asarray(x, to.dtype), to.sharding)

    with jax.set_mesh(mesh):
      write(folder, config, jax.tree.map(place, params, abstract), mesh, metadata)


def write(
  out: epath.Path,
  config: Config,
  params: Params,
  mesh: jax.sharding.Mesh,
  metadata: Mapping[str, Any],
  running: HParams | None = None,
) -> None:
  """Writes a run with one checkpoint, whose optimizer is fresh; every process calls it.

  Args:
    out: its directory.
    config: of the run, written to config.json.
    params: on `mesh`.
    mesh: the current mesh.
    metadata: of the checkpoint, with its "step".
    running: the algorithm's running statistics; None: it has none.

  Raises:
    InputError: it cannot be written.
  """
  state = create_state(params, make_optimizer(config.optimizer), jax.random.key(config.run.seed), running or {})
  state = dataclasses.replace(state, step=jnp.int32(metadata["step"]))
  hparams = {name: jnp.float32(value) for name, value in sorted(config.hparams.items())}
  hparams = jax.device_put(hparams, sharding.replicated(mesh))
  save_single(out / "checkpoints", state, hparams, metadata)
  if jax.process_index() == 0:
    output.write_json(out / "config.json", {"config": config.to_dict(), defaults.KEY: defaults.GENERATION})


@contextlib.contextmanager
def whole(out: epath.PathLike, option: str) -> Iterator[epath.Path]:
  """Opens a context with a folder that becomes `out` at its end, whole or not at all; in a bucket it is `out` itself.

  Every process enters it; process 0 makes the folder. Enter it before the work, so that an `out` that cannot be written
  fails at once.

  Args:
    out: the folder to write.
    option: the command's option that names it, without dashes, for errors.

  Raises:
    InputError: `out` is not empty, cannot be written, or another process is writing it.
  """
  with hosts.held("output", lambda: output.folder(out, f"--{option}")):
    if output.local(out):
      yield output.beside(out)
    else:
      yield epath.Path(out)
    hosts.meet()
  hosts.meet()


def _check_same(params: Params, abstract: Params) -> None:
  """Raises InputError if parameters are missing, too many, or of another shape than those of the `abstract` model."""
  given = _shapes(params)
  wanted = _shapes(abstract)
  for name in [*wanted, *given]:
    if given.get(name) != wanted.get(name):
      raise InputError(
        f"parameter {name}: {wanted.get(name, 'not there')} in the model, {given.get(name, 'not there')} as given; "
        "give the model's"
      )


def _shapes(tree: Params) -> dict[str, list[int]]:
  """Returns the shapes of a tree's arrays, by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
