"""Factors add a low-rank update and nothing else; the base under them is neither copied nor changed."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.model import decoder, lora
from alignjax.model.lora import LoraConfig
from alignjax.system import sharding
from alignjax.system.fingerprint import fingerprint
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Trees
from tests import short_run
from tests.conftest import make_mesh

FACTORS = LoraConfig(rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


@functools.cache
def adapted(config, factors=FACTORS):
  """The adapted model, parameters whose b is not 0, and its forward compiled."""
  model = lora.adapt(decoder.make(config), factors)
  params = jax.jit(model.init)(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(7), 16))
  grow = lambda pair: pair | {"b": 0.1 * jax.random.normal(next(keys), pair["b"].shape)}
  params["lora"] = lora.map_targets(grow, params["lora"])
  return model, params, jax.jit(model.forward)


def inputs(batch):
  return [batch[name] for name in ("tokens", "segment_ids", "positions")]


def base_of(params):
  return {name: tree for name, tree in params.items() if name != "lora"}


def test_factors_follow_from_the_table_of_weights(config):
  model = lora.adapt(decoder.make(config), FACTORS)
  table = model.weights()
  assert set(table["lora"]["layers"]) == {"q", "k", "v", "o", "gate", "up", "down"}
  for name, pair in table["lora"]["layers"].items():
    weight = table["layers"][name]
    assert pair["a"].shape[:-1] + pair["b"].shape[2:] == weight.shape
    assert pair["a"].axes[:-1] + pair["b"].axes[2:] == weight.axes
    assert pair["a"].shape[-1] == pair["b"].shape[1] == 4
  of_base = decoder.make(config).num_params()
  assert model.num_params() - of_base == sum(
    4 * (math.prod(w.shape[1 : 1 + w.inputs]) + math.prod(w.shape[1 + w.inputs :])) * config.layers
    for w in table["layers"].values()
    if w.inputs
  )


def test_a_is_uniform_as_in_peft_and_b_is_zero(config):
  params = jax.jit(lora.adapt(decoder.make(config), LoraConfig(rank=8)).init)(jax.random.key(0))["lora"]["layers"]
  for name, fan_in in {"q": 32, "o": 4 * 8, "down": 48}.items():
    a = np.asarray(params[name]["a"])
    assert np.abs(a).max() <= fan_in**-0.5
    assert a.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    assert not params[name]["b"].any()


def test_fresh_factors_change_nothing(config, model, params, sft_batch):
  factors = lora.adapt(model, FACTORS)
  fresh = jax.jit(factors.init)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, base_of(fresh), params)
  expected, _ = jax.jit(model.forward)(params, *inputs(sft_batch))
  hidden, _ = jax.jit(factors.forward)(fresh, *inputs(sft_batch))
  np.testing.assert_array_equal(hidden, expected)
  hidden, _ = jax.jit(factors.forward)(base_of(fresh), *inputs(sft_batch))  # the reference
  np.testing.assert_array_equal(hidden, expected)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_merged_is_unmerged(config, model, sft_batch, scaling):
  factors = dataclasses.replace(FACTORS, scaling=scaling)
  _, params, forward = adapted(config, factors)
  merged = lora.merge(params, factors)
  assert jax.tree.structure(merged) == jax.tree.structure(base_of(params))
  hidden, _ = forward(params, *inputs(sft_batch))
  again, _ = jax.jit(model.forward)(merged, *inputs(sft_batch))
  np.testing.assert_allclose(again, hidden, atol=2e-5)
  assert np.abs(hidden - jax.jit(model.forward)(base_of(params), *inputs(sft_batch))[0]).max() > 0.1


def test_merging_is_the_matrix_product(config):
  _, params, _ = adapted(config)
  merged = lora.merge(params, FACTORS)
  pair, w = params["lora"]["layers"]["o"], params["layers"]["o"]
  a, b = (np.float64(pair[side]) for side in "ab")
  np.testing.assert_allclose(merged["layers"]["o"], w + 2.0 * np.einsum("lnhr,lrd->lnhd", a, b), atol=1e-6)


def test_only_targets_have_factors(config):
  model = lora.adapt(decoder.make(config), LoraConfig(rank=2, targets="layers/(q|v)"))
  assert set(model.weights()["lora"]["layers"]) == {"q", "v"}
  with pytest.raises(InputError, match=r"lora\.targets='query' fits no matrix of the model; they are layers/down"):
    lora.adapt(decoder.make(config), LoraConfig(rank=2, targets="query"))


@pytest.mark.parametrize(
  ("values", "said"), [({"scaling": "big"}, "scaling"), ({"rank": -1}, "rank"), ({"targets": "("}, "targets")]
)
def test_bad_value_is_one_line(values, said):
  with pytest.raises(InputError, match=rf"lora\.{said}"):
    LoraConfig(**values)


def test_scales():
  assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
  assert LoraConfig(rank=16, alpha=32.0, scaling="rslora").scale == 8.0


def test_cache_gives_what_the_full_forward_gives(config):
  model, params, forward = adapted(config)
  tokens = np.random.default_rng(5).integers(1, config.vocab, (2, 11)).astype(np.int32)
  ids, positions = np.ones_like(tokens), np.tile(np.arange(11, dtype=np.int32), (2, 1))
  expected, _ = forward(params, tokens, ids, positions)
  cache, hidden = model.init_cache(2, 16), []
  for start, end in ((0, 6), *((t, t + 1) for t in range(6, 11))):
    out, cache = forward(params, *(x[:, start:end] for x in (tokens, ids, positions)), cache)
    hidden.append(out)
  np.testing.assert_allclose(np.concatenate(hidden, axis=1), expected, atol=1e-4)


@pytest.mark.slow
def test_a_loop_of_cached_forwards_rounds_the_factors_as_the_trainer_does(config):
  half = dataclasses.replace(config, dtype="bfloat16")
  model, params, _ = adapted(half, LoraConfig(rank=4, alpha=11.0))  # of a scale that is no power of two
  tokens = np.random.default_rng(0).integers(1, config.vocab, (2, 6)).astype(np.int32)
  _, cache = model.forward(params, tokens, 0 * tokens + 1, jnp.arange(6)[None], model.init_cache(2, 8))
  run = lambda params: model.forward(params, tokens[:, :1], 0 * tokens[:, :1] + 1, jnp.full((2, 1), 6), cache)[0]
  np.testing.assert_array_equal(run(model.unstack(params)), run(params))


def test_a_base_in_bfloat16_has_factors_and_a_head_in_float32(config):
  half = dataclasses.replace(config, param_dtype="bfloat16", head="scalar")
  trained, held = (model := lora.adapt(decoder.make(half), FACTORS)).split(model.abstract())
  assert set(trained) == {"lora", "score"}
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
  assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype("bfloat16")}


def test_members_under_vmap_are_the_members_alone(config, sft_batch):
  model, params, forward = adapted(config)
  members = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), params["lora"])
  run = lambda own: model.forward(base_of(params) | {"lora": own}, *inputs(sft_batch))[0]
  hidden = jax.jit(jax.vmap(run))(members)
  for k in range(3):
    own = jax.tree.map(lambda x: x[k], members)  # noqa: B023
    alone, _ = forward(params | {"lora": own}, *inputs(sft_batch))
    np.testing.assert_allclose(hidden[k], alone, atol=2e-5)


def train(config, batch, mesh, steps, microbatches=1):
  """Factors before and after DPO steps, the base before and after, and the losses."""
  run = short_run.make("preference", config, mesh, OPTIMIZER, microbatches, factors=FACTORS)
  with jax.set_mesh(mesh):
    state, held, batch = run.fresh(), run.held(), sharding.to_mesh(batch, mesh)
    before, prints, losses = jax.device_get(state.params["lora"]), fingerprint(held), []
    for _ in range(steps):
      prepared = run.prepare(Trees({"reference": held}), batch, state.key)
      state, metrics = run.step(state, prepared, run.hparams, held)
      losses.append(float(metrics["loss"]))
    after = jax.device_get(state.params["lora"])
    assert fingerprint(held) == prints, "the base changed"
  return before, after, losses


def test_dpo_starts_at_log_2_falls_and_leaves_the_base(config, preference_batch, eight_devices):
  _, _, losses = train(config, preference_batch, eight_devices, steps=8)
  assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
  assert losses[-1] < losses[0] - 0.02


def test_optimizer_state_is_of_the_factors_alone(config, one_device):
  run = short_run.make("preference", config, one_device, OPTIMIZER, factors=FACTORS)
  with jax.set_mesh(one_device):
    state = jax.eval_shape(run.fresh)
  factors = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert set(state.params) == {"lora"}
  assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * factors


# The first step of Adam is the sign of the gradient. b is 0, so a's gradient is 0 and must be exactly that; b's comes
# from sums over rows, which devices add in another order: an entry whose sign hangs on that would go astray.
@pytest.mark.parametrize(
  "name",
  ["2 x 2 x 2 devices", *(pytest.param(name, marks=pytest.mark.long) for name in ("8 devices", "8 devices, permuted"))],
)
def test_first_update_is_the_same_on_any_devices(config, preference_batch, one_device, name):
  before, expected, _ = train(config, preference_batch, one_device, steps=1)
  again, after, _ = train(config, preference_batch, make_mesh(name), steps=1)
  jax.tree.map(np.testing.assert_array_equal, again, before)
  for target, pair in after["layers"].items():
    np.testing.assert_array_equal(pair["a"], before["layers"][target]["a"])
    # Every entry moves by the learning rate (a whole one, within Adam's eps), in the same direction.
    np.testing.assert_allclose(pair["b"], expected["layers"][target]["b"], atol=1e-2 * 1e-2)
    assert (np.sign(pair["b"]) == np.sign(expected["layers"][target]["b"])).all()
    assert np.abs(pair["b"]).mean() > 0.9e-2


def test_microbatches_do_not_change_the_training(config, preference_batch, one_device, eight_devices):
  _, _, whole = train(config, preference_batch, one_device, steps=4)
  _, _, split = train(config, preference_batch, eight_devices, steps=4, microbatches=2)
  np.testing.assert_allclose(split, whole, rtol=1e-5)


def num_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_no_second_copy_of_the_base_is_made(config, one_device, preference_batch):
  large = dataclasses.replace(config, embed=256, mlp=1024, layers=4)
  run = short_run.make("preference", large, one_device, OPTIMIZER, factors=FACTORS)
  few = {name: value[:1, :32] for name, value in preference_batch.items()}
  with jax.set_mesh(one_device):
    state, held = run.fresh(), run.held()
    batch = sharding.to_mesh(few, one_device)
    prepare = run.prepare.lower(Trees({"reference": held}), batch, state.key).compile().memory_analysis()
    prepared = run.prepare(Trees({"reference": held}), batch, state.key)
    step = run.step.lower(state, prepared, run.hparams, held).compile().memory_analysis()
  # What a step holds beside its arguments (among them the one base, which prepare takes as the reference).
  assert step.argument_size_in_bytes < 1.1 * num_bytes((held, state, prepared))
  assert max(prepare.temp_size_in_bytes, step.temp_size_in_bytes) < 0.7 * num_bytes(held)
  assert step.alias_size_in_bytes < 0.2 * num_bytes(held)
