"""Tunix's turns in benchmarks/peers.py.

  python benchmarks/peer_tunix.py FOLDER TASK DTYPE

FOLDER is what peers.py wrote. Runs in an environment of requirements-tunix.txt. Tunix computes in the dtype of the
weights, so in bfloat16 these and Adam's moments are in bfloat16 too. It trains no reward models. Its Llama does not
take the `segment_ids` that PPO's scores pass to it, and PPO's metrics fail on values in bfloat16: `Scorer` takes and
ignores the ones and gives float32. Tunix rolls out a minibatch at a time, so there is one.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from peer_turns import Turns
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import params
from tunix.models.llama3.model import Einsum, Llama3, ModelConfig
from tunix.models.safetensors_loader import load_and_create_model
from tunix.rl import rl_cluster
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from words import make_tokenizer, words

NO_STOP = -1
MESH = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


class Scorer(Llama3):
  """A Llama with one score for a head, which takes what PPO passes to models that score."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.lm_head = Einsum("BTD,DV->BTV", (config.embed_dim, 1), rngs=rngs, sharding=config.shd_config.emb_dv)

  def __call__(self, *args, segment_ids=None, **kwargs):
    del segment_ids
    scores, cache = super().__call__(*args, **kwargs)
    return scores.astype(jnp.float32), cache


def make_config(model: dict[str, Any]) -> ModelConfig:
  """Tunix's config of a model in our words; its Llama's rotary base is 10^6, whatever the config says."""
  assert model["rope_theta"] == 1e6
  return ModelConfig(
    num_layers=model["layers"],
    vocab_size=model["vocab"],
    embed_dim=model["embed"],
    hidden_dim=model["mlp"],
    num_heads=model["heads"],
    head_dim=model["head_dim"],
    num_kv_heads=model["kv_heads"],
    rope_theta=int(model["rope_theta"]),
    norm_eps=model["norm_eps"],
  )


def load(folder: pathlib.Path, work: dict[str, Any], dtype: str, kind: type[Llama3] = Llama3) -> Llama3:
  """The weights of a folder."""

  def names(config: ModelConfig) -> dict[str, Any]:
    table = params._get_key_and_transform_mapping(config)
    return table | {r"score\.weight": ("lm_head.w", ((1, 0), None))}

  config = make_config(work["model"])
  return load_and_create_model(str(folder), kind, config, names, MESH, dtype=jnp.dtype(dtype))


def optimizer(work: dict[str, Any]) -> optax.GradientTransformation:
  """As the others have it."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(work["learning_rate"], weight_decay=0.0))


def dpo(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of an optimizer step on the one batch."""
  with np.load(folder / "tokens.npz") as tokens:
    pairs = tokens["pairs"]
  half = pairs.shape[2] // 2
  fields = {"prompt": pairs[:, 0, :half], "chosen": pairs[:, 0, half:], "rejected": pairs[:, 1, half:]}
  masks = {f"{name}_mask": np.ones_like(ids) for name, ids in fields.items()}
  batch = TrainingInput(**{f"{name}_ids": ids for name, ids in fields.items()}, **masks)
  trainer = DPOTrainer(
    model=load(folder / "policy", work, dtype),
    ref_model=load(folder / "reference", work, dtype),
    optimizer=optimizer(work),
    training_config=DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**6, beta=work["beta"]),
  )

  def batches() -> Iterator[TrainingInput]:
    losses: list[float] = []
    while True:
      turns.begin(losses=losses)
      yield batch
      jax.block_until_ready(nnx.state(trainer.model))
      turns.end()
      losses.append(float(trainer._prev_buffered_train_metrics.loss))

  trainer.train(batches())


def ppo(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of an iteration of PPO."""
  with np.load(folder / "tokens.npz") as tokens:
    prompts = tokens["prompts"].tolist()
  count, width = len(prompts), len(prompts[0])
  tokenizer = make_tokenizer(work["model"]["vocab"])
  cluster = rl_cluster.RLCluster(
    actor=load(folder / "policy", work, dtype),
    reference=load(folder / "reference", work, dtype),
    reward=load(folder / "reward", work, dtype, Scorer),
    critic=load(folder / "reward", work, dtype, Scorer),
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(rl_cluster.Role, MESH),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer(work),
        critic_optimizer=optimizer(work),
        eval_every_n_steps=10**9,
        max_steps=10**6,
        mini_batch_size=count,
      ),
      rollout_config=RolloutConfig(
        max_tokens_to_generate=work["new_tokens"],
        max_prompt_length=width,
        kv_cache_size=width + work["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[NO_STOP],
      ),
    ),
  )
  found: dict[str, list[float]] = {"kl": [], "score": []}

  def note(buffer: Any) -> None:
    found["score"] += buffer.metrics["rewards/score/mean"][0]
    found["kl"] += [float(kl) * work["new_tokens"] for kl in buffer.metrics["rewards/reward_kl_penalty"][0]]

  def batches() -> Iterator[dict[str, np.ndarray]]:
    while True:
      turns.begin(**json.loads(json.dumps(found, default=float)))
      yield {"prompts": np.array([words(prompt) for prompt in prompts])}
      jax.block_until_ready((nnx.state(cluster.actor_trainer.model), nnx.state(cluster.critic_trainer.model)))
      turns.end()

  cluster.with_external_metrics_logger(note)
  PPOLearner(cluster, PPOConfig(num_iterations=work["epochs"], beta=0.05, kl_method="kl")).train(batches())


def generate(turns: Turns, folder: pathlib.Path, work: dict[str, Any], dtype: str) -> None:
  """Turns of Tunix's sampler: one batch, which nothing stops."""
  with np.load(folder / "tokens.npz") as tokens:
    prompts = tokens["batch"].tolist()
  c, length = work["model"], len(prompts[0]) + work["batch_new_tokens"]
  cache = CacheConfig(length, c["layers"], c["kv_heads"], c["head_dim"])
  sampler = Sampler(load(folder / "policy", work, dtype), make_tokenizer(c["vocab"]), cache)
  settings = {
    "input_strings": [words(prompt) for prompt in prompts],
    "max_generation_steps": work["batch_new_tokens"],
    "max_prompt_length": len(prompts[0]),
    "eos_tokens": [NO_STOP],
  }
  greedy = [ids.tolist() for ids in sampler(**settings).tokens]
  for seed in range(10**6):
    turns.begin(greedy=greedy)
    out = sampler(**settings, temperature=1.0, top_p=1.0, seed=seed)
    turns.end()
    assert all(len(ids) == work["batch_new_tokens"] for ids in out.tokens)


TASKS = {"dpo": dpo, "ppo": ppo, "generate": generate}


def main() -> None:
  folder, task, dtype = sys.argv[1:]
  turns = Turns("google-tunix", "jax", "flax", "optax")
  work = json.loads((pathlib.Path(folder) / "work.json").read_text())
  with MESH:
    TASKS[task](turns, pathlib.Path(folder), work, dtype)


if __name__ == "__main__":
  main()
