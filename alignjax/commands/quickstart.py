"""Trains an aligned model from scratch on a laptop: SFT, a reward model, DPO, PPO, and an evaluation of all.

The data comes from the built-in world (alignjax/environments/testbed). It is written as JSONL and read back like any
user's data. The world's gold reward measures the outcome; no training step uses it.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from alignjax import report
from alignjax.data.field import Dialogue
from alignjax.data.loader import Dataset
from alignjax.data.sentencepiece_tokenizer import read_texts, train_tokenizer
from alignjax.data.source import open_source
from alignjax.environments import testbed
from alignjax.evaluation import preference
from alignjax.evaluation import testbed as gold_scores
from alignjax.evaluation.kl import completion_logps, sequence_kl
from alignjax.evaluation.win_rate import win_rate
from alignjax.runs import config as config_lib
from alignjax.runs.config import Config
from alignjax.runs.run import Run
from alignjax.runs.workdir import alone
from alignjax.sampling.generate import sample_text
from alignjax.system import output, provenance, reading
from alignjax.train import fit

DATA: dict[str, Any] = dict(sft=20_000, preference=32_000, evaluation=4_000, prompts=600)
VOCAB = 1024
MODEL = dict(layers=3, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=384, tied=True)
MAX_NEW_TOKENS = 48
# The steps are many and small: within a few minutes, a model of this size learns more from them than from few large
# ones. DPO has label smoothing, because one annotator in eleven answers at random, and without it the policy drifts
# into malformed sentences. PPO has the settings of configs/ppo.py, without evaluations, which would sample once more.
STAGES: dict[str, dict[str, dict[str, Any]]] = {
  "sft": dict(
    data=dict(train="data/sft.jsonl", rows=16, row_length=96, max_examples=6),
    algorithm=dict(name="sft"),
    optimizer=dict(learning_rate=2e-3, warmup_steps=40, b2=0.98, weight_decay=0.1),
    run=dict(steps=1040, save_every=520),
  ),
  "reward": dict(
    data=dict(train="data/preference.jsonl", rows=8, row_length=144, max_examples=4),
    algorithm=dict(name="reward"),
    optimizer=dict(learning_rate=5e-4, warmup_steps=20, b2=0.99, weight_decay=0.1),
    run=dict(init="sft", steps=1860, save_every=930),
  ),
  "dpo": dict(
    data=dict(train="data/preference.jsonl", rows=8, row_length=144, max_examples=4),
    algorithm=dict(name="preference", loss="dpo", beta=0.2, label_smoothing=0.1),
    optimizer=dict(learning_rate=1.5e-4, warmup_steps=20, b2=0.99),
    run=dict(init="sft", steps=860, save_every=430),
  ),
  "ppo": dict(
    data=dict(train="data/preference.jsonl", eval="", holdout=0.0, rows=64, row_length=40),
    algorithm=dict(
      name="ppo",
      reward_model="reward",
      max_new_tokens=MAX_NEW_TOKENS,
      epochs=2,
      minibatches=4,
      critic="own",
      kl_coef=0.05,
    ),
    optimizer=dict(learning_rate=1e-4, warmup_steps=2, b2=0.99),
    run=dict(init="sft", steps=60, log_every=1, save_every=20),
  ),
}
PATHS = (("data", "train"), ("data", "eval"), ("run", "init"), ("algorithm", "reward_model"))  # relative to the workdir


@alone("runs the quickstart")
def quickstart(workdir: epath.PathLike, seed: int = 0) -> dict[str, Any]:
  """Runs the stages that are not yet complete, evaluates the models, and writes summary.json and report.html.

  Args:
    workdir: made if missing; holds a folder per stage, the data and the tokenizer.
    seed: of the data, the parameters, the order and the samples.

  Returns:
    The content of summary.json.

  Raises:
    InputError: as `train.fit`, such as a `workdir` that another seed began.
    SystemExit: with status 0 after a signal; the same call continues.
  """
  workdir = epath.Path(workdir).expanduser()
  wall_s: dict[str, float] = {}

  with _timed(wall_s, "data"):
    data = write_data(workdir, seed)

  runs: dict[str, Run] = {}
  for stage in STAGES:
    with _timed(wall_s, stage):
      runs[stage] = fit(stage_config(stage, workdir, seed), workdir / stage, stage)
    if runs[stage].stopped:
      raise SystemExit(0)  # a signal stopped it; the same command continues from here

  policies = {stage: run for stage, run in runs.items() if run.model.config.head == "none"}
  summary = {"seed": seed, "commit": provenance.commit(), "versions": provenance.versions()}
  summary["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  with _timed(wall_s, "evaluation"):
    config = stage_config("reward", workdir, seed)
    summary["sft"] = {k: v for k, v in runs["sft"].metrics.items() if k.startswith("eval/")}
    summary["reward"] = evaluate_reward(runs["reward"], config, data / "eval_preference.jsonl")
    summary |= evaluate_policies(policies, data / "eval_prompts.jsonl", seed)
  summary["wall_s"] = {name: round(seconds, 1) for name, seconds in wall_s.items()}

  with output.file(workdir / "metrics.jsonl") as out:
    for stage in STAGES:
      for line in reading.read_text(workdir / stage / "metrics.jsonl").splitlines():
        out.write(json.dumps({"stage": stage, **json.loads(line)}) + "\n")
  output.write(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  report.render(workdir)
  return summary


def write_data(workdir: epath.Path, seed: int) -> epath.Path:
  """Returns the folder of the world's records; writes them and the tokenizer if the tokenizer is missing."""
  data = workdir / "data"
  if not (workdir / "tokenizer.model").exists():
    testbed.write(data, seed=seed, **DATA)
    train_tokenizer(read_texts([data / "sft.jsonl", data / "preference.jsonl"]), workdir / "tokenizer.model", VOCAB)
  return data


