"""A run directory made of parameters: one checkpoint, to sample from, to evaluate, or for another's `run.init`."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
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
  """Writes a run at step 0 whose parameters are given, such as those of your own pretraining.

  A policy's stands as one of sft, which needs nothing beside it.

  Args:
    config: its model and tokenizer are what the parameters belong to.
    params: the model's, of any dtype; of a Flax module, what `model.flax.params_of` gives.
    workdir: empty, or to be made.

  Raises:
    InputError: the parameters are not those of the config's model, or there is something in `workdir`.
  """
  with whole(workdir, "workdir") as folder:
    if ALGORITHMS[config.algorithm.name].head == "none":
      config = config.replace(algorithm__name="sft", algorithm__loss="")
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = make_mesh(config.mesh)
    abstract = make_model(config, tokenizer).abstract(mesh)
    _check_same(params, abstract)
    place = lambda x, to: jax.device_put(jnp.asarray(x, to.dtype), to.sharding)
    metadata = {"config": config.to_dict(), "tokenizer": tokenizer.fingerprint, "step": 0}
    with jax.set_mesh(mesh):
      write(folder, config, jax.tree.map(place, params, abstract), mesh, metadata)


def write(
  out: epath.Path,
  config: Config,
  params: Params,
  mesh: jax.sharding.Mesh,
  metadata: Mapping[str, Any],
  running: HParams | None = None,
  first: Sequence[str] = (),
) -> None:
  """Writes a run with one checkpoint, whose optimizer is fresh.

  Args:
    out: its directory.
    config: what its config.json holds.
    params: on the mesh, which is the current one.
    mesh: theirs.
    metadata: of the checkpoint, with its "step".
    running: statistics beside the parameters.
    first: as for `make_optimizer`.
  """
  state = create_state(params, make_optimizer(config.optimizer, first), jax.random.key(config.run.seed), running or {})
  state = dataclasses.replace(state, step=jnp.int32(metadata["step"]))
  hparams = {name: jnp.float32(value) for name, value in sorted(config.hparams.items())}
  hparams = jax.device_put(hparams, sharding.replicated(mesh))
  save_single(out / "checkpoints", state, hparams, metadata)
  if jax.process_index() == 0:
    output.write_json(out / "config.json", {"config": config.to_dict(), defaults.KEY: defaults.GENERATION})


@contextlib.contextmanager
def whole(out: epath.PathLike, option: str) -> Iterator[epath.Path]:
  """Within, a folder that is `out` at the end, whole or not at all; every process enters, the first one makes it.

  Enter it before the work: where `out` cannot be written, the work is not begun.

  Raises:
    InputError: it holds something, cannot be written, or another process writes it now.
  """
  with hosts.held("output", lambda: output.folder(out, f"--{option}")):
    yield output.beside(out) if output.local(out) else epath.Path(out)
    hosts.meet()
  hosts.meet()


def _check_same(params: Params, abstract: Params) -> None:
  """Raises InputError where parameters are missing, too many, or of another shape."""
  names = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  found, wanted = names(params), names(abstract)
  for name in [*wanted, *found]:
    if found.get(name) != wanted.get(name):
      shape = lambda shapes: list(shapes[name]) if name in shapes else "not there"  # noqa: B023
      raise InputError(f"parameter {name}: {shape(wanted)} in the model, {shape(found)} as given; give the model's")
