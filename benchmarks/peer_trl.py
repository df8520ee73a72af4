"""TRL's and transformers' turns in benchmarks/peers.py.

  python benchmarks/peer_trl.py FOLDER TASK DTYPE

FOLDER is what peers.py wrote. Runs in an environment of requirements-trl.txt; PPO in one of requirements-trl-ppo.txt,
since TRL 1.13 dropped it. TRL's settings are its own but for: no gradient checkpointing, AdamW at a constant rate, as
many threads as cores. In bfloat16 the trainers autocast over float32 weights: by `bf16=True`, which PPO's overlooks, so
there as `accelerate launch` does it; that leaves out PPO's rollout, reference and reward model. Generation holds its
weights in bfloat16.
"""

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peer_turns import Turns
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl_trajectory import ARGUMENTS, TRAINERS
from words import as_text, make_tokenizer


class OnRequest(TrainerCallback):
  """A turn is an optimizer step."""

  def __init__(self, turns: Turns):
    self.turns = turns

  def on_step_begin(self, args, state, control, **kwargs):
    self.turns.begin(losses=logged(state, "loss"))

  def on_step_end(self, args, state, control, **kwargs):
    self.turns.end()


class OnIteration(OnRequest):
  """A turn is an iteration of PPO, whose trainer says when one ends but not when it begins."""

  def on_train_begin(self, args, state, control, **kwargs):
    self.turns.begin()

  def on_step_end(self, args, state, control, **kwargs):
    self.turns.end()
    self.turns.begin(kl=logged(state, "objective/kl"), score=logged(state, "objective/scores"))


def logged(state: Any, key: str) -> list[float]:
  """A number of each step so far that was logged."""
  return [line[key] for line in state.log_history if key in line]


def load(make: Any, folder: pathlib.Path, **options: Any) -> torch.nn.Module:
  """A model in float32, or as the options say."""
  return make.from_pretrained(folder, **{"dtype": torch.float32} | options)


def train(name: str) -> Callable[[Turns, pathlib.Path, dict[str, Any], str], None]:
  """Turns of "dpo" or "reward" on the one batch."""

  def run(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
    make_trainer, make_config = TRAINERS[name]
    with np.load(folder / "tokens.npz") as tokens:
      pairs = tokens["pairs"]
    half = pairs.shape[2] // 2
    texts = [
      as_text({"prompt": a[:half].tolist(), "chosen": a[half:].tolist(), "rejected": b[half:].tolist()})
      for a, b in pairs
    ]
    if name == "dpo":
      model, more = load(AutoModelForCausalLM, folder / "policy"), {"beta": work["beta"]}
      reference = {"ref_model": load(AutoModelForCausalLM, folder / "reference")}
    else:
      model, more = load(AutoModelForSequenceClassification, folder / "reward"), {"center_rewards_coefficient": 0.01}
      reference = {}
    with tempfile.TemporaryDirectory() as out:
      trainer = make_trainer(
        model=model,
        args=make_config(output_dir=out, per_device_train_batch_size=len(pairs), **arguments(work, dtype), **more),
        train_dataset=Dataset.from_list(texts),
        processing_class=make_tokenizer(model.config.vocab_size),
        callbacks=[OnRequest(turns)],
        **reference,
      )
      trainer.train()

  return run


def arguments(work: dict[str, Any], dtype: str) -> dict[str, Any]:
  """Those of every trainer; it goes on until nobody asks for a turn."""
  return ARGUMENTS | {"bf16": dtype == "bfloat16", "max_steps": 10**6, "learning_rate": work["learning_rate"]}


def ppo(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of PPO."""
  precision = {"float32": "no", "bfloat16": "bf16"}[dtype]
  os.environ["ACCELERATE_MIXED_PRECISION"] = precision
  from trl.experimental.ppo import PPOConfig, PPOTrainer

  with np.load(folder / "tokens.npz") as tokens:
    prompts = tokens["prompts"].tolist()
  policy = load(AutoModelForCausalLM, folder / "policy")
  with tempfile.TemporaryDirectory() as out:
    trainer = PPOTrainer(
      args=PPOConfig(
        output_dir=out,
        per_device_train_batch_size=len(prompts),
        num_mini_batches=1,
        num_ppo_epochs=work["epochs"],
        response_length=work["new_tokens"],
        temperature=1.0,
        total_episodes=len(prompts) * 10**6,
        num_sample_generations=0,
        **arguments(work, dtype),
      ),
      processing_class=make_tokenizer(policy.config.vocab_size),
      model=policy,
      ref_model=load(AutoModelForCausalLM, folder / "reference"),
      reward_model=load(AutoModelForSequenceClassification, folder / "reward"),
      value_model=load(AutoModelForSequenceClassification, folder / "reward"),
      train_dataset=Dataset.from_dict({"input_ids": prompts}),
      callbacks=[OnIteration(turns)],
    )
    assert trainer.accelerator.mixed_precision == precision
    trainer.train()


def generate(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of `transformers.generate`: one batch, which nothing stops."""
  model = load(AutoModelForCausalLM, folder / "policy", dtype=getattr(torch, dtype)).eval()
  model.generation_config.eos_token_id = None
  with np.load(folder / "tokens.npz") as tokens:
    prompts = torch.from_numpy(tokens["batch"]).long()
  settings = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": work["batch_new_tokens"], "pad_token_id": 0}
  greedy = model.generate(prompts, do_sample=False, **settings)[:, prompts.shape[1] :].tolist()
  while True:
    turns.begin(greedy=greedy)
    out = model.generate(prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **settings)
    turns.end()
    assert out.shape[1] == prompts.shape[1] + work["batch_new_tokens"]


TASKS = {"dpo": train("dpo"), "reward": train("reward"), "ppo": ppo, "generate": generate}


def main() -> None:
  folder, task, dtype = sys.argv[1:]
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  turns = Turns("trl", "transformers", "torch")
  work = json.loads((pathlib.Path(folder) / "work.json").read_text())
  TASKS[task](turns, pathlib.Path(folder), work, dtype)


if __name__ == "__main__":
  main()
