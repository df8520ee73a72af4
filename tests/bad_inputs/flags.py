"""Flags of every command: values of another type or out of range, none at all, paths that lead nowhere."""

import argparse
import os
import random
from collections.abc import Iterator

from alignjax.commands import arguments
from tests.bad_inputs.case import GOOD, TOKENIZER, Case, words

# What a command needs before the flag in question; {} is the case's folder, in which `prepare` has put things.
COMMANDS = {
  "quickstart": ("--workdir", "{}/out"),
  "evaluate": ("--workdir", "{}/run"),
  "generate": ("--workdir", "{}/run", "--prompt", "Hi"),
  "serve": ("--workdir", "{}/run"),
  "best-of": ("--workdir", "{}/run", "--prompts", "{}/pairs.jsonl", "--out", "{}/out.jsonl", "--reward", "repetition"),
  "iterate": (
    *("--config", "configs/dpo.py:smoke", "--workdir", "{}/out", "--rounds", "1", "--reward", "repetition"),
    "--config.run.init={}/run",
  ),
  "retrain": (
    *("--config", "configs/ppo.py:smoke", "--workdir", "{}/out", "--rounds", "1", "--reward", "repetition"),
    "--config.run.init={}/run",
  ),
  "sweep": ("--config", "configs/dpo.py:smoke", "--workdir", "{}/out", "--sweep", "lr=1e-3,1e-4"),
  "compile": ("--config", "configs/dpo.py:smoke", "--topology", "cpu:8"),
  "export": ("--workdir", "{}/run", "--out", "{}/out"),
  "adapter merge": ("--workdir", "{}/run", "--out", "{}/out"),
  "domain": ("--workdir", "{}/run"),
  "report": ("--workdir", "{}/run"),
  "data testbed": ("--out", "{}/out"),
  "data tokenizer": ("--input", "{}/pairs.jsonl", "--out", "{}/out.model"),
  "data check": ("--input", "{}/pairs.jsonl", "--tokenizer", str(TOKENIZER)),
}
NO_NUMBER = ("x", "", "1,5", "None", "[1]", "--1", "1e", "½", "9" * 5000 + "x")
LESS = {int: ("-1", "-99999999999999999999", "99999999999999999999"), float: ("-1", "nan", "inf", "-inf", "1e999")}
MAY_BE = {"temperature": ("1e999",)}
ANY = {"seed", "missing_eos_penalty"}  # below 0 is refused elsewhere, or means something
INPUTS = ("workdir", "data", "prompts", "eval_prompts", "config", "input", "tokenizer", "reward_model")
OUTPUTS = ("out", "json")


def parsers(parser: argparse.ArgumentParser | None = None, name: str = "") -> Iterator[tuple[str, list]]:
  """Each command with its flags."""
  for action in (parser or arguments.make_parser())._actions:
    if isinstance(action, argparse._SubParsersAction):
      for word, sub in action.choices.items():
        yield from parsers(sub, f"{name} {word}".strip())
        flags = [one for one in sub._actions if one.option_strings and one.dest != "help"]
        full = f"{name} {word}".strip()
        if full in COMMANDS:
          yield full, flags


def prepare(folder) -> None:
  """What stands in a case's folder: good pairs, a run directory without checkpoints, and paths that lead nowhere."""
  from tests.bad_inputs.runs import make_run

  (folder / "pairs.jsonl").write_text(GOOD * 4)
  make_run(folder / "run")
  (folder / "folder").mkdir()
  (folder / "file").write_text("mine\n")
  (folder / "loop").symlink_to(folder / "loop")
  os.mkfifo(folder / "fifo")


def of(command: str, *more: str):
  """The command with further flags."""

  def make(folder):
    prepare(folder)
    return [word.replace("{}", str(folder)) for word in (*command.split(), *COMMANDS[command], *more)]

  return make


def values(seed: int, count: int) -> Iterator[Case]:
  """Numbers that are none, or out of any range; names that are not among those to choose from."""
  draw = random.Random(seed)
  found = []
  for command, flags in parsers():
    for flag in flags:
      option = flag.option_strings[0]
      if flag.choices:
        found += [(command, option, bad) for bad in ("nope", "", "5")]
      elif flag.type in LESS:
        found += [(command, option, bad) for bad in (draw.choice(NO_NUMBER), *LESS[flag.type])]
      elif flag.dest == "reward_settings":
        found += [
          (command, option, bad) for bad in ("[1]", "5", "{", "null", '"x"', "[" * 100_000, '{"n": ' + "9" * 5000 + "}")
        ]
  draw.shuffle(found)
  for command, option, bad in found[:count]:
    yield Case(f"{command} {option}={bad[:30]}", of(command, f"{option}={bad}"), (option,))


def missing() -> Iterator[Case]:
  """A flag without its value, a required one left away, one that is unknown."""
  for command, flags in parsers():
    own = COMMANDS[command]
    taking = [flag for flag in flags if flag.nargs not in (0, "?")]
    last = taking[-1].option_strings[0]
    yield Case(f"{command} {last} without a value", of(command, last), (last,))
    yield Case(f"{command} --nope", of(command, "--nope"), ("--nope",))
    yield Case(f"{command} and a word", of(command, "word"), ("word",))
    for flag in flags:
      if flag.required:
        option = flag.option_strings[0]
        place = own.index(option)
        rest = [*own[:place], *own[place + 2 :]]
        yield Case(
          f"{command} without {option}",
          words(*command.split(), *rest),
          (option,),
        )


