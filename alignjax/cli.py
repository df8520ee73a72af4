"""The `alignjax` command: runs each command with its parsed arguments."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from alignjax import errors
from alignjax.errors import InputError
from alignjax.system import malloc  # no import here takes long: Ctrl-C is not watched yet


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status; `argv` is the command line's if None."""
  if argv is None:
    argv = sys.argv[1:]
  argv = list(argv)
  if argv[:1] == ["train"]:  # it parses its own arguments, with the overrides --config.x.y=1
    from alignjax import train

    return train.main(argv[1:])
  from alignjax.commands.arguments import parse

  arguments = parse(argv)
  if not getattr(arguments, "trust_run_code", False):
    return COMMANDS[arguments.command](arguments)
  from alignjax.runs.trust import trusting

  with trusting(True):
    return COMMANDS[arguments.command](arguments)


def entry() -> int:
  """Runs the console script; `errors.explain` decides which errors become one line, and the exit status."""
  errors.watch_interrupts()
  malloc.keep_freed()
  return errors.run_process(_main_of_hosts)


def _main_of_hosts(argv: Sequence[str] | None) -> int:
  from alignjax.system import hosts  # imports JAX, which takes a second

  return hosts.run(lambda: main(argv))


def _request(arguments):
  """The sampling request in the flags."""
  from alignjax.commands.best_of import Request

  return Request(**{name: value for name, value in vars(arguments).items() if name in Request._fields})


def _rewards(arguments):
  """The options of the rewards in the flags, checked without loading a model."""
  from alignjax.runs import scorer

  options = scorer.settings(
    arguments.reward, arguments.reward_model, arguments.reward_settings, arguments.step_reward, "--reward"
  )
  scorer.check(options)
  return options


def _check_text(prompt: str) -> None:
  """Raises InputError if a prompt of the command line is not UTF-8."""
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"--prompt={prompt!r}: is not UTF-8; write it in UTF-8, or use --prompts FILE.jsonl") from error


def _quickstart(arguments) -> int:
  from alignjax.commands.quickstart import quickstart

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
  print(f"report: {os.path.join(os.path.expanduser(arguments.workdir), 'report.html')}")
  return 0


def _evaluate(arguments) -> int:
  from alignjax.data.source import open_source
  from alignjax.evaluation.held_out import evaluate
  from alignjax.system import hosts, output

  with contextlib.ExitStack() as stack:
    files: list[TextIO] = []

    def open_out():
      if arguments.out:
        files.append(stack.enter_context(output.file(arguments.out, "--out", parents=False)))

    # The first process holds the file during the work: two commands cannot evaluate into one file.
    hosts.by_first("output", open_out)
    if arguments.data:
      open_source(arguments.data)
    numbers = evaluate(arguments.workdir, arguments.data, arguments.step)
    text = json.dumps(numbers, indent=2)
    print(text)
    for file in files:
      file.write(text + "\n")
  return 0


def _generate(arguments) -> int:
  from alignjax.commands import chat, completions, resumable
  from alignjax.data.source import Source, open_source
  from alignjax.runs.run import load
  from alignjax.system import hosts

  if arguments.interactive and (arguments.out or arguments.token_ids or arguments.n > 1):
    raise InputError("--interactive: goes without --out, --token-ids and --num; leave them away")
  if arguments.n < 1:
    raise InputError(f"--num={arguments.n}: use at least 1")
  for prompt in arguments.prompt or ():
    _check_text(prompt)
  if arguments.interactive:
    chat.chat(load(arguments.workdir, arguments.step), _request(arguments))
    return 0
  if arguments.out:
    resumable.check_out(arguments.out)  # this check and the next ones come before a model is loaded
  source = open_source(arguments.prompts) if arguments.prompts else Source([completions.Typed(arguments.prompt)])
  completions.check_prompts(source, arguments.token_ids)
  policy = load(arguments.workdir, arguments.step)
  request = _request(arguments)
  if arguments.out:
    hosts.say(str(completions.write(policy, source, arguments.out, request, arguments.token_ids)))
    return 0
  for record in completions.answer(policy, source, request, arguments.token_ids):
    hosts.say(_line(record))
  return 0


def _line(record: dict) -> str:
  """A record as JSON, in characters that standard output can encode."""
  text = json.dumps(record, ensure_ascii=False)
  try:
    text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
  except UnicodeEncodeError:
    return json.dumps(record)
  return text


def _serve(arguments) -> int:
  from alignjax.commands.serve import Options, serve

  options = Options(**{name: value for name, value in vars(arguments).items() if name in Options._fields})
  serve(arguments.workdir, options, arguments.step)
  return 0


def _best_of(arguments) -> int:
  from alignjax.commands import resumable
  from alignjax.commands.best_of import best_of
  from alignjax.data.source import open_source
  from alignjax.runs.run import load
  from alignjax.runs.scorer import make_scorer
  from alignjax.system import hosts

  rewards = _rewards(arguments)
  request = _request(arguments)
  if arguments.pairs and request.n < 2:
    raise InputError(f"--pairs with --n={request.n}: a pair is of two completions; use --n 2 or more")
  source = open_source(arguments.prompts)
  resumable.check_out(arguments.out, ".json")  # before a model is loaded
  policy = load(arguments.workdir, arguments.step)
  scorer = make_scorer(rewards, policy.tokenizer, policy.mesh)
  summary = best_of(policy, source, scorer, arguments.out, request, pairs=arguments.pairs)
  left_out = ", ".join(f"{count} {reason}" for reason, count in summary["left_out"].items() if count)
  hosts.say(
    f"{arguments.out}: {summary['records']} records of {summary['prompts']} prompts ({left_out or 'none left out'})"
  )
  if summary["cut_off"]:
    share = f"{summary['cut_off']} of {summary['prompts'] * summary['request']['n']}"
    hosts.say(f"{share} completions were cut at --max-new-tokens={arguments.max_new_tokens} and are in no record")
  hosts.say(f"KL from the policy: at most {summary['kl_bound']:.2f} nats")
  return 0


