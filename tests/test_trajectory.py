"""Twenty optimizer steps, in TRL's trainers and here, on the same Llama, the same weights and the same batches.

Everything that a step is made of must be the same for this: rotary positions, norms and attention, what is masked, the
loss and what it is divided by, clipping, AdamW's moments, bias correction, epsilon and decay. TRL pads each completion
to a row of its own; here several share one.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.data.stream import Item, Layout, fill_row, stack
from alignjax.data.transform import Side
from alignjax.model import ModelConfig, decoder
from alignjax.system import sharding
from alignjax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from alignjax.training.step import create_state, make_train_step
from tests import made, trl_environment

CONFIG = ModelConfig(vocab=64, layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=96, tied=False)
STEPS, EXAMPLES = 20, 4  # per step
RECORDS = 20  # each comes again every fifth step
RATE = 2e-4
TOLERANCE = 1e-4
ROW = {"length": 112, "examples": 3, "pad_id": 0}


class Case(NamedTuple):
  """One run: a trainer of TRL with arguments, and what computes the same here.

  Attributes:
    trainer: of benchmarks/trl_trajectory.py.
    arguments: of its config; all else as TRL has it.
    algorithm, loss: here; its hyper-parameters have the same values by default.
    optimizer: what is not the default here.
    prompt: the most tokens of a prompt.
  """

  trainer: str
  arguments: dict[str, Any]
  algorithm: str
  loss: str
  optimizer: Mapping[str, Any] = MappingProxyType({})
  prompt: int = 8


CASES = {
  "dpo": Case("dpo", {"beta": 0.1}, "preference", "dpo"),
  "ipo": Case("dpo", {"beta": 0.1, "loss_type": ["ipo"]}, "preference", "ipo"),
  "kto": Case("kto", {"beta": 0.1}, "unpaired", "kto"),
  # TRL's likelihood term is over the prompts too, but never over a first token: with prompts of one token both are
  # means over the same tokens.
  "orpo": Case("orpo", {"beta": 0.1}, "preference", "orpo", prompt=1),
  "simpo": Case(
    "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, "preference", "simpo"
  ),
  "reward": Case("reward", {"center_rewards_coefficient": 0.01}, "reward", "bradley_terry"),
  "dpo, with weight decay and two microbatches": Case(
    "dpo",
    {"beta": 0.1, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
    "preference",
    "dpo",
    optimizer={"weight_decay": 0.1, "microbatches": 2},
  ),
}
KEYS = {"loss": "loss", "margin": "rewards/margins", "grad_norm": "grad_norm"}


def records(case: Case) -> list[dict[str, Any]]:
  """Random tokens; completions end with 1."""
  rng = np.random.default_rng(0)
  draw = lambda most: rng.integers(3, CONFIG.vocab, rng.integers(1, most + 1)).tolist()
  sides = ("completion",) if case.trainer == "kto" else ("chosen", "rejected")
  distinct = [{"prompt": draw(case.prompt)} | {side: [*draw(8), 1] for side in sides} for _ in range(RECORDS)]
  if case.trainer == "kto":  # two of each class in a step
    distinct = [record | {"label": i % EXAMPLES in (0, 3)} for i, record in enumerate(distinct)]
  return [distinct[i % RECORDS] for i in range(STEPS * EXAMPLES)]


def initial_params() -> dict[str, Any]:
  """Weights of a size at which logits, norms and rewards tell examples apart from the first step on."""
  model = decoder.make(CONFIG)._replace(config=CONFIG)
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(1)
  normal = lambda shape, scale: (scale * rng.standard_normal(shape)).astype(np.float32)
  params |= {name: normal(params[name].shape, 0.3) for name in ("embed", "unembed")}
  params["score"] = normal((CONFIG.embed, 1), 0.1)
  params["norm"] += normal(params["norm"].shape, 0.1)
  for name in ("attention_norm", "mlp_norm"):
    params["layers"][name] += normal(params["layers"][name].shape, 0.1)
  return jax.tree.map(np.asarray, params)


def as_llama(params: dict[str, Any]) -> dict[str, np.ndarray]:
  """The weights under transformers' names: matrices are [out, in]."""
  D = CONFIG.embed
  into = lambda w: w.reshape(D, -1).T
  out = lambda w: w.reshape(-1, D).T
  names = {
    "input_layernorm": ("attention_norm", lambda w: w),
    "self_attn.q_proj": ("q", into),
    "self_attn.k_proj": ("k", into),
    "self_attn.v_proj": ("v", into),
    "self_attn.o_proj": ("o", out),
    "post_attention_layernorm": ("mlp_norm", lambda w: w),
    "mlp.gate_proj": ("gate", into),
    "mlp.up_proj": ("up", into),
    "mlp.down_proj": ("down", out),
  }
  layers = {
    f"model.layers.{i}.{theirs}.weight": turn(params["layers"][ours][i])
    for i in range(CONFIG.layers)
    for theirs, (ours, turn) in names.items()
  }
  ends = {"model.embed_tokens": params["embed"], "model.norm": params["norm"], "lm_head": params["unembed"]}
  return layers | {f"{name}.weight": w for name, w in ends.items()} | {"score.weight": params["score"].T}


