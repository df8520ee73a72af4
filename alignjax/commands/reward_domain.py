"""Fits the in-distribution region (the domain) of a reward model, for online runs: `alignjax domain`."""

import itertools
from collections.abc import Collection

import jax
import jax.numpy as jnp
from etils import epath

from alignjax.algorithms import reward_domain as domain_lib
from alignjax.data.loader import Dataset
from alignjax.errors import InputError
from alignjax.evaluation import reward_domain
from alignjax.runs import new_run
from alignjax.runs import run as run_lib
from alignjax.runs.build import records_of
from alignjax.runs.checkpoint import params_digest


def write(
  workdir: epath.PathLike,
  out: epath.PathLike = "",
  share: float = 0.01,
  batches: int = 200,
  *,
  trust_code: bool | Collection[str] = False,
) -> epath.Path:
  """Fits the domain of a reward model to the data that its run was trained on, and returns its directory.

  Args:
    workdir: of a reward model of pairs, with held-out pairs.
    out: a folder, made if missing; WORKDIR/domain if empty.
    share: of the held-out texts that may lie outside.
    batches: the most batches of each data set to read.
    trust_code: as for `run.load`.

  Raises:
    InputError: no such run, no held-out pairs or too few, or `out` is not empty.
  """
  workdir = epath.Path(workdir).expanduser()
  out = epath.Path(out or workdir / "domain").expanduser()
  with new_run.whole(out, "out") as folder:
    run = run_lib.load(workdir, trust_code=trust_code)
    if run.model.config.head != "scalar" or records_of(run.config) != "preference":
      raise InputError(f"{workdir}: is not the run of a reward model of pairs; name one")
    with jax.set_mesh(run.mesh):
      texts = {}
      for split in ("train", "eval"):
        dataset = Dataset.open(run.config.data, run.tokenizer, "preference", split, run.config.run.seed)
        first_batches = itertools.islice(dataset.epoch(run_lib.rows_of(run)), batches)
        texts[split] = reward_domain.measure(run.model, run.params, first_batches)
      try:
        fitted = reward_domain.fit(texts["train"], texts["eval"], share)
      except ValueError as error:
        raise InputError(f"{workdir}: {error}; give it more pairs, or a larger --share") from error
      _save(run, fitted, folder, params_digest(workdir / "checkpoints", run.step))
  return out


def _save(run: run_lib.Run, fitted: dict, out: epath.Path, reward_model: str) -> None:
  """Writes the domain as the checkpoint of a run with the reward model's config; its metadata names that model.

  Args:
    run: of the reward model.
    fitted: the domain's parameters.
    out: the run directory to write.
    reward_model: the digest of the reward model's parameters.
  """
  abstract = domain_lib.of(run.model).abstract(run.mesh)
  params = jax.tree.map(lambda x, to: jax.device_put(jnp.asarray(x, to.dtype), to.sharding), fitted, abstract)
  new_run.write(out, run.config, params, run.mesh, run.metadata | {"step": run.step, "domain_of": reward_model})
