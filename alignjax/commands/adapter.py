"""Merges the LoRA factors of a run into its weights: `alignjax adapter merge`."""

import dataclasses
import warnings

import jax
from etils import epath

from alignjax.errors import InputError
from alignjax.model import lora, quantised
from alignjax.runs import new_run
from alignjax.runs import run as run_lib
from alignjax.runs.build import copied_models, make_model
from alignjax.runs.checkpoint import load_running
from alignjax.runs.frozen_params import load_reference, reference_metadata, save_reference
from alignjax.runs.workdir import replaced
from alignjax.system import sharding


def merge(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None) -> None:
  """Writes a run whose weights are a LoRA run's with the factors merged in, and whose reference is the LoRA run's base.

  Everything else that the checkpoint has or names, such as a running mean or a teacher, is copied; the loss itself is
  not needed. A quantised base is taken in its dequantised form, in `model.param_dtype`, because the factors were
  trained over that. The optimizer is fresh: the run is meant for evaluation, sampling, or another run's run.init.

  Args:
    workdir: of the LoRA run.
    out: a folder, made if missing.
    step: of the checkpoint; the run's result if None.

  Raises:
    InputError: no LoRA run, no such checkpoint, `out` is not empty, or a model's record names Python that may not be
      imported.
  """
  with new_run.whole(out, "out") as folder:
    run = run_lib.load(workdir, step)
    if not run.model.trained:
      raise InputError(f"{workdir}: has no LoRA factors (lora.rank=0); name the --workdir of a LoRA run")
    workdir = epath.Path(workdir).expanduser()
    config = run.config.replace({"lora.rank": 0, "lora.init": "", "lora.base": ""})
    model = make_model(config, run.tokenizer)
    metadata = {name: value for name, value in run.metadata.items() if name != "base"} | {"config": config.to_dict()}
    with jax.set_mesh(run.mesh):
      abstract = model.abstract(run.mesh)
      trained, held = run.model.split(run.params)
      held = quantised.release(held, model.config.param_dtype)
      merged = lora.merge(held | trained, run.config.lora)
      merged = jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), merged, abstract)
      if "reference" in metadata:
        described = {"model": dataclasses.asdict(model.config)}
        metadata["reference"] = save_reference(folder / "reference", held, described)
      for name, other in copied_models(run.config, workdir).items():
        tree = load_reference(workdir / name, other.frozen().abstract(run.mesh), metadata[name])
        metadata[name] = save_reference(folder / name, tree, reference_metadata(workdir / name))
      running = load_running(workdir / "checkpoints", sharding.replicated(run.mesh), step=run.step)
      for line in replaced(workdir):
        warnings.warn(line, stacklevel=2)
      new_run.write(folder, config, merged, run.mesh, metadata | {"step": run.step}, running)