def stage_config(stage: str, workdir: epath.Path, seed: int) -> Config:
  """Makes the config of one stage, a key of `STAGES`; the same on every machine."""
  raw = {name: dict(values) for name, values in STAGES[stage].items()}
  raw["model"] = dict(MODEL)
  raw["data"] = {"eval": "data/eval_preference.jsonl"} | raw["data"]
  for section, key in PATHS:
    if raw[section].get(key):
      raw[section][key] = str(workdir / raw[section][key])
  raw["data"] |= dict(tokenizer=str(workdir / "tokenizer.model"), cache=str(workdir / "cache"))
  raw["run"] |= dict(seed=seed)
  return config_lib.resolve(raw)


def evaluate_reward(run: Run, config: Config, path: epath.PathLike) -> dict[str, Any]:
  """Measures accuracy, calibration and the best possible accuracy of a reward model on held-out pairs.

  Args:
    run: of the reward model.
    config: of its stage: its held-out pairs are scored.
    path: the same pairs as a file, for the best possible accuracy.

  Returns:
    The record of `preference.summary`, and "bayes_accuracy".
  """
  dataset = Dataset.open(config.data, run.tokenizer, "preference", "eval", config.run.seed)
  with jax.set_mesh(run.mesh):
    margins = preference.reward_margins(run.model, run.params, dataset.epoch())
  source = open_source(path)
  bayes = testbed.bayes_accuracy(source[i] for i in range(len(source)))
  prompts = [json.dumps(dataset.example(number).prompt) for number in margins]
  return {**preference.summary(list(margins.values()), prompts), "bayes_accuracy": bayes}


def evaluate_policies(policies: Mapping[str, Run], path: epath.PathLike, seed: int) -> dict[str, Any]:
  """Samples completions of every policy for held-out prompts; compares gold rewards and KL with the first policy.

  Args:
    policies: by name; the others began with the first.
    path: records with a prompt of the built-in world.
    seed: of the samples; a policy's samples do not depend on the policies after it.

  Returns:
    A record for each policy but the first, and "samples": examples side by side.
  """
  source = open_source(path)
  records = [source[i] for i in range(len(source))]
  texts = [record["prompt"] for record in records]
  baseline, *others = policies
  first = policies[baseline]
  turns: list[Dialogue] = [[{"role": "user", "content": text}] for text in texts]
  prompts = [first.tokenizer.render(messages, add_generation_prompt=True) for messages in turns]
  # Every policy has its own key: with one key, prompts on which the policies agree would be ties.
  keys = dict(zip(policies, jax.random.split(jax.random.key(seed), len(policies)), strict=True))
  divergence = {}
  drawn = {}
  with jax.set_mesh(first.mesh):
    for name, run in policies.items():
      drawn[name] = sample_text(
        run.model, run.params, run.tokenizer, prompts, key=keys[name], max_new_tokens=MAX_NEW_TOKENS
      )
    for name in others:
      tokens = [completion.tokens for completion in drawn[name]]
      policy = policies[name]
      policy_logps = completion_logps(policy.model, policy.params, prompts, tokens)
      first_logps = completion_logps(first.model, first.params, prompts, tokens)
      divergence[name] = sequence_kl(policy_logps, first_logps, texts)
  responses = {name: [c.text for c in completions] for name, completions in drawn.items()}
  finished = {name: sum(c.finished for c in completions) / len(records) for name, completions in drawn.items()}
  gold = {name: gold_scores.gold_rewards(texts, responses[name]) for name in others}
  summary: dict[str, Any] = {}
  for place, name in enumerate(others):
    summary[name] = {
      **gold_scores.compare(texts, responses[name], responses[baseline], baseline),
      "kl": divergence[name].kl.value,
      "kl_interval": divergence[name].kl.interval,
      "kl_stderr": divergence[name].stderr,
      "kl_per_token": divergence[name].per_token,
      "finished": finished[name],
      f"finished_{baseline}": finished[baseline],
    }
    for before in others[:place]:
      wins = win_rate(gold[name], gold[before], texts)
      summary[name] |= {
        f"gold_win_rate_vs_{before}": wins.value,
        f"gold_win_rate_vs_{before}_interval": wins.interval,
      }
  return summary | {"samples": gold_scores.side_by_side(records, responses)}


@contextlib.contextmanager
def _timed(wall_s: dict[str, float], name: str) -> Iterator[None]:
  """Opens a context that adds its seconds to `wall_s[name]`."""
  begin = time.perf_counter()
  yield
  wall_s[name] = wall_s.get(name, 0.0) + time.perf_counter() - begin
