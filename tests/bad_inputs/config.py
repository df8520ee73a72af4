"""Configs: values of keys, overrides, files."""

import random
from collections.abc import Iterator

from alignjax.runs import config as config_lib
from tests import smoke
from tests.bad_inputs.case import Case, run, words

NAMES = ("sft", "dpo", "reward", "grpo", "ppo")
NO_INT = ("x", "1.5", "", "nan", "0x", "1e3", "ten", "None", "[1]", "--1")
NO_FLOAT = ("x", "", "1,5", "None", "[1.0]", "1..", "--1", "½½")
NO_BOOL = ("maybe", "2", "", "[]")
NO_NUMBER = ("nan", "inf", "-inf", "1e400")
WRONG = (None, [], {}, [1], {"a": 1}, "x", "", b"x", object(), (1,), 1 + 2j)


def values(seed: int, count: int) -> Iterator[Case]:
  """Overrides of every key of every config by what its type cannot read, and numbers that are none."""
  draw = random.Random(seed)
  found = []
  for name in NAMES:
    known = smoke.config(name).to_dict()
    for section, keys in known.items():
      for key, value in keys.items():
        found += [(name, f"{section}.{key}", bad) for bad in _unreadable(value)]
  draw.shuffle(found)
  taken, keys = set(), len({key for _, key, _ in found})
  for name, key, bad in found:  # a key once, before any comes again
    if key not in taken or len(taken) >= keys:
      taken.add(key)
      yield Case(f"{name}: {key}={bad}", run(name, f"{key}={bad}"), (key,))
      count -= 1
    if not count:
      return


def _unreadable(value) -> tuple[str, ...]:
  if isinstance(value, bool):
    return NO_BOOL
  if isinstance(value, int):
    return NO_INT
  return NO_FLOAT + NO_NUMBER if isinstance(value, float) else ()


def mappings(seed: int, count: int) -> Iterator[Case]:
  """Values of other types in a mapping that `resolve` takes, as a config file of one's own gives it."""
  draw = random.Random(seed)
  raw = smoke.config("dpo").to_dict()
  places = [(section, key) for section, keys in raw.items() for key in keys]
  draw.shuffle(places)
  for section, key in places[:count]:
    bad = draw.choice([wrong for wrong in WRONG if not isinstance(wrong, type(raw[section][key]))])
    yield Case(f"resolve {section}.{key}={bad!r:.20}", _resolve(section, key, bad), (f"{section}.{key}",))


def _resolve(section, key, value):
  changed = smoke.config("dpo").to_dict()
  changed[section] = changed[section] | {key: value}
  return lambda folder: lambda: config_lib.resolve(changed)


def shapes() -> Iterator[Case]:
  """Mappings that are no config at all."""
  good = smoke.config("dpo").to_dict()
  for raw in (None, [], "dpo", 5, {}, {"algorithm": None}, {"algorithm": []}, {"algorithm": {}}, {5: {}}):
    yield Case(f"resolve {raw!r}", lambda folder, raw=raw: lambda: config_lib.resolve(raw), ("config", "algorithm"))
  for section in good:
    for wrong in (None, [], "x", 5, {5: 1}, {"": 1}, {"näme": 1}):
      raw = good | {section: wrong}
      yield Case(
        f"resolve {section}: {wrong!r}", lambda folder, raw=raw: lambda: config_lib.resolve(raw), (section, "algorithm")
      )
  for name in ("", "dppo", "DPO", None, [], {}, 5):
    raw = good | {"algorithm": good["algorithm"] | {"name": name}}
    yield Case(
      f"resolve algorithm.name={name!r}", lambda folder, raw=raw: lambda: config_lib.resolve(raw), ("algorithm.name",)
    )
  for key in ("run.stps", "rum.steps", "steps", ".", "run", "run.steps.x", "run.", ".steps", "run__steps", "", 5, None):
    yield Case(
      f"replace {key!r}", lambda folder, key=key: lambda: smoke.config("dpo").replace({key: 1}), ("config", str(key))
    )
  for changes in (None, [], "run.steps=5", 5):
    yield Case(
      f"replace {changes!r}", lambda folder, changes=changes: lambda: smoke.config("dpo").replace(changes), ("config",)
    )


