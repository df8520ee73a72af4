"""From nothing to an aligned model on a laptop: SFT, a reward model, DPO, and the proof that it worked.

The data is the built-in world's (alignjax/testbed), written as JSONL and read back like anybody's; its gold reward
judges the outcome and is seen by no training step.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from alignjax import config as config_lib
from alignjax import provenance, report, testbed
from alignjax.config import Config
from alignjax.data.loader import Dataset
from alignjax.data.source import open_source
from alignjax.data.tokenizer import read_texts, train_tokenizer
from alignjax.evaluation import preference
from alignjax.evaluation import testbed as judge
from alignjax.evaluation.kl import completion_logps, sequence_kl
from alignjax.generate import sample_text
from alignjax.run import Run
from alignjax.train import fit

DATA = dict(sft=20_000, preference=32_000, evaluation=4_000, prompts=600)
VOCAB = 1024
MODEL = dict(layers=3, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=384, tied=True)
MAX_NEW_TOKENS = 48
# Many small steps: within a few minutes, a model of this size learns more from them than from few large ones. DPO's
# label smoothing: one annotator in eleven tosses a coin, and without it the policy drifts into malformed sentences.
STAGES = {
  "sft": dict(
    data=dict(rows=16, row_length=96, max_examples=6),
    algorithm=dict(name="sft"),
    optimizer=dict(learning_rate=2e-3, warmup_steps=40, b2=0.98, weight_decay=0.1),
    run=dict(steps=1040, save_every=520),
  ),
  "reward": dict(
    data=dict(rows=8, row_length=144, max_examples=4),
    algorithm=dict(name="reward"),
    optimizer=dict(learning_rate=5e-4, warmup_steps=20, b2=0.99, weight_decay=0.1),
    run=dict(steps=1860, save_every=930),
  ),
  "dpo": dict(
    data=dict(rows=8, row_length=144, max_examples=4),
    algorithm=dict(name="preference", loss="dpo", beta=0.2, label_smoothing=0.1),
    optimizer=dict(learning_rate=1.5e-4, warmup_steps=20, b2=0.99),
    run=dict(steps=860, save_every=430),
  ),
}


def quickstart(workdir: epath.PathLike, seed: int = 0) -> dict[str, Any]:
  """Runs the stages (those that are complete are not run again), evaluates, writes summary.json and report.html.

  Args:
    workdir: made if missing; one folder per stage, the data and the tokenizer beside them.
    seed: of the data, the parameters, the order and the samples.

  Returns:
    What summary.json holds.
  """
  workdir = epath.Path(workdir).expanduser()
  workdir.mkdir(parents=True, exist_ok=True)
  wall_s: dict[str, float] = {}

  with _timed(wall_s, "data"):
    data = write_data(workdir, seed)

  runs: dict[str, Run] = {}
  for stage in STAGES:
    with _timed(wall_s, stage):
      runs[stage] = fit(stage_config(stage, workdir, seed), workdir / stage, stage)
    if runs[stage].stopped:
      raise SystemExit(0)  # told to stop; the same command goes on from here

  summary = {"seed": seed, "commit": provenance.commit(), "versions": provenance.versions()}
  summary["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  with _timed(wall_s, "evaluation"):
    config = stage_config("reward", workdir, seed)
    summary["sft"] = {k: v for k, v in runs["sft"].metrics.items() if k.startswith("eval/")}
    summary["reward"] = evaluate_reward(runs["reward"], config, data / "eval_preference.jsonl")
    summary |= evaluate_policies(runs["sft"], runs["dpo"], data / "eval_prompts.jsonl", seed)
  summary["wall_s"] = {name: round(seconds, 1) for name, seconds in wall_s.items()}

  with (workdir / "metrics.jsonl").open("w") as out:
    for stage in STAGES:
      for line in (workdir / stage / "metrics.jsonl").read_text().splitlines():
        out.write(json.dumps({"stage": stage, **json.loads(line)}) + "\n")
  (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  report.render(workdir)
  return summary


def write_data(workdir: epath.Path, seed: int) -> epath.Path:
  """The folder of the world's records, made with the tokenizer if they are missing."""
  data = workdir / "data"
  if not (workdir / "tokenizer.model").exists():
    testbed.write(data, seed=seed, **DATA)
    train_tokenizer(read_texts([data / "sft.jsonl", data / "preference.jsonl"]), workdir / "tokenizer.model", VOCAB)
  return data


def stage_config(stage: str, workdir: epath.Path, seed: int) -> Config:
  """The config of one stage; the same for every machine."""
  data = workdir / "data"
  kind = "sft" if stage == "sft" else "preference"
  raw = {name: dict(values) for name, values in STAGES[stage].items()}
  raw["model"] = dict(MODEL)
  raw["data"] |= dict(
    train=str(data / f"{kind}.jsonl"),
    eval=str(data / "eval_preference.jsonl"),
    tokenizer=str(workdir / "tokenizer.model"),
    cache=str(workdir / "cache"),
  )
  raw["run"] |= dict(seed=seed, init="" if stage == "sft" else str(workdir / "sft"))
  return config_lib.resolve(raw)


def evaluate_reward(run: Run, config: Config, path: epath.PathLike) -> dict[str, Any]:
  """Accuracy, calibration and the best possible accuracy of a reward model on held-out pairs."""
  dataset = Dataset.open(config.data, run.tokenizer, "preference", "eval", config.run.seed)
  with jax.set_mesh(run.mesh):
    margins = preference.reward_margins(run.model, run.params, dataset.epoch())
  source = open_source(path)
  bayes = testbed.bayes_accuracy(source[i] for i in range(len(source)))
  return {**preference.summary(list(margins.values())), "bayes_accuracy": bayes}


def evaluate_policies(sft: Run, dpo: Run, path: epath.PathLike, seed: int) -> dict[str, Any]:
  """Completions of both policies for held-out prompts: gold rewards, KL from SFT, examples side by side."""
  source = open_source(path)
  records = [source[i] for i in range(len(source))]
  texts = [record["prompt"] for record in records]
  render = lambda text: sft.tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)
  prompts = [render(text) for text in texts]
  with jax.set_mesh(sft.mesh):
    sample = lambda run, key: sample_text(
      run.model, run.params, run.tokenizer, prompts, key=key, max_new_tokens=MAX_NEW_TOKENS
    )
    # Independent draws: with one key, prompts on which the policies agree would be ties.
    key_sft, key_dpo = jax.random.split(jax.random.key(seed))
    completions = {"sft": sample(sft, key_sft), "dpo": sample(dpo, key_dpo)}
    tokens = [completion.tokens for completion in completions["dpo"]]
    logps = [completion_logps(run.model, run.params, prompts, tokens) for run in (dpo, sft)]
  responses = {name: [c.text for c in drawn] for name, drawn in completions.items()}
  divergence = sequence_kl(*logps)
  return {
    "dpo": {
      **judge.compare(texts, responses["dpo"], responses["sft"]),
      "kl": divergence.kl.value,
      "kl_interval": divergence.kl.interval,
      "kl_stderr": divergence.stderr,
      "kl_per_token": divergence.per_token,
      "finished": sum(c.finished for c in completions["dpo"]) / len(records),
      "finished_sft": sum(c.finished for c in completions["sft"]) / len(records),
    },
    "samples": judge.side_by_side(records, responses),
  }


@contextlib.contextmanager
def _timed(wall_s: dict[str, float], name: str) -> Iterator[None]:
  begin = time.perf_counter()
  yield
  wall_s[name] = wall_s.get(name, 0.0) + time.perf_counter() - begin