def _iterate(arguments) -> int:
  from alignjax.commands import iterate
  from alignjax.data.source import open_source
  from alignjax.runs.config import load_config
  from alignjax.system import hosts

  for prompts in filter(None, (arguments.prompts, arguments.eval_prompts)):
    open_source(prompts)

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
  if result.get("stopped"):
    hosts.say("stopped; the same command continues")
  else:
    hosts.say(iterate.show(result))
  return 0


def _retrain(arguments) -> int:
  from alignjax.commands import retrain
  from alignjax.data.source import open_source
  from alignjax.runs.config import load_config
  from alignjax.system import hosts

  if arguments.prompts:
    open_source(arguments.prompts)

  config = load_config(arguments.config, arguments.overrides)
  labeller = None
  if arguments.reward:
    labeller = _rewards(arguments)
  plan = retrain.Plan(
    config,
    labeller,
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
  if result.get("stopped"):
    hosts.say("stopped; the same command continues")
  else:
    hosts.say(retrain.show(result))
  return 0


def _sweep(arguments) -> int:
  from alignjax.commands import sweep
  from alignjax.report.sweep import table

  members = sweep.expand(arguments.config, arguments.sweep, arguments.overrides)
  if arguments.list:
    lines = sweep.commands(arguments.config, members, arguments.workdir, arguments.overrides, arguments.list)
    print("\n".join(lines))
    return 0
  result = sweep.sweep(members, arguments.workdir, arguments.best)
  if result.get("stopped"):
    print("stopped; the same command continues")
    return 0
  print(table(result))
  print(f"best: {os.path.join(arguments.workdir, 'best')}, by {result['ranking']}")
  return 0


def _compile(arguments) -> int:
  from alignjax.preflight.command import compile_run

  estimate = compile_run(
    arguments.config,
    arguments.overrides,
    arguments.topology,
    arguments.model,
    arguments.slices,
    arguments.json,
    levers=not arguments.no_levers,
  )
  return 0 if estimate.fits else 1


def _export(arguments) -> int:
  from alignjax.commands.export import export, export_adapter

  if (arguments.dtype and arguments.adapter) or (arguments.base and not arguments.adapter):
    raise InputError("--dtype is of whole weights, --base of an adapter; leave one out, or add --adapter")
  if arguments.adapter:
    export_adapter(arguments.workdir, arguments.out, arguments.step, arguments.base)
  else:
    export(arguments.workdir, arguments.out, arguments.step, arguments.dtype)
  print(arguments.out)
  return 0


def _adapter_merge(arguments) -> int:
  from alignjax.commands import adapter

  adapter.merge(arguments.workdir, arguments.out, arguments.step)
  print(arguments.out)
  return 0


def _domain(arguments) -> int:
  from alignjax.commands import reward_domain

  print(reward_domain.write(arguments.workdir, arguments.out, arguments.share))
  return 0


def _report(arguments) -> int:
  from alignjax import report

  print(report.render(arguments.workdir))
  return 0


def _judge(arguments) -> int:
  from alignjax.commands import judge
  from alignjax.feedback.judge import named
  from alignjax.feedback.judge.judge import Settings
  from alignjax.system import hosts

  def given(record):
    return record(**{name: value for name, value in vars(arguments).items() if name in record._fields})

  what = arguments.command.removeprefix("judge ")
  request = given(judge.Request)
  settings = given(Settings)
  settings.check()
  rubric = judge.check(what, arguments.judge, arguments.rubric, arguments.out, request)
  judges = [named.find(name, settings) for name in arguments.judge]
  if what == "pairs":
    summary = judge.pairs(judges, rubric, arguments.input, arguments.out, request)
  else:
    work = {"score": judge.grade, "bias": judge.biases, "agreement": judge.agreements}[what]
    summary = work(judges[0], rubric, arguments.input, arguments.out, request)
  hosts.say(json.dumps(summary, indent=2))
  failed = judge.failures(summary)
  for line in failed:
    hosts.say(f"FAIL: {line}")
  return 1 if failed else 0


def _data_testbed(arguments) -> int:
  from alignjax.environments import testbed

  paths = testbed.write(
    arguments.out,
    seed=arguments.seed,
    sft=arguments.sft,
    preference=arguments.preference,
    evaluation=arguments.evaluation,
    prompts=arguments.prompts,
    ranked=arguments.ranked,
    stepwise=arguments.stepwise,
    judged=arguments.judged,
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
  open_dataset = functools.partial(Dataset.open, tokenizer=load_tokenizer(arguments.tokenizer), kind=arguments.kind)
  all_records = open_dataset(dataclasses.replace(config, holdout=0.0))
  lines = list(all_records.report_lines())
  lines += [f"  of these, in a run: {line}" for line in open_dataset(config).held_out_lines()]
  print("\n".join(lines))
  return 0


COMMANDS = {
  "quickstart": _quickstart,
  "evaluate": _evaluate,
  "generate": _generate,
  "serve": _serve,
  "best-of": _best_of,
  "iterate": _iterate,
  "retrain": _retrain,
  "sweep": _sweep,
  "compile": _compile,
  "export": _export,
  "adapter merge": _adapter_merge,
  "domain": _domain,
  "report": _report,
  "judge pairs": _judge,
  "judge score": _judge,
  "judge bias": _judge,
  "judge agreement": _judge,
  "data testbed": _data_testbed,
  "data tokenizer": _data_tokenizer,
  "data check": _data_check,
}

if __name__ == "__main__":
  sys.exit(entry())
