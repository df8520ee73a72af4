"""Run directories, model folders and tokenizers that are none, or are damaged."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from tests import smoke
from tests.bad_inputs.case import TOKENIZER, Case, words

VERBS = {
  "evaluate": (),
  "generate": ("--prompt", "Hi"),
  "export": ("--out", "{}/out"),
  "domain": (),
  "report": (),
  "adapter merge": ("--out", "{}/out"),
  "best-of": ("--prompts", "{}/pairs.jsonl", "--out", "{}/out.jsonl", "--reward", "repetition"),
}


@functools.cache
def described(name: str = "sft") -> dict:
  """What config.json of a run holds."""
  return {"config": smoke.config(name).to_dict(), "versions": {}, "commit": ""}


def make_run(folder: Path, content: str | bytes | None = None) -> Path:
  """A run directory without a checkpoint; with this for its config.json."""
  folder.mkdir()
  content = json.dumps(described()) if content is None else content
  (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder


def damaged() -> dict[str, str | bytes]:
  """Contents of config.json that no run has."""
  good = json.dumps(described())
  changed = lambda **sections: json.dumps({"config": described()["config"] | sections})
  return {
    "empty": "",
    "cut": good[: len(good) // 2],
    "null": "null",
    "list": "[]",
    "text": '"x"',
    "number": "5",
    "no config": "{}",
    "config null": '{"config": null}',
    "config list": '{"config": [1]}',
    "binary": bytes(range(256)),
    "latin-1": b'{"config": "\xe9"}',
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "huge integer": '{"config": ' + "9" * 5000 + "}",
    "section null": changed(run=None),
    "section list": changed(model=[1]),
    "section unknown": changed(rum={}),
    "key unknown": changed(run={"stps": 5}),
    "value null": changed(run={"steps": None}),
    "value text": changed(run={"steps": "5"}),
    "value NaN": changed(optimizer={"learning_rate": float("nan")}),
    "algorithm unknown": changed(algorithm={"name": "nope"}),
    "algorithm list": changed(algorithm={"name": []}),
    "tokenizer absent": changed(data=described()["config"]["data"] | {"tokenizer": "absent.model"}),
  }


def configs() -> Iterator[Case]:
  """Every verb on run directories whose config.json is damaged."""
  verbs = list(VERBS.items())
  for number, (name, content) in enumerate(damaged().items()):
    for verb, more in (verbs[number % len(verbs)], verbs[(number + 3) % len(verbs)]):
      if verb == "report" and "config" in name:
        continue
      yield Case(
        f"{verb} of a run, config.json: {name}",
        _on_run(content, *verb.split(), "--workdir", "{}/run", *more),
        ("run", "absent.model"),
      )


def _on_run(content, *argv):
  def make(folder):
    make_run(folder / "run", content)
    return words(*argv, pairs__jsonl='{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')(folder)

  return make


def checkpoints() -> Iterator[Case]:
  """Run directories without checkpoints, or with folders that are none."""
  for verb, more in VERBS.items():
    argv = (*verb.split(), "--workdir", "{}/run", *more)
    yield Case(f"{verb} of a run without checkpoints", _on_run(None, *argv), ("run",))
    if verb not in ("report", "domain"):
      for step in ("0", "-1", "99", "99999999999999999999"):
        yield Case(f"{verb} --step {step}", _on_run(None, *argv, "--step", step), ("--step", "run"))
    for path in ("", "{}", "{}/absent", "/dev/null", "{}/pairs.jsonl"):
      yield Case(
        f"{verb} --workdir {path!r}", _on_run(None, *verb.split(), "--workdir", path, *more), (path, "--workdir")
      )


def tokenizers() -> Iterator[Case]:
  """Tokenizer files and folders that hold none."""
  for name, content in {
    "empty.model": b"",
    "text.model": b"mine\n",
    "cut.model": TOKENIZER.read_bytes()[:500],
    "tokenizer.json": b"{}",
    "list/tokenizer.json": b"[]",
    "cut/tokenizer.json": b'{"model": ',
    "null/tokenizer.json": b"null",
    "deep/tokenizer.json": b"[" * 100_000,
    "binary/tokenizer.json": bytes(range(256)),
    "type/tokenizer.json": b'{"model": {"type": "nope"}}',
    "vocab/tokenizer.json": b'{"model": {"type": "BPE", "vocab": 5, "merges": null}}',
    "other/config.json": b"{}",
  }.items():

    def make(folder, name=name, content=content):
      path = folder / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
      (folder / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
      given = path if path.parent == folder else path.parent
      return ["data", "check", "--input", str(folder / "pairs.jsonl"), "--tokenizer", str(given)]

    yield Case(f"data check --tokenizer {name}", make, (name.split("/")[0],))


def models() -> Iterator[Case]:
  """Folders that are no model of Hugging Face's."""
  for name, content in {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "no type": b"{}",
    "unknown type": b'{"model_type": "nope"}',
    "numbers as text": b'{"model_type": "llama", "vocab_size": "512"}',
    "null sizes": b'{"model_type": "llama", "vocab_size": null, "hidden_size": null}',
    "deep": b"[" * 100_000,
    "huge": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)),
  }.items():

    def make(folder, content=content):
      model = folder / "model"
      model.mkdir()
      (model / "config.json").write_bytes(content)
      (model / "model.safetensors").write_bytes(bytes(8))
      return ["generate", "--workdir", str(model), "--prompt", "Hi"]

    yield Case(f"generate of a model folder, config.json: {name}", make, ("model",))
