"""The `alignjax` command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from alignjax import host_memory, hosts
from alignjax.errors import InputError, exit_status

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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if argv[:1] == ["train"]:  # its overrides, --config.x.y=1, are not argparse's
    from alignjax import train

    return train.main(argv[1:])
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.") and "=" in a]
  if len(overrides) < len(rest) or (rest and arguments.command not in (_sweep, _iterate, _retrain, _compile)):
    parser.error(f"unrecognized arguments: {' '.join(rest)}")
  arguments.overrides = overrides
  return arguments.command(arguments)


def entry() -> int:
  """The console script: an InputError becomes one line and exit status 2."""
  host_memory.keep_freed()
  return exit_status(lambda argv: hosts.run(lambda: main(argv)))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="alignjax",
    description="Preference optimization in JAX: SFT, reward models, DPO, PPO, evaluation.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

  def add(name, command, help, **options):
    sub = commands.add_parser(name, help=help, description=help, **options)
    sub.set_defaults(command=command)
    return sub

  quickstart = add("quickstart", _quickstart, "SFT, reward model, DPO and PPO on a built-in world, with a report")
  quickstart.add_argument("--workdir", required=True, help="where everything is written")
  quickstart.add_argument("--seed", type=int, default=0, help="of data, parameters, order and samples")

  add("train", None, "train the run that a config describes, or continue it (see alignjax train --help)")

  evaluate = add("evaluate", _evaluate, "score held-out records with a trained run")
  evaluate.add_argument("--workdir", required=True, help="of the run")
  evaluate.add_argument("--data", default="", help="records; default: the run's own held-out ones")
  evaluate.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  evaluate.add_argument("--out", help="also write the numbers to this JSON file")

  generate = add("generate", _generate, "sample completions from a trained run, as JSON lines, or chat with it")
  generate.add_argument("--workdir", required=True, help="of the run")
  prompts = generate.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", action="append", help="may be repeated")
  prompts.add_argument("--prompts", help='a file of records with a "prompt": a string, or messages')
  prompts.add_argument("--interactive", action="store_true", help="a dialogue in the terminal")
  generate.add_argument("--out", help="write to this FILE.jsonl; the same command goes on if interrupted")
  generate.add_argument("--token-ids", action="store_true", help="also those of each completion")
  generate.add_argument("--max-new-tokens", type=int, default=128, help="the longest completion")
  generate.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
  generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens only; 0: all")
  generate.add_argument("--top-p", type=float, default=1.0, help="among the likeliest that hold this share; 1: all")
  generate.add_argument("--num", dest="n", type=int, default=1, help="completions per prompt")
  generate.add_argument("--seed", type=int, default=0, help="other seeds, other completions")
  generate.add_argument("--batch-size", type=int, default=64, help="completions sampled together")
  generate.add_argument("--step", type=int, help="of the checkpoint; default: the newest")

  best = add("best-of", _best_of, "sample n completions per prompt and keep the best, as records to train on")
  best.add_argument("--workdir", required=True, help="of the policy's run")
  best.add_argument("--prompts", required=True, help="a file of records with prompts")
  best.add_argument("--out", required=True, help="FILE.jsonl; what it is stands beside it, in FILE.json")
  best.add_argument("--pairs", action="store_true", help="best and worst as pairs, and not the best alone")
  best.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  _add_sampling(best)

  iterate = add("iterate", _iterate, "rounds of generate, score, choose and retrain, each from the last one's policy")
  iterate.add_argument("--config", required=True, help="of a round: FILE.py or FILE.py:variant")
  iterate.add_argument("--workdir", required=True, help="where the rounds are written")
  iterate.add_argument("--rounds", type=int, required=True, help="how many, in all")
  iterate.add_argument("--prompts", default="", help="to generate for; default: those of the config's data.train")
  iterate.add_argument("--prompts-per-round", type=int, default=0, help="each round takes the next so many; 0: all")
  iterate.add_argument("--eval-prompts", default="", help="held out, to measure every round's policy on")
  iterate.add_argument(
    "--reference", choices=("last", "first"), default="last", help="the policy that a round begins with, or round 1's"
  )
  _add_sampling(iterate)

  retrain = add("retrain", _retrain, "rounds of online training; between them, new pairs for the reward model")
  retrain.add_argument("--config", required=True, help="of a round's policy: FILE.py or FILE.py:variant")
  retrain.add_argument("--workdir", required=True, help="where the rounds are written")
  retrain.add_argument("--rounds", type=int, required=True, help="how many, in all")
  retrain.add_argument("--prompts", default="", help="to sample pairs for; default: those of the config's data.train")
  retrain.add_argument("--pairs-per-round", type=int, default=1024, help="from the next so many prompts; 0: all")
  retrain.add_argument("--earlier", type=float, default=1.0, help="earlier pairs for each new one")
  retrain.add_argument("--reward-steps", type=int, default=100, help="of the reward model, between two rounds")
  _add_sampling(retrain, labels=True)

  sweep = add("sweep", _sweep, "train a grid of runs, as one program where they differ in traced keys alone")
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

  compile_ = add(
    "compile", _compile, "compile a run's steps for a topology that is not there: memory, work, what limits"
  )
  compile_.add_argument("--config", required=True, help="FILE.py or FILE.py:variant; its data need not exist")
  compile_.add_argument(
    "--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8, ... (pip install libtpu), cpu:8"
  )
  compile_.add_argument("--slices", type=int, default=1, help="of that topology, over which mesh.data goes")
  compile_.add_argument("--model", default="", help="sizes of a published model: llama-3.1-8b, qwen3-0.6b, ...")
  compile_.add_argument("--json", default="", help="also write the numbers to this file")
  compile_.add_argument("--no-levers", action="store_true", help="where it does not fit, do not look for what would")

  export = add("export", _export, "write a run's model for transformers and vLLM, LoRA factors merged in")
  export.add_argument("--dtype", default="", choices=("float32", "bfloat16", "float16"), help="default: as stored")
  export.add_argument("--adapter", action="store_true", help="the LoRA factors alone, as a PEFT adapter")
  export.add_argument("--base", default="", help="with --adapter: the name by which PEFT finds the base model")

  adapter = add("adapter", None, "merge LoRA factors into a run").add_subparsers(required=True, metavar="WHAT")
  merge = adapter.add_parser("merge", help="write an ordinary run with the factors merged into its weights")
  merge.set_defaults(command=_adapter_merge)
  for sub in (export, merge):
    sub.add_argument("--workdir", required=True, help="of the run")
    sub.add_argument("--out", required=True, help="folder")
    sub.add_argument("--step", type=int, help="of the checkpoint; default: the newest")

  domain = add("domain", _domain, "fit where a reward model knows its way, for algorithm.domain of an online run")
  domain.add_argument("--workdir", required=True, help="of a reward model of pairs")
  domain.add_argument("--out", default="", help="folder; default: WORKDIR/domain")
  domain.add_argument("--share", type=float, default=0.01, help="of held-out responses that may lie outside")

  report = add("report", _report, "draw a run's report.html")
  report.add_argument("--workdir", required=True, help="of a quickstart or a run")

  data = add("data", None, "make and check data").add_subparsers(required=True, metavar="WHAT")

  testbed = data.add_parser("testbed", help="write the built-in world's records as JSONL")
  testbed.add_argument("--out", required=True, help="folder")
  testbed.add_argument("--seed", type=int, default=0, help="the same seed writes the same files")
  testbed.add_argument("--sft", type=int, default=8000, help="demonstrations")
  testbed.add_argument("--preference", type=int, default=6000, help="training pairs")
  testbed.add_argument("--evaluation", type=int, default=1000, help="held-out pairs")
  testbed.add_argument("--prompts", type=int, default=300, help="held-out prompts to sample from")
  testbed.add_argument("--ranked", type=int, default=0, help="training prompts with several ranked responses")
  testbed.add_argument("--stepwise", type=int, default=0, help="training answers in labelled steps")
  testbed.add_argument("--population", default="default", help="annotators: see testbed/annotator.py")
  testbed.set_defaults(command=_data_testbed)

  tokenizer = data.add_parser("tokenizer", help="train a SentencePiece model on records or plain text")
  tokenizer.add_argument("--input", required=True, nargs="+", help="record files, or .txt")
  tokenizer.add_argument("--vocab", type=int, default=8000, help="pieces")
  tokenizer.add_argument("--out", required=True, help="the .model file")
  tokenizer.set_defaults(command=_data_tokenizer)

  check = data.add_parser("check", help="read every record and say what would be cut or dropped")
  check.add_argument("--input", required=True, help="a record file, a glob, or several with commas between")
  check.add_argument("--tokenizer", required=True, help="a .model file, a tokenizer.json, or a folder with one")
  kinds = ("sft", "preference", "triple", "unpaired", "ranked", "stepwise")
  check.add_argument("--kind", choices=kinds, default="preference", help="of training")
  check.add_argument("--row-length", type=int, default=1024, help="tokens in a row of the batch")
  check.set_defaults(command=_data_check)
  return parser


def _add_sampling(parser: argparse.ArgumentParser, *, labels: bool = False) -> None:
  """What is sampled and who judges it; those who label may be people."""
  people = "who labels: {}; left out: people" if labels else "{}"
  judges = people.format('run of a reward model, or names: "gsm8k+length:0.1"')
  parser.add_argument("--reward", required=not labels, default="", help=judges)
  parser.add_argument("--reward-model", default="", help='the run that "reward_model" among the names means')
  parser.add_argument("--reward-settings", type=json.loads, default={}, help="JSON: keywords of the named rewards")
  parser.add_argument(
    "--step-reward", default="", help="of a process reward model: its steps' min, product, mean, or the last one"
  )
  parser.add_argument("--n", type=int, default=2 if labels else 16, help="completions of a prompt")
  parser.add_argument("--seed", type=int, default=0, help="other seeds, other completions")
  parser.add_argument("--max-new-tokens", type=int, default=128, help="the longest completion")
  parser.add_argument("--temperature", type=float, default=1.0, help="of the sampler")
  parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens only; 0: all")
  parser.add_argument("--top-p", type=float, default=1.0, help="among the likeliest that hold this share; 1: all")
  parser.add_argument("--missing-eos-penalty", type=float, default=0.0, help="off the score of what did not end")
  parser.add_argument("--batch-size", type=int, default=256, help="completions sampled together")


def _request(arguments):
  from alignjax.best_of import Request

  return Request(**{name: value for name, value in vars(arguments).items() if name in Request._fields})


def _rewards(arguments):
  from alignjax.scoring import settings

  return settings(arguments.reward, arguments.reward_model, arguments.reward_settings, arguments.step_reward)


def _quickstart(arguments) -> int:
  from alignjax.quickstart import quickstart

  summary = quickstart(arguments.workdir, arguments.seed)
  reward = summary["reward"]
  print(
    f"reward model: {reward['heldout_accuracy']:.1%} of held-out pairs right; the best possible is "
    f"{reward['bayes_accuracy']:.1%}"
  )
  for name in ("dpo", "ppo"):
    policy = summary[name]
    low, high = policy["gold_win_rate_interval"]
    print(
      f"{name.upper()}: better than SFT on {policy['gold_win_rate_vs_sft']:.1%} of held-out prompts "
      f"[{low:.1%}, {high:.1%}], {policy['kl']:.1f} nats away"
    )
  print(f"report: {os.path.join(arguments.workdir, 'report.html')}")
  return 0


def _evaluate(arguments) -> int:
  from alignjax.run import evaluate

  numbers = evaluate(arguments.workdir, arguments.data, arguments.step)
  text = json.dumps(numbers, indent=2)
  print(text)
  if arguments.out:
    with open(arguments.out, "w") as out:
      out.write(text + "\n")
  return 0


def _generate(arguments) -> int:
  from alignjax import chat_session, completions
  from alignjax.data.source import Source, open_source
  from alignjax.run import load

  if arguments.interactive and (arguments.out or arguments.token_ids or arguments.n > 1):
    raise InputError("--interactive: goes without --out, --token-ids and --num; leave them away")
  if arguments.n < 1:
    raise InputError(f"--num={arguments.n}: use at least 1")
  if arguments.interactive:
    chat_session.chat(load(arguments.workdir, arguments.step), _request(arguments))
    return 0
  source = open_source(arguments.prompts) if arguments.prompts else Source([completions.Typed(arguments.prompt)])
  given = (load(arguments.workdir, arguments.step), source)
  if arguments.out:
    hosts.say(str(completions.write(*given, arguments.out, _request(arguments), arguments.token_ids)))
    return 0
  for record in completions.answer(*given, _request(arguments), arguments.token_ids):
    hosts.say(json.dumps(record, ensure_ascii=False))
  return 0


def _best_of(arguments) -> int:
  from alignjax.best_of import best_of
  from alignjax.run import load
  from alignjax.scoring import make_scorer

  policy = load(arguments.workdir, arguments.step)
  scorer = make_scorer(_rewards(arguments), policy.tokenizer, policy.mesh)
  summary = best_of(policy, arguments.prompts, scorer, arguments.out, _request(arguments), pairs=arguments.pairs)
  left_out = ", ".join(f"{count} {reason}" for reason, count in summary["left_out"].items() if count)
  hosts.say(
    f"{arguments.out}: {summary['records']} records of {summary['prompts']} prompts ({left_out or 'none left out'})"
  )
  hosts.say(f"KL from the policy: at most {summary['kl_bound']:.2f} nats")
  return 0


def _iterate(arguments) -> int:
  from alignjax import iterate
  from alignjax.config import load_config

  plan = iterate.Plan(
    load_config(arguments.config, arguments.overrides),
    _rewards(arguments),
    _request(arguments),
    arguments.prompts,
    arguments.prompts_per_round,
    arguments.eval_prompts,
    arguments.reference,
  )
  result = iterate.iterate(plan, arguments.workdir, arguments.rounds)
  hosts.say("stopped; the same command goes on" if result.get("stopped") else iterate.show(result))
  return 0


def _retrain(arguments) -> int:
  from alignjax import retrain
  from alignjax.config import load_config

  plan = retrain.Plan(
    load_config(arguments.config, arguments.overrides),
    _rewards(arguments) if arguments.reward else {},
    _request(arguments),
    arguments.prompts,
    arguments.pairs_per_round,
    arguments.earlier,
    arguments.reward_steps,
  )
  result = retrain.retrain(plan, arguments.workdir, arguments.rounds)
  if asked := result.get("unlabelled"):
    hosts.say(
      f'compare the responses of {asked.ask}, write {{"prompt", "chosen", "rejected"}} a line to {asked.answer}, '
      "and run the same command again"
    )
    return 0
  hosts.say("stopped; the same command goes on" if result.get("stopped") else retrain.show(result))
  return 0


def _sweep(arguments) -> int:
  from alignjax import sweep
  from alignjax.report.sweep import table

  members = sweep.expand(arguments.config, arguments.sweep, arguments.overrides)
  if arguments.list:
    lines = sweep.commands(arguments.config, members, arguments.workdir, arguments.overrides, arguments.list)
    print("\n".join(lines))
    return 0
  result = sweep.sweep(members, arguments.workdir, arguments.best)
  if result.get("stopped"):
    print("stopped; the same command goes on")
    return 0
  print(table(result))
  print(f"best: {os.path.join(arguments.workdir, 'best')}, by {result['ranking']}")
  return 0


def _compile(arguments) -> int:
  from alignjax.preflight.command import compile_run

  found = compile_run(
    arguments.config,
    arguments.overrides,
    arguments.topology,
    arguments.model,
    arguments.slices,
    arguments.json,
    levers=not arguments.no_levers,
  )
  return 0 if found.fits else 1


def _export(arguments) -> int:
  from alignjax.export import export, export_adapter

  if (arguments.dtype and arguments.adapter) or (arguments.base and not arguments.adapter):
    raise InputError("--dtype is of whole weights, --base of an adapter; leave one out, or add --adapter")
  if arguments.adapter:
    export_adapter(arguments.workdir, arguments.out, arguments.step, arguments.base)
  else:
    export(arguments.workdir, arguments.out, arguments.step, arguments.dtype)
  print(arguments.out)
  return 0


def _adapter_merge(arguments) -> int:
  from alignjax import adapter

  adapter.merge(arguments.workdir, arguments.out, arguments.step)
  print(arguments.out)
  return 0


def _domain(arguments) -> int:
  from alignjax import domain

  print(domain.write(arguments.workdir, arguments.out, arguments.share))
  return 0


def _report(arguments) -> int:
  from alignjax import report

  print(report.render(arguments.workdir))
  return 0


def _data_testbed(arguments) -> int:
  from alignjax import testbed

  paths = testbed.write(
    arguments.out,
    seed=arguments.seed,
    sft=arguments.sft,
    preference=arguments.preference,
    evaluation=arguments.evaluation,
    prompts=arguments.prompts,
    ranked=arguments.ranked,
    stepwise=arguments.stepwise,
    population=arguments.population,
  )
  print("\n".join(str(path) for path in paths.values()))
  return 0


def _data_tokenizer(arguments) -> int:
  from alignjax.data.sentencepiece_tokenizer import read_texts, train_tokenizer

  train_tokenizer(read_texts(arguments.input), arguments.out, arguments.vocab)
  print(arguments.out)
  return 0


def _data_check(arguments) -> int:
  from alignjax.data.loader import DataConfig, Dataset
  from alignjax.data.tokenizer import load_tokenizer

  config = DataConfig(train=arguments.input, tokenizer=arguments.tokenizer, row_length=arguments.row_length)
  dataset = Dataset.open(config, load_tokenizer(arguments.tokenizer), arguments.kind, "train", 0)
  print("\n".join(dataset.report_lines()))
  return 0


if __name__ == "__main__":
  sys.exit(entry())