def overrides() -> Iterator[Case]:
  """Overrides that name no key, or have no value, or another syntax."""
  for override in (
    "--config.run.steps",
    "--config.run.steps 5",
    "--config.",
    "--config.=",
    "--config.run=5",
    "--config.run.=5",
    "--config.run.steps.x=5",
    "--config.run.stps=5",
    "--config..steps=5",
    "--config.runsteps=5",
    "--config.run.steps==5",
    "--config.Run.Steps=5",
    "--config.run.stéps=5",
    "--config.algorithm.beta=0,1",
    "--config.run.steps=5 6",
    "--config=other.py",
    "--run.steps=5",
    "run.steps=5",
    "--config.model={}",
    "--config.algorithm.__class__=5",
  ):
    yield Case(
      f"train {override}",
      lambda folder, override=override: [*run("dpo")(folder), override],
      ("--config", "unknown argument", "unrecognized", override),
    )
  yield Case("train --workdir twice, no value", lambda folder: [*run("dpo")(folder), "--workdir"], ("--workdir",))
  for key, value in CHOICES:
    yield Case(f"train {key}={value}", run("grpo" if key in ONLINE else "dpo", f"{key}={value}"), (key, value or "''"))


ONLINE = ("algorithm.rewards", "algorithm.advantages", "algorithm.reward_model")
CHOICES = (
  ("algorithm.name", "dppo"),
  ("algorithm.name", ""),
  ("algorithm.loss", "nope"),
  ("algorithm.loss", "sigmoid:nan"),
  ("algorithm.loss", "sigmoid:x"),
  ("algorithm.loss", "sigmoid+"),
  ("algorithm.loss", "+"),
  ("algorithm.loss", ":"),
  ("algorithm.rewards", "nope"),
  ("algorithm.rewards", "gsm8k:x"),
  ("algorithm.rewards", "gsm8k+gsm8k"),
  ("algorithm.rewards", "gsm8k:nan"),
  ("algorithm.rewards", "gsm8k:1e400"),
  ("algorithm.rewards", "no_module:f"),
  ("algorithm.rewards", ":f"),
  ("algorithm.rewards", "os:"),
  ("algorithm.rewards", "os:nope"),
  ("algorithm.rewards", "os:sep"),
  ("algorithm.rewards", ".:f"),
  ("algorithm.rewards", "a..b:f"),
  ("algorithm.advantages", "nope"),
  ("algorithm.reward_model", "{}/absent"),
  ("optimizer.name", "adamm"),
  ("optimizer.schedule", "cosin"),
  ("model.remat", "everything"),
  ("model.dtype", "float31"),
  ("model.param_dtype", "int8"),
  ("model.module", "nope"),
  ("model.module", "no_module:f"),
  ("model.module", "os:sep"),
  ("model.module", ":"),
  ("run.loggers", "wandbb"),
  ("run.loggers", "wandb;x"),
  ("run.keep_best", "eval/loss"),
  ("run.keep_best", "eval/loss:least"),
  ("run.early_stop", ":min"),
  ("run.early_stop", "eval/loss:"),
  ("run.init", "{}/absent"),
  ("run.init", "{}"),
  ("run.reference", "{}/absent"),
  ("data.train", ""),
  ("data.train", "{}/absent.jsonl"),
  ("data.train", "{}"),
  ("data.train", "/dev/null"),
  ("data.train", "{}/*.jsonl"),
  ("data.train", ","),
  ("data.train", "x" * 5000),
  ("data.eval", "{}/absent.jsonl"),
  ("data.tokenizer", " "),
  ("data.tokenizer", "{}"),
  ("data.tokenizer", "{}/absent"),
  ("data.tokenizer", "/dev/null"),
  ("data.tokenizer", "x" * 5000),
  ("mesh.fsdp", "3"),
  ("mesh.tensor", "7"),
  ("mesh.data", "16"),
)

