"""`alignjax compile`: estimates for a config file on a topology, as lines and as a JSON file."""

import dataclasses
import functools
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
  """Prints the compiler's estimates of the run that a config file describes, and returns them.

  Args:
    path: FILE.py or FILE.py:variant.
    overrides: as "data.rows=32"; without one of data.rows, the rows are rounded up to what the mesh divides.
    topology: as "v5e:4x4", or "cpu:8".
    model: a name in model/huggingface/catalogue.py, whose sizes replace those of the config; "": none.
    slices: of the topology.
    out: a JSON file to write too; "": none.
    levers: True to look for changes that make the run fit, if it does not.

  Raises:
    InputError: one of these is invalid, or the run itself.
  """
  if out:
    output.check_file(out, "--json", parents=False)
  jax.config.update("jax_enable_compilation_cache", False)  # it keeps no program of devices that are not present
  tell = functools.partial(print, flush=True)
  config, vocabulary = planned(load_config(path, overrides), model, tell)
  place = place_of(topology, slices)
  if not any(override.startswith("data.rows=") for override in overrides):
    rows = config.data.rows
    config = with_rows(config, place)
    if config.data.rows != rows:
      tell(f"data.rows={rows} does not divide over this mesh, so training refuses it: taken as {config.data.rows}")
  result = preflight(config, vocabulary, place, tell)
  tell("")
  tell("\n".join(report(result)))
  _write(result, out)  # before the levers, which take minutes
  if levers and not result.fits:
    tell("what would make it fit, each by itself:")
    result = with_levers(result, config, vocabulary, lambda line: tell(f"  {line}"))
    _write(result, out)
  return result


def _write(result: Preflight, out: str) -> None:
  """Writes the JSON file, if one is asked for."""
  if out:
    output.write(out, to_json(result), "--json", parents=False)


def planned(config: Config, model: str = "", tell=print) -> tuple[Config, Vocabulary]:
  """Returns the config with the sizes that the run would have, and its vocabulary.

  If the vocabulary is that of a tokenizer that does not exist here, it is assumed to be `VOCAB`, and `tell` says so.

  Args:
    config: of the run.
    model: the name of a published model, whose sizes replace those of the config; "": none.
    tell: takes a line of text.

  Raises:
    InputError: there is no such model, or the tokenizer or the model of run.init cannot be read.
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
