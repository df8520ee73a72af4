"""A run's model as a folder that transformers and vLLM load: weights, config and tokenizer; or its factors for PEFT."""

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
  """Writes the model of a run's checkpoint (the newest if None) in Hugging Face's layout, LoRA factors merged in.

  Args:
    workdir: of the run, of any kind; a value model beside a policy stays behind.
    out: a folder, made if missing.
    step: of the checkpoint.
    dtype: "float32", "bfloat16" or "float16" of the weights; "": as they are stored.

  Raises:
    InputError: no run, no family of transformers has such a model, or `out` holds something.
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
  """Writes the factors of a run's checkpoint (the newest if None) as a PEFT adapter, for a base of the name `base`.

  Raises:
    InputError: no LoRA run, no such checkpoint, or `out` holds something.
  """
  with whole(out, "out") as folder:
    run = load(workdir, step)
    if not run.model.trained:
      raise InputError(f"{workdir}: has no LoRA factors (lora.rank=0); leave --adapter out, or name a LoRA run")
    peft.save_adapter(folder, run.params, run.config.lora, base)


def plain(run: Run) -> tuple[Model, Params]:
  """The run's decoder by itself, and its parameters: factors are merged in, a quantised base is in arrays again.

  Raises:
    InputError: it is a module of one's own.
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
  """Copies the tokenizer's files as they are; a SentencePiece model's also as the files that other programs read.

  What lies beside a file of another name than theirs may be another tokenizer's.
  """
  pieces = isinstance(tokenizer, SentencePieceTokenizer)
  source, name = hub.local(path), "tokenizer.model" if pieces else "tokenizer.json"
  opened = source / name if source.is_dir() else source
  files = {name: hub.read_bytes(opened)}
  if pieces:
    try:
      files |= {name: text.encode() for name, text in sentencepiece_json.convert(tokenizer).items()}
    except InputError as error:
      print(f"{path}: no tokenizer.json: {error}")
  else:
    others = (*BESIDE, "tokenizer.model") if opened.name == name else BESIDE
    files |= {other: hub.read_bytes(opened.parent / other) for other in others if (opened.parent / other).exists()}
  for name, content in files.items():
    output.write(out / name, content)
