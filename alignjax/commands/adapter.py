"""A run of LoRA factors as an ordinary one, with the factors in its weights."""

import jax
from etils import epath

from alignjax.errors import InputError
from alignjax.model import lora, quantised
from alignjax.runs import new_run
from alignjax.runs import run as run_lib
from alignjax.runs.build import description, make_algorithm, make_model
from alignjax.runs.frozen_params import save_reference


def merge(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None) -> None:
  """Writes a run whose weights are those of a LoRA run with its factors merged in, and whose reference is its base.

  What else an evaluation needs, such as a teacher or a running mean, goes with it. A quantised base is taken as it was
  held, in `model.param_dtype`: the factors were trained over that. Its optimizer is fresh: it is there to be evaluated,
  sampled from, or named by another's run.init.

  Raises:
    InputError: no LoRA run, no such checkpoint, or `out` holds something.
  """
  with new_run.whole(out, "out") as folder:
    found = run_lib.load(workdir, step)
    if not found.model.trained:
      raise InputError(f"{workdir}: has no LoRA factors (lora.rank=0); name the --workdir of a LoRA run")
    config = found.config.replace(lora__rank=0, lora__init="", lora__base="")
    model = make_model(config, found.tokenizer)
    metadata = {name: value for name, value in found.metadata.items() if name != "base"} | {"config": config.to_dict()}
    with jax.set_mesh(found.mesh):
      abstract = model.abstract(found.mesh)
      trained, held = found.model.split(found.params)
      held = quantised.release(held, model.config.param_dtype)
      merged = lora.merge(held | trained, found.config.lora)
      merged = jax.tree.map(lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), merged, abstract)
      workdir = epath.Path(workdir).expanduser()
      algorithm = make_algorithm(found.config, found.model, found.tokenizer, workdir)
      frozen, running = run_lib.beside_params(workdir, found, algorithm)
      for name, tree in frozen.items():
        described = description(name, algorithm.model_of(name, model), config, workdir)
        metadata[name] = save_reference(folder / name, held if name == "reference" else tree, described)
      first = algorithm.first.names if algorithm.first else ()
      new_run.write(folder, config, merged, found.mesh, metadata | {"step": found.step}, running, first)
