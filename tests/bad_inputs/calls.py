"""Calls of the Python API with something else than they take."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax

import alignjax
from alignjax.data.tokenizer import load_tokenizer
from alignjax.runs.build import make_model
from alignjax.runs.run import Run
from alignjax.system import sharding
from alignjax.train import fit
from tests import smoke
from tests.bad_inputs.case import Case


@functools.cache
def policy() -> Run:
  """A run that has no weights, for calls that must end before they are needed."""
  config = smoke.config("sft")
  tokenizer = load_tokenizer(config.data.tokenizer)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Run(config, 0, {}, make_model(config, tokenizer), tokenizer, mesh, {}, {})


def calls() -> Iterator[Case]:
  """Arguments of other types, empty, or out of range."""
  given = lambda function: lambda folder: lambda: function(folder)
  for prompts in (
    "text", b"text", None, 5, {}, {"a": 1}, [5], [None], [""], ["  "], [b"x"], [[]], [[5]], [{}], [{"role": "user"}],
    [[{"role": "user"}]], [[{"content": "Hi"}]], [[{"role": "nobody", "content": "Hi"}]], ["\ud800"],
    [[{"role": "user", "content": 5}]], [["Hi"]], "", Path("x"),
  ):  # fmt: skip
    yield Case(f"sample {prompts!r}", given(lambda _, p=prompts: alignjax.sample(policy(), p)), ("prompt",))
  for options in (
    {"num": 0}, {"num": -1}, {"num": "2"}, {"num": 1.5}, {"num": None}, {"seed": "x"}, {"seed": -1}, {"seed": 2**70},
    {"seed": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": -5}, {"max_new_tokens": "8"}, {"max_new_tokens": 2**70},
    {"max_new_tokens": None}, {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": "hot"}, {"temperature": None}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": "x"}, {"top_p": 0.0},
    {"top_p": 1.5}, {"top_p": float("nan")}, {"top_p": "x"}, {"batch_size": 0}, {"batch_size": -1},
    {"batch_size": "x"}, {"max_tokens": 5}, {"nope": 1},
  ):  # fmt: skip
    name = next(iter(options))
    yield Case(f"sample {options}", given(lambda _, o=options: alignjax.sample(policy(), ["Hi"], **o)), (name,))
  for run in (None, "run", 5, {}, Path("run")):
    yield Case(f"sample of {run!r}", given(lambda _, r=run: alignjax.sample(r, ["Hi"])), ("run",))
  for config in (None, {}, "configs/dpo.py", 5, {"run": {}}):
    yield Case(f"fit {config!r}", given(lambda folder, c=config: fit(c, folder / "run")), ("config",))
  for workdir in (None, 5, "", b"x", [], "a\0b", {}):
    yield Case(f"fit in {workdir!r}", given(lambda _, w=workdir: fit(smoke.config("sft"), w)), ("workdir", "null byte"))
  for workdir in (None, 5, "", b"x", [], "a\0b", "absent", "x" * 5000, {}):
    yield Case(f"load {workdir!r:.20}", given(lambda _, w=workdir: alignjax.load(w)), ("workdir", "run", "x"))
    yield Case(f"evaluate {workdir!r:.20}", given(lambda _, w=workdir: alignjax.evaluate(w)), ("workdir", "run", "x"))
  for path in (None, 5, "", b"x", [], "a\0b", "absent.py", {}):
    yield Case(f"load_config {path!r}", given(lambda _, p=path: alignjax.load_config(p)), ("config",))
  for overrides in ("algorithm.beta=0.1", None, 5, [5], [None], ["algorithm.beta"], [""], ["=1"], [b"run.steps=1"]):
    yield Case(
      f"load_config with {overrides!r}",
      given(lambda _, o=overrides: alignjax.load_config(f"{smoke.CONFIGS}/dpo.py:smoke", o)),
      ("override", "config"),
    )
  for sizes in ({"data": 0}, {"data": -1, "fsdp": -1}, {"fsdp": 3}, {"tensor": "x"}, {"data": 1.5}, {"fsdp": None}):
    yield Case(f"make_mesh {sizes}", given(lambda _, s=sizes: alignjax.make_mesh(**s)), ("mesh",))
  for inputs in (None, 5, [5], ["absent.jsonl"], "absent.jsonl", [""], [None]):
    yield Case(
      f"read_texts {inputs!r}", given(lambda _, i=inputs: list(alignjax.read_texts(i))), ("input", "absent", "file")
    )
  for texts in ([], None, 5, [5], [None], [""], "text", [b"x"]):
    yield Case(
      f"train_tokenizer {texts!r}",
      given(lambda folder, t=texts: alignjax.train_tokenizer(t, folder / "out.model", 300)),
      ("text", "out.model"),
    )
  for vocab in (0, -1, "x", None, 1.5, 2**70):
    yield Case(
      f"train_tokenizer of {vocab!r} pieces",
      given(lambda folder, v=vocab: alignjax.train_tokenizer(["some text"] * 9, folder / "out.model", v)),
      ("vocab", "pieces"),
    )
  for out in (None, 5, "", b"x", "a\0b"):
    yield Case(
      f"testbed.write to {out!r}", given(lambda _, o=out: alignjax.testbed.write(o, sft=1, preference=1)), ("--out",)
    )
  for options in ({"seed": -1}, {"seed": "x"}, {"sft": -1}, {"sft": "x"}, {"population": "nope"}, {"prompts": 1.5}):
    name = next(iter(options))
    yield Case(
      f"testbed.write {options}",
      given(lambda folder, o=options: alignjax.testbed.write(folder / "out", **({"sft": 1, "preference": 1} | o))),
      (name, "nope"),
    )
