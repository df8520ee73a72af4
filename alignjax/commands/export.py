"""Exports a run's model as a folder for transformers and vLLM (weights, config, tokenizer), or its factors for PEFT."""

import json

import jax
from etils import epath

from alignjax.data import sentencepiece_json
from alignjax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from alignjax.data.tokenizer import Tokenizer
from alignjax.errors import InputError
from alignjax.model import Model, decoder, lora, quantised
from alignjax.model.huggingface import peft, weights
from alignjax.runs.new_run import whole
from alignjax.runs.run import Run, load
from alignjax.system import hub, output
from alignjax.types import Params

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
GENERATION = "generation_config.json"


def export(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None, dtype: str = "") -> None:
  """Writes the model of a run in Hugging Face's layout, with LoRA factors merged in.

  Args:
    workdir: of the run, of any kind; the value model of a policy's run is left out.
    out: a folder, made if missing.
    step: of the checkpoint; the run's result if None.
    dtype: "float32", "bfloat16" or "float16" of the weights; "": as they are stored.

  Raises:
    InputError: no run, no such checkpoint, no model family of transformers matches, the model is a user's own module,
      or `out` is not empty.
  """
  with whole(out, "out") as folder:
    run = load(workdir, step)
    model, params = plain(run)
    tokenizer = run.tokenizer
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    with jax.set_mesh(run.mesh):
      weights.save(folder, model, params, special, dtype)
    if jax.process_index() == 0:
      _write_tokenizer(folder, tokenizer, run.config.data.tokenizer)
      ends = sorted({tokenizer.stop_id, tokenizer.eos_id})  # a chat ends with the turn, a text with the end of text
      output.write(folder / GENERATION, json.dumps(special | {"eos_token_id": ends}, indent=2) + "\n")


def export_adapter(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None, base: str = "") -> None:
  """Writes the LoRA factors of a run, and its head if it has one, as a PEFT adapter.

  Args:
    workdir: of the run.
    out: a folder, made if missing.
    step: of the checkpoint; the run's result if None.
    base: the name by which PEFT finds the base model; "" leaves it to the adapter's user.

  Raises:
    InputError: no LoRA run, no such checkpoint, or `out` is not empty.
  """
  with whole(out, "out") as folder:
    run = load(workdir, step)
    if not run.model.trained:
      raise InputError(f"{workdir}: has no LoRA factors (lora.rank=0); leave --adapter out, or name a LoRA run")
    peft.save_adapter(folder, run.params, run.config.lora, base)


def plain(run: Run) -> tuple[Model, Params]:
  """Returns the run's decoder alone, and its parameters: LoRA factors are merged in, a quantised base is dequantised.

  Raises:
    InputError: the model is a user's own module.
  """
  if run.model.config.module:
    raise InputError(f"model.module={run.model.config.module}: Hugging Face has no layout for a module of one's own")
  model = decoder.make(run.model.config)
  params = {name: tree for name, tree in run.params.items() if name != "value"}
  if "lora" in params:
    with jax.set_mesh(run.mesh):
      trained, held = run.model.split(params)
      params = lora.merge(quantised.release(held, model.config.param_dtype) | trained, run.config.lora)
  return model, params


def _write_tokenizer(out: epath.Path, tokenizer: Tokenizer, path: str) -> None:
  """Copies the tokenizer's files unchanged; adds a SentencePiece model in the form that other programs read.

  Args:
    out: the folder to write to.
    tokenizer: of the run.
    path: its file or folder.
  """
  source = hub.local(path)
  if isinstance(tokenizer, SentencePieceTokenizer):
    files = {"tokenizer.model": hub.read_bytes(_file_of(source, "tokenizer.model"))}
    try:
      files |= {name: text.encode() for name, text in sentencepiece_json.convert(tokenizer).items()}
    except InputError as error:
      print(f"{path}: no tokenizer.json: {error}")
  else:
    opened = _file_of(source, "tokenizer.json")
    files = {"tokenizer.json": hub.read_bytes(opened)}
    neighbours = [*BESIDE]
    if opened.name == "tokenizer.json":  # next to a file of another name, the model may be another tokenizer's
      neighbours.append("tokenizer.model")
    for name in neighbours:
      if (opened.parent / name).exists():
        files[name] = hub.read_bytes(opened.parent / name)
  for name, content in files.items():
    output.write(out / name, content)


def _file_of(source: epath.Path, name: str) -> epath.Path:
  """Returns the file `name` if the source is a folder; otherwise the source itself."""
  return source / name if source.is_dir() else source
