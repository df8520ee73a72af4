"""Merges the LoRA factors of a run into its weights: `alignjax adapter merge`."""

import jax
from etils import epath

from alignjax.errors import InputError
from alignjax.model import lora, quantised
from alignjax.runs import new_run
from alignjax.runs import run as run_lib
from alignjax.runs.build import description, make_algorithm, make_model
from alignjax.runs.frozen_params import save_reference


def merge(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None) -> None:
  """Writes a run whose weights are a LoRA run's with the factors merged in, and whose reference is the LoRA run's base.

  Everything else that an evaluation needs, such as a teacher or a running mean, is copied. A quantised base is taken in
  its dequantised form, in `model.param_dtype`, because the factors were trained over that. The optimizer is fresh: the
  run is meant for evaluation, sampling, or another run's run.init.

  Args:
    workdir: of the LoRA run.
    out: a folder, made if missing.
    step: of the checkpoint; the run's result if None.

  Raises:
    InputError: no LoRA run, no such checkpoint, `out` is not empty, or the run's record names Python that may not be
      imported.
  """
  with new_run.whole(out, "out") as folder:
    run = run_lib.load(workdir, step)
    if not run.model.trained:
      raise InputError(f"{workdir}: has no LoRA factors (lora.rank=0); name the --workdir of a LoRA run")
    config = run.config.replace(lora__rank=0, lora__init="", lora__base="")
    model = make_model(config, run.tokenizer)
    metadata = {name: value for name, value in run.metadata.items() if name != "base"} | {"config": config.to_dict()}
    with jax.set_mesh(run.mesh):
      abstract = model.abstract(run.mesh)
      trained, held = run.model.split(run.params)
      held = quantised.release(held, model.config.param_dtype)
      merged = lora.merge(held | trained, run.config.lora)
      merged = jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), merged, abstract)
      workdir = epath.Path(workdir).expanduser()
      algorithm = make_algorithm(run.config, run.model, run.tokenizer, workdir)
      frozen, running = run_lib.beside_params(workdir, run, algorithm)
      for name, tree in frozen.items():
        described = description(name, algorithm.model_of(name, model), config, workdir)
        if name == "reference":
          tree = held
        metadata[name] = save_reference(folder / name, tree, described)
      first = algorithm.first.names if algorithm.first else ()
      new_run.write(folder, config, merged, run.mesh, metadata | {"step": run.step}, running, first)
