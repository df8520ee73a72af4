"""The arguments of the `alignjax` command: its commands and their options, with their help."""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from alignjax.runs import trust
from alignjax.system import ranges
from alignjax.system.ranges import (
  Count,
  NonNegative,
  OpenShare,
  Port,
  Positive,
  Seed,
  Several,
  Share,
  ShareAboveZero,
  Whole,
)

EPILOG = """\
a first run, five minutes on a laptop:
  alignjax quickstart --workdir runs/quickstart

your own data (one JSON per line: {"prompt": ..., "chosen": ..., "rejected": ...}):
  alignjax data tokenizer --input pairs.jsonl --vocab 8000 --out tokenizer.model
  alignjax data check --input pairs.jsonl --tokenizer tokenizer.model
  alignjax train --config configs/dpo.py --workdir runs/dpo --config.data.train=pairs.jsonl \\
    --config.data.tokenizer=tokenizer.model

`alignjax COMMAND --help` says more. A run that was interrupted continues with the same command.
"""
OVERRIDDEN = ("iterate", "retrain", "sweep", "compile")  # commands that take --config.x.y=1, besides train

# Commands that load runs.
LOADING = ("evaluate", "generate", "serve", "best-of", "iterate", "retrain", "sweep", "compile", "export", "domain")

Add = Callable[[str, str], argparse.ArgumentParser]  # name, help -> the command's parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses a command line: the `command` with its options, and the `overrides` of its config as "x.y=1".

  It exits as argparse does if an argument is missing or unknown.

  Args:
    argv: the arguments without the program's name.

  Raises:
    InputError: a number is out of range.
  """
  parser = make_parser()
  arguments, rest = parser.parse_known_args(argv)
  overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.") and "=" in a]
  if len(overrides) < len(rest) or (rest and arguments.command not in OVERRIDDEN):
    parser.error(f"unrecognized arguments: {' '.join(rest)}")
  arguments.overrides = overrides
  return arguments


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of all commands; a command of a group is named with the group, as in "data check"."""
  parser = argparse.ArgumentParser(
    prog="alignjax",
    description="Preference optimization in JAX: SFT, reward models, DPO, PPO, evaluation.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = functools.partial(_add, parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))

  quickstart = add("quickstart", "SFT, reward model, DPO and PPO on a built-in world, with a report")
  quickstart.add_argument("--workdir", required=True, help="where everything is written")
  number(quickstart, "--seed", Seed, default=0, help="of data, parameters, order and samples")

  add("train", "train the run that a config describes, or continue it (see alignjax train --help)")

  evaluate = add("evaluate", "score held-out records with a trained run")
  evaluate.add_argument("--workdir", required=True, help="of the run")
  evaluate.add_argument("--data", default="", help="records; default: the run's own held-out ones")
  number(evaluate, "--step", Whole, help="of the checkpoint; default: the newest")
  evaluate.add_argument("--out", help="also write the numbers to this JSON file")

  _add_generate(add)
  _add_serve(add)
  _add_best_of(add)
  _add_iterate(add)
  _add_retrain(add)
  _add_sweep(add)
  _add_compile(add)
  _add_exports(add)

  domain = add("domain", "fit the reward model's in-distribution region, for algorithm.domain of an online run")
  domain.add_argument("--workdir", required=True, help="of a reward model of pairs")
  domain.add_argument("--out", default="", help="folder; default: WORKDIR/domain")
  number(domain, "--share", OpenShare, default=0.01, help="of held-out responses that may lie outside")

  report = add("report", "draw a run's report.html")
  report.add_argument("--workdir", required=True, help="of a quickstart or a run")

  _add_judge(add)
  _add_data(add)
  return parser


class Number(argparse.Action):
  """Stores the number in a flag's text; raises InputError if it is not of the type `kind` of `ranges`."""

  def __init__(self, *args: Any, kind: Any, **more: Any):
    super().__init__(*args, **more)
    self.kind = kind

  def __call__(self, parser, namespace, values, option_string=None):
    setattr(namespace, self.dest, ranges.read(self.option_strings[0], self.kind, values))


def number(parser: argparse.ArgumentParser, flag: str, kind: Any, **more: Any) -> None:
  """Adds a flag whose value is a number of the type `kind` of `alignjax.system.ranges`.

  Args:
    parser: to add it to.
    flag: such as "--seed".
    kind: such as `ranges.Count`.
    more: further arguments of `add_argument`.
  """
  parser.add_argument(flag, action=Number, kind=kind, **more)


def _add(commands, name: str, help: str) -> argparse.ArgumentParser:
  parser = commands.add_parser(name, help=help, description=help)
  parser.set_defaults(command=name)
  if name in LOADING:
    trust.add_flag(parser)
  return parser


def _add_generate(add: Add) -> None:
  generate = add("generate", "sample completions from a trained run, as JSON lines, or chat with it")
  generate.add_argument("--workdir", required=True, help="of the run")
  prompts = generate.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", action="append", help="may be repeated")
  prompts.add_argument("--prompts", help='a file of records with a "prompt": a string, or messages')
  prompts.add_argument("--interactive", action="store_true", help="a dialogue in the terminal")
  generate.add_argument("--out", help="write to this FILE.jsonl; the same command continues if interrupted")
  generate.add_argument("--token-ids", action="store_true", help="also those of each completion")
  _add_sampler(generate, temperature="0 takes the likeliest token")
  number(generate, "--num", Count, dest="n", default=1, help="completions per prompt")
  number(generate, "--seed", Seed, default=0, help="other seeds, other completions")
  number(generate, "--batch-size", Count, default=64, help="completions sampled together")
  number(generate, "--step", Whole, help="of the checkpoint; default: the newest")


def _add_serve(add: Add) -> None:
  serve = add("serve", "serve runs to OpenAI's clients over HTTP, with a page to chat at")
  serve.add_argument(
    "--workdir", required=True, action="append", metavar="[NAME=]DIR", help="of a run; may be repeated, with names"
  )
  serve.add_argument(
    "--host", default="127.0.0.1", help="address to listen at; another than this machine's needs a key"
  )
  number(serve, "--port", Port, default=8000, help="0: a free one")
  number(serve, "--slots", Count, default=32, help="completions of a model that are decoded together")
  number(serve, "--queue", Count, default=256, help="completions that may wait; a request beyond gets 429")
  number(serve, "--context", Count, help="most tokens of a prompt with its completion; default: the model's positions")
  serve.add_argument("--api-key", default="", help="that requests must carry; better: the variable ALIGNJAX_SERVE_KEY")
  serve.add_argument("--votes", default="", help="FILE.jsonl that gets the votes of people who compare two models")
  number(serve, "--step", Whole, help="of the checkpoint; default: the newest")


def _add_best_of(add: Add) -> None:
  best = add("best-of", "sample n completions per prompt and keep the best, as records to train on")
  best.add_argument("--workdir", required=True, help="of the policy's run")
  best.add_argument("--prompts", required=True, help="a file of records with prompts")
  best.add_argument("--out", required=True, help="FILE.jsonl; a summary is written to FILE.json")
  best.add_argument("--pairs", action="store_true", help="best and worst as pairs, and not the best alone")
  number(best, "--step", Whole, help="of the checkpoint; default: the newest")
  _add_sampling(best)


def _add_iterate(add: Add) -> None:
  iterate = add("iterate", "rounds of generate, score, choose and retrain, each from the last one's policy")
  _add_rounds(iterate, config="of a round", prompts="to generate for")
  number(iterate, "--prompts-per-round", Whole, default=0, help="each round takes the next so many; 0: all")
  iterate.add_argument("--eval-prompts", default="", help="held out, to measure every round's policy on")
  iterate.add_argument(
    "--reference", choices=("last", "first"), default="last", help="the policy that a round begins with, or round 1's"
  )
  _add_sampling(iterate)


def _add_retrain(add: Add) -> None:
  retrain = add("retrain", "rounds of online training; between them, new pairs for the reward model")
  _add_rounds(retrain, config="of a round's policy", prompts="to sample pairs for")
  number(retrain, "--pairs-per-round", Whole, default=1024, help="from the next so many prompts; 0: all")
  number(retrain, "--earlier", NonNegative, default=1.0, help="earlier pairs for each new one")
  number(retrain, "--reward-steps", Count, default=100, help="of the reward model, between two rounds")
  _add_sampling(retrain, labels=True)


def _add_rounds(parser: argparse.ArgumentParser, *, config: str, prompts: str) -> None:
  """Adds the arguments of commands of several rounds; `config` and `prompts` describe these two in the help."""
  parser.add_argument("--config", required=True, help=f"{config}: FILE.py or FILE.py:variant")
  parser.add_argument("--workdir", required=True, help="where the rounds are written")
  number(parser, "--rounds", Count, required=True, help="how many, in all")
  parser.add_argument("--prompts", default="", help=f"{prompts}; default: those of the config's data.train")


def _add_sampling(parser: argparse.ArgumentParser, *, labels: bool = False) -> None:
  """Adds the arguments of sampling and rewards; with `labels`, the rewards label pairs, and without any, people do."""
  reward_help = 'run of a reward model, or names: "gsm8k+length:0.1"'
  if labels:
    reward_help = f"who labels: {reward_help}; left out: people"
  parser.add_argument("--reward", required=not labels, default="", help=reward_help)
  parser.add_argument("--reward-model", default="", help='the run that "reward_model" among the names means')
  parser.add_argument("--reward-settings", type=_object, default={}, help="JSON: keywords of the named rewards")
  parser.add_argument(
    "--step-reward", default="", help="of a process reward model: its steps' min, product, mean, or the last one"
  )
  number(parser, "--n", Count, default=2 if labels else 16, help="completions of a prompt")
  number(parser, "--seed", Seed, default=0, help="other seeds, other completions")
  _add_sampler(parser, temperature="of the sampler")
  number(parser, "--missing-eos-penalty", NonNegative, default=0.0, help="off the score of what did not end")
  number(parser, "--batch-size", Count, default=256, help="completions sampled together")


def _add_sampler(parser: argparse.ArgumentParser, *, temperature: str) -> None:
  """Adds the arguments of the sampler; `temperature` is the help of that flag."""
  number(parser, "--max-new-tokens", Count, default=128, help="the longest completion")
  number(parser, "--temperature", NonNegative, default=1.0, help=temperature)
  number(parser, "--top-k", Whole, default=0, help="sample among the k likeliest tokens only; 0: all")
  number(parser, "--top-p", ShareAboveZero, default=1.0, help="among the likeliest that hold this share; 1: all")


def _object(text: str) -> dict[str, Any]:
  """Parses a flag's text as a JSON object."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise argparse.ArgumentTypeError(
      f"{text[:60]!r} is no JSON; give an object, as in '{{\"tolerance\": 0.1}}'"
    ) from error
  if not isinstance(value, dict):
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is no object; give one, as in '{{\"tolerance\": 0.1}}'")
  return value


def _add_sweep(add: Add) -> None:
  sweep = add("sweep", "train a grid of runs, as one program where they differ in traced keys alone")
  sweep.add_argument("--config", required=True, help="FILE.py or FILE.py:variant; with lora.rank set")
  sweep.add_argument("--sweep", required=True, nargs="+", metavar="KEY=V,V", help="e.g. beta=0.05,0.1 lr=1e-5,3e-5")
  sweep.add_argument("--workdir", required=True, help="where the sweep writes; one sweep per directory")
  sweep.add_argument("--best", default="", help="METRIC:max or METRIC:min; default: by held-out accuracy, else loss")
  sweep.add_argument(
    "--list",
    nargs="?",
    const="alignjax",
    metavar="LAUNCHER",
    help="train nothing: print a command per member, begun by this, with the member's number for {}",
  )


def _add_compile(add: Add) -> None:
  compile_ = add("compile", "compile a run's steps for a topology that is not there: memory, work, what limits")
  compile_.add_argument("--config", required=True, help="FILE.py or FILE.py:variant; its data need not exist")
  compile_.add_argument(
    "--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8, ... (pip install 'alignjax[compile]'), cpu:8"
  )
  number(compile_, "--slices", Count, default=1, help="of that topology, over which mesh.data goes")
  compile_.add_argument("--model", default="", help="sizes of a published model: llama-3.1-8b, qwen3-0.6b, ...")
  compile_.add_argument("--json", default="", help="also write the numbers to this file")
  compile_.add_argument("--no-levers", action="store_true", help="where it does not fit, do not look for what would")


def _add_exports(add: Add) -> None:
  export = add("export", "write a run's model for transformers and vLLM, LoRA factors merged in")
  export.add_argument("--dtype", default="", choices=("float32", "bfloat16", "float16"), help="default: as stored")
  export.add_argument("--adapter", action="store_true", help="the LoRA factors alone, as a PEFT adapter")
  export.add_argument("--base", default="", help="with --adapter: the name by which PEFT finds the base model")

  adapter = add("adapter", "merge LoRA factors into a run").add_subparsers(required=True, metavar="WHAT")
  merge = adapter.add_parser("merge", help="write an ordinary run with the factors merged into its weights")
  merge.set_defaults(command="adapter merge")
  trust.add_flag(merge)
  for sub in (export, merge):
    sub.add_argument("--workdir", required=True, help="of the run")
    sub.add_argument("--out", required=True, help="folder")
    number(sub, "--step", Whole, help="of the checkpoint; default: the newest")


def _add_judge(add: Add) -> None:
  judge = add("judge", "ask a model or a rule about completions").add_subparsers(required=True, metavar="WHAT")
  helps = {
    "pairs": "compare pairs in both orders, as pairs to train on with a confidence each",
    "score": "grade completions by a scale or by checks",
    "bias": "measure a judge: place, length, agreement with the user, itself, chance",
    "agreement": "measure a judge beside people's comparisons",
  }
  for name, help_text in helps.items():
    sub = judge.add_parser(name, help=help_text, description=help_text)
    sub.set_defaults(command=f"judge {name}")
    trust.add_flag(sub)
    several = "; several are a panel" if name == "pairs" else ""
    sub.add_argument(
      "--judge",
      required=True,
      action="append",
      help=f"a run, a folder of weights, openai:URL#MODEL or rule:NAME{several}",
    )
    sub.add_argument("--rubric", required=True, help="FILE.yaml, or the name of a shipped one")
    sub.add_argument("--input", required=True, help="records with prompts and completions")
    ending = "FILE.jsonl" if name in ("pairs", "score") else "FILE.json"
    sub.add_argument("--out", required=True, help=f"{ending}; the same command continues if interrupted")
    number(sub, "--samples", Count, default=1, help="answers to each question")
    number(sub, "--seed", Seed, default=0, help="of the order that is asked first, and of samples")
    number(sub, "--temperature", NonNegative, default=0.0, help="of the sampler of reasons and of endpoints")
    number(sub, "--max-tokens", Several, default=512, help="of an answer with reasons")
    number(sub, "--batch-size", Count, default=32, help="answers of a run that are scored together")
    number(sub, "--concurrency", Count, default=8, help="calls of an endpoint at one time")
    number(sub, "--per-minute", Whole, default=0, help="calls of an endpoint in a minute; 0: no limit")
    number(sub, "--retries", Whole, default=5, help="repeats of a call that fails, with growing pauses")
    number(sub, "--timeout", Positive, default=60.0, help="seconds of a call; after the repeats the answer is null")
    sub.add_argument("--no-logprobs", dest="logprobs", action="store_false", help="read an endpoint's text alone")
    if name == "pairs":
      number(sub, "--tie-margin", NonNegative, default=0.0, help="nats; a preference that is not stronger is a tie")
    if name == "bias":
      sub.add_argument("--author", default="", help="the judge's name among the records' authors")
    if name == "agreement":
      number(sub, "--epsilon", Share, default=0.1, help="of the alternative annotator test; 0.2 for experts")


def _add_data(add: Add) -> None:
  data = add("data", "make and check data").add_subparsers(required=True, metavar="WHAT")

  testbed = data.add_parser("testbed", help="write the built-in world's records as JSONL")
  testbed.add_argument("--out", required=True, help="folder")
  number(testbed, "--seed", Seed, default=0, help="the same seed writes the same files")
  number(testbed, "--sft", Whole, default=8000, help="demonstrations")
  number(testbed, "--preference", Whole, default=6000, help="training pairs")
  number(testbed, "--evaluation", Whole, default=1000, help="held-out pairs")
  number(testbed, "--prompts", Whole, default=300, help="held-out prompts to sample from")
  number(testbed, "--ranked", Whole, default=0, help="training prompts with several ranked responses")
  number(testbed, "--stepwise", Whole, default=0, help="training answers in labelled steps")
  number(testbed, "--judged", Whole, default=0, help="held-out pairs with their true worth, to measure judges on")
  testbed.add_argument("--population", default="default", help="annotators: see environments/testbed/annotator.py")
  testbed.set_defaults(command="data testbed")

  tokenizer = data.add_parser("tokenizer", help="train a SentencePiece model on records or plain text")
  tokenizer.add_argument("--input", required=True, nargs="+", help="record files, or .txt")
  number(tokenizer, "--vocab", Count, default=8000, help="pieces")
  tokenizer.add_argument("--out", required=True, help="the .model file")
  tokenizer.set_defaults(command="data tokenizer")

  check = data.add_parser("check", help="read every record and say what would be cut or dropped")
  check.add_argument("--input", required=True, help="a record file, a glob, or several with commas between")
  check.add_argument("--tokenizer", required=True, help="a .model file, a tokenizer.json, or a folder with one")
  kinds = ("sft", "preference", "triple", "unpaired", "ranked", "stepwise", "prompt")
  check.add_argument("--kind", choices=kinds, default="preference", help="of training")
  number(check, "--row-length", Several, default=1024, help="tokens in a row of the batch")
  check.set_defaults(command="data check")