LLAMA = {
  "vocab_size": CONFIG.vocab,
  "hidden_size": CONFIG.embed,
  "num_hidden_layers": CONFIG.layers,
  "num_attention_heads": CONFIG.heads,
  "num_key_value_heads": CONFIG.kv_heads,
  "head_dim": CONFIG.head_dim,
  "intermediate_size": CONFIG.mlp,
  "rms_norm_eps": CONFIG.norm_eps,
  "rope_parameters": {"rope_type": "default", "rope_theta": CONFIG.rope_theta},
  "tie_word_embeddings": CONFIG.tied,
  "max_position_embeddings": ROW["length"],
  "num_labels": 1,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "bos_token_id": None,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, list[dict[str, float]]]:
  """What TRL's trainers log, by case."""
  folder = tmp_path_factory.mktemp("trl")
  cases = {}
  for name, case in CASES.items():
    arguments = {"learning_rate": RATE, **case.arguments}
    cases[name] = {"trainer": case.trainer, "arguments": arguments, "steps": STEPS, "records": records(case)}
  (folder / "cases.json").write_text(json.dumps(cases))
  (folder / "llama.json").write_text(json.dumps(LLAMA))
  np.savez(folder / "weights.npz", **as_llama(initial_params()))
  trl_environment.run("trl_trajectory.py", str(folder))
  return json.loads((folder / "trl.json").read_text())


def make_batch(case: Case, chunk: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """The examples of one step in two rows, one of them fuller."""
  half = ROW["examples"]
  if case.trainer == "kto":  # the completion that each is mismatched with is the one before, in a circle
    layout = Layout(kind="mismatched", **ROW, mismatched_length=ROW["length"])
    labelled = [Item([side(r, "completion")], 0.0, 1.0, 0, (float(r["label"]),)) for r in chunk]
    return stack(
      [fill_row(labelled[:half], layout, labelled[-1]), fill_row(labelled[half:], layout, labelled[half - 1])]
    )
  layout = Layout(kind="preference", **ROW)
  pairs = [Item([side(r, "chosen"), side(r, "rejected")], 0.0, 1.0, 0) for r in chunk]
  return stack([fill_row(pairs[:half], layout), fill_row(pairs[half:], layout)])


def side(record: dict[str, Any], name: str) -> Side:
  """A prompt with one of its completions."""
  ids, prompt = np.array([*record["prompt"], *record[name]], np.int32), len(record["prompt"])
  return Side(ids, (np.arange(len(ids)) >= prompt).astype(np.float32), prompt)


def ours(case: Case, mesh: jax.sharding.Mesh) -> list[dict[str, float]]:
  """The same of this package's step, as `train` wires it."""
  module = ALGORITHMS[case.algorithm]
  config = CONFIG if module.head == "none" else ModelConfig(**{**vars(CONFIG), "head": "scalar"})
  optimizer = OptimizerConfig(learning_rate=RATE, schedule="constant", **case.optimizer)
  algorithm = made.make(module, decoder.make(config), case.loss, optimizer.microbatches)
  tx, schedule = make_optimizer(optimizer), make_schedule(optimizer, STEPS)
  hparams = made.hparams(module, case.loss) | {"learning_rate": RATE}
  hparams = {name: jnp.float32(value) for name, value in hparams.items()}
  names = decoder.weights(config)
  params = lambda: {name: jax.tree.map(jnp.array, leaf) for name, leaf in initial_params().items() if name in names}

  lines, examples = [], records(case)
  with jax.set_mesh(mesh):
    state = create_state(params(), tx, jax.random.key(0), algorithm.running, algorithm.synced)
    frozen = {name: params() for name in algorithm.constant}
    prepare = jax.jit(algorithm.prepare)
    step = jax.jit(make_train_step(algorithm.loss, tx, schedule, optimizer.microbatches), donate_argnums=0)
    for i in range(STEPS):
      batch = sharding.to_mesh(make_batch(case, examples[i * EXAMPLES : (i + 1) * EXAMPLES]), mesh)
      batch = prepare(algorithm.trees(frozen, state.params), batch.updated(running=state.running), state.key)
      state, metrics = step(state, batch, hparams)
      metrics = algorithm.finish(jax.tree.map(float, metrics))
      lines.append({name: metrics[key] for name, key in KEYS.items()})
  return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_those_of_trl(name, theirs, one_device):
  found = ours(CASES[name], one_device)
  columns = lambda lines: {key: np.array([line[key] for line in lines]) for key in lines[0]}
  expected, found = columns(theirs[name]), columns(found)
  largest = {key: float(np.abs(found[key] - expected[key]).max()) for key in expected}
  print(f"{name}: largest differences over {STEPS} steps: {largest}")
  assert len(expected["loss"]) == STEPS
  assert expected["loss"][0] != pytest.approx(expected["loss"][-1], abs=100 * TOLERANCE)  # something was learnt
  np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=TOLERANCE)
  np.testing.assert_allclose(found["margin"], expected["margin"], rtol=0, atol=TOLERANCE)
  np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3)