def paths(seed: int, count: int) -> Iterator[Case]:
  """Inputs and outputs at places where none can be."""
  draw = random.Random(seed)
  found = []
  for command, flags in parsers():
    for flag in flags:
      option = flag.option_strings[0]
      if flag.dest in INPUTS and (command, flag.dest) not in NEW:
        found += [
          (command, option, path) for path in ("{}/absent", "{}/loop", "{}/fifo", "/dev/null", "{}/" + "x" * 300)
        ]
        found += [(command, option, path) for path in ("{}/file/x", *([""] if flag.required else []))]
        found.append((command, option, "{}/file" if flag.dest == "workdir" else "{}/folder"))
      elif flag.dest in OUTPUTS or (command, flag.dest) in NEW:
        found += [(command, option, path) for path in ("{}/loop/x", "{}/file/x", "{}/" + "x" * 300, "/proc/absent/x")]
        found.append((command, option, "{}/folder" if flag.dest == "json" else "{}/file"))
  draw.shuffle(found)
  for command, option, path in found[:count]:
    yield Case(f"{command} {option} {path[:20]}", of(command, option, path), (option, path))


NEW = (("quickstart", "workdir"), ("iterate", "workdir"), ("retrain", "workdir"), ("sweep", "workdir"))


def contradictions() -> Iterator[Case]:
  """Flags that do not go together, or mean nothing."""
  for name, command, more, said in (
    ("dtype of an adapter", "export", ("--adapter", "--dtype", "float32"), "--dtype"),
    ("base without adapter", "export", ("--base", "x"), "--base"),
    ("interactive and prompt", "generate", ("--interactive",), "--interactive"),
    ("prompts and prompt", "generate", ("--prompts", "{}/pairs.jsonl"), "--prompts"),
    ("num 0", "generate", ("--num", "0"), "--num"),
    ("out of another ending", "generate", ("--out", "{}/x.txt"), "--out"),
    ("out of another ending", "best-of", ("--out", "{}/x.txt"), "--out"),
    ("pairs of one", "best-of", ("--pairs", "--num", "1"), "--num"),
    ("no rounds", "iterate", ("--rounds", "0"), "--rounds"),
    ("no rounds", "retrain", ("--rounds", "0"), "--rounds"),
    ("unknown reward", "best-of", ("--reward", "nope"), "nope"),
    ("empty reward", "best-of", ("--reward", ""), "reward"),
    ("reward by no module", "best-of", ("--reward", "absent_module:f"), "absent_module:f"),
    ("unknown setting", "best-of", ("--reward-settings", '{"nope": 1}'), "nope"),
    ("unknown step reward", "best-of", ("--step-reward", "nope"), "nope"),
    ("unknown population", "data testbed", ("--population", "nope"), "nope"),
    ("one piece", "data tokenizer", ("--vocab", "1"), "1 pieces"),
    ("more pieces than text", "data tokenizer", ("--vocab", "1000000"), "1000000"),
    ("row length 0", "data check", ("--row-length", "0"), "--row-length"),
    ("unknown topology", "compile", ("--topology", "v9z:4x4"), "v9z"),
    ("topology without size", "compile", ("--topology", "v5e"), "v5e"),
    ("topology of zero", "compile", ("--topology", "cpu:0"), "cpu:0"),
    ("topology of letters", "compile", ("--topology", "cpu:x"), "cpu:x"),
    ("empty topology", "compile", ("--topology", ""), "topology"),
    ("unknown model", "compile", ("--model", "llama-99"), "llama-99"),
    ("no slice", "compile", ("--slices", "0"), "--slices"),
    ("unknown key", "sweep", ("--sweep", "nope=1,2"), "nope"),
    ("no values", "sweep", ("--sweep", "lr="), "lr"),
    ("no key", "sweep", ("--sweep", "=1,2"), "--sweep"),
    ("no equals sign", "sweep", ("--sweep", "lr"), "lr"),
    ("the same twice", "sweep", ("--sweep", "lr=1e-3,1e-3"), "lr"),
    ("the same key twice", "sweep", ("--sweep", "lr=1e-3,1e-4", "lr=1e-5,1e-6"), "lr"),
    ("no number", "sweep", ("--sweep", "lr=x,y"), "learning_rate"),
    ("best by nothing", "sweep", ("--best", "loss"), "--best"),
    ("share of more than all", "domain", ("--share", "2"), "--share"),
    ("share of nothing", "domain", ("--share", "0"), "--share"),
    ("overrides of a command without config", "evaluate", ("--config.run.steps=5",), "--config.run.steps"),
    ("broken bytes", "generate", ("--prompt", "\udcff"), "--prompt"),
    ("empty prompt", "generate", ("--prompt", ""), "prompt"),
  ):
    yield Case(f"{command}: {name}", of(command, *more), (said,))
