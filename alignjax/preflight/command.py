"""`alignjax compile`: a config file, a topology and perhaps a published model, to lines and a JSON file."""

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath

from alignjax.data.tokenizer import load_tokenizer
from alignjax.model.huggingface.catalogue import sizes
from alignjax.preflight.run import Preflight, place_of, preflight, to_json, with_levers, with_rows
from alignjax.preflight.steps import Vocabulary
from alignjax.preflight.text import report
from alignjax.runs.build import with_sizes
from alignjax.runs.config import Config, load_config
from alignjax.system import output

VOCAB = 32_000


def compile_run(
  path: str,
  overrides: Sequence[str],
  topology: str,
  model: str = "",
  slices: int = 1,
  out: str = "",
  levers: bool = True,
) -> Preflight:
  """Prints what the compiler says of the run that a config file describes.

  Args:
    path: FILE.py or FILE.py:variant.
    overrides: as "data.rows=32".
    topology: as "v5e:4x4", or "cpu:8".
    model: a name of model/huggingface/catalogue.py, whose sizes take the place of the config's.
    slices: of the topology.
    out: a JSON file to write as well.
    levers: whether to look for what would make it fit.

  Raises:
    InputError: any of these, or the run itself.
  """
  if out:
    output.check_file(out, "--json", parents=False)
  jax.config.update("jax_enable_compilation_cache", False)  # it keeps no program of devices that are not there
  tell = lambda line: print(line, flush=True)
  config, vocabulary = planned(load_config(path, overrides), model, tell)
  place = place_of(topology, slices)
  if not any(override.startswith("data.rows=") for override in overrides):
    asked, config = config.data.rows, with_rows(config, place)
    if config.data.rows != asked:
      tell(f"data.rows={asked} does not divide over this mesh, so training refuses it: taken as {config.data.rows}")
  write = lambda found: output.write(out, to_json(found), "--json", parents=False) if out else None
  found = preflight(config, vocabulary, place, tell)
  tell("")
  tell("\n".join(report(found)))
  write(found)  # the levers take minutes
  if levers and not found.fits:
    tell("what would make it fit, each by itself:")
    found = with_levers(found, config, vocabulary, lambda line: tell(f"  {line}"))
    write(found)
  return found


def planned(config: Config, model: str = "", tell=print) -> tuple[Config, Vocabulary]:
  """The config with the sizes that the run would have, and its vocabulary; of a published model if one is named.

  Where the vocabulary is a tokenizer's that is not there, it is assumed to be `VOCAB`, which is told.

  Raises:
    InputError: no such model.
  """
  if model:
    config = dataclasses.replace(config, model=sizes(model, config.model))
  else:
    config = with_sizes(config, epath.Path("."))
  if config.model.vocab:
    return config, Vocabulary(config.model.vocab)
  if not epath.Path(config.data.tokenizer).expanduser().exists():
    tell(f"data.tokenizer={config.data.tokenizer} is not there: its vocabulary is taken as {VOCAB:,}")
    return config, Vocabulary(VOCAB)
  tokenizer = load_tokenizer(config.data.tokenizer)
  return config, Vocabulary(tokenizer.vocab_size, tokenizer.stop_id, tokenizer.pad_id)