FILES = {
  "empty": "",
  "syntax error": "def get_config(:\n",
  "indentation": "def get_config():\nreturn 1\n",
  "no get_config": "x = 1\n",
  "get_config is a number": "get_config = 5\n",
  "returns None": "def get_config(variant=''):\n  return None\n",
  "returns a list": "def get_config(variant=''):\n  return [1]\n",
  "returns a number": "def get_config(variant=''):\n  return 5\n",
  "returns text": "def get_config(variant=''):\n  return 'dpo'\n",
  "returns an empty mapping": "def get_config(variant=''):\n  return {}\n",
  "returns sections that are none": "def get_config(variant=''):\n  return {'run': 5}\n",
  "returns keys that are numbers": "def get_config(variant=''):\n  return {5: {}}\n",
  "raises": "def get_config(variant=''):\n  raise RuntimeError('of mine')\n",
  "raises KeyError": "def get_config(variant=''):\n  return {}['absent']\n",
  "raises with several lines": "def get_config(variant=''):\n  raise RuntimeError('of\\nmine')\n",
  "raises KeyboardInterrupt of its own kind": "class Mine(BaseException): pass\nraise Mine\n",
  "exits": "import sys\nsys.exit()\n",
  "exits with 0": "import sys\ndef get_config(variant=''):\n  sys.exit(0)\n",
  "exits with text": "def get_config(variant=''):\n  raise SystemExit('mine')\n",
  "takes no variant": "def get_config():\n  return {}\n",
  "needs two": "def get_config(a, b):\n  return {}\n",
  "import that is absent": "import absent_module_of_mine\n",
  "import that is relative": "from . import x\n",
  "recursion": "def get_config(variant=''):\n  return get_config(variant)\n",
  "assertion": "assert False\n",
  "undefined name": "x = y\n",
  "holds itself": "def get_config(variant=''):\n  d = {}\n  d['run'] = d\n  return d\n",
  "null bytes": b"x = 1\0\n",
  "wrong encoding": b"# caf\xe9\nx = 1\n",
  "binary": bytes(range(256)),
  "json": '{"run": {"steps": 5}}',
  "yaml": "run:\n  steps: 5\n",
  "deep": "x = " + "(" * 3000 + ")" * 3000,
  "unicode digits": "def get_config(variant=''):\n  return {'run': {'steps': ٣٣٣x}}\n",
  "value that is a function": "def get_config(variant=''):\n"
  "  return {'algorithm': {'name': 'sft'}, 'run': {'steps': print}}\n",
  "value that is an array": "import numpy\ndef get_config(variant=''):\n"
  "  return {'algorithm': {'name': 'sft'}, 'run': {'steps': numpy.zeros(3)}}\n",
  "value with a null byte": "def get_config(variant=''):\n"
  "  return {'algorithm': {'name': 'sft'}, 'run': {'steps': 1}, 'data': {'train': 'a\\0b', 'tokenizer': 'a\\0b'}}\n",
  "steps beyond int64": "def get_config(variant=''):\n"
  "  return {'algorithm': {'name': 'sft'}, 'run': {'steps': 1 << 80}}\n",
  "sections at other places": "def get_config(variant=''):\n  return {'config': {'run': {}}}\n",
}


def files() -> Iterator[Case]:
  """Config files that give no config."""
  for name, content in FILES.items():
    for verb in ("train",) if len(name) % 2 else ("train", "iterate"):
      more = {"train": (), "iterate": ("--rounds", "1", "--reward", "repetition")}[verb]
      argv = (verb, "--config", "{}/mine.py", "--workdir", "{}/out/run", *more)
      yield Case(
        f"{verb} config file: {name}",
        words(*argv, mine__py=content),
        ("mine.py", "algorithm.name", "config", "run.", "data."),
      )
  for verb, more in (
    ("train", ()),
    ("iterate", ("--rounds", "1", "--reward", "repetition")),
    ("retrain", ("--rounds", "1")),
    ("sweep", ("--sweep", "lr=1e-3,1e-4")),
    ("compile", ("--topology", "cpu:8")),
  ):
    workdir = () if verb == "compile" else ("--workdir", "{}/out/run")
    for path in ("", ":", "{}", "{}:smoke", "{}/absent.py", "/dev/null", "{}/loop", "{}/fifo", "{}/" + "x" * 300):
      yield Case(
        f"{verb} --config {path[:20]!r}",
        lambda folder, argv=(verb, "--config", path, *workdir, *more): special(folder) or words(*argv)(folder),
        ("config",),
      )


def special(folder) -> None:
  """A symbolic link to itself, and a pipe that nobody writes to."""
  import os

  (folder / "loop").symlink_to(folder / "loop")
  os.mkfifo(folder / "fifo")


def drawn(seed: int, count: int) -> Iterator[Case]:
  """Some cases of all generators here."""
  cases = [*values(seed, count), *mappings(seed, count), *shapes(), *overrides(), *files()]
  random.Random(seed).shuffle(cases)
  yield from cases[:count]
