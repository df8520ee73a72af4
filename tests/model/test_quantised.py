"""A base in fewer bits: near what was stored, the same for policy and reference, and never dense as a whole."""

import dataclasses
import functools
import importlib.util
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.model import ModelConfig, decoder, lora, quantised
from alignjax.model.lora import LoraConfig
from alignjax.system import sharding
from alignjax.training.optim import OptimizerConfig
from alignjax.types import Batch, Trees
from tests import batches, short_run

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
# Its tiles of 64 inputs divide over 2 x 2 x 2 devices.
CONFIG = ModelConfig(vocab=96, layers=2, embed=128, heads=4, kv_heads=2, head_dim=16, mlp=256)
needs_qwix = pytest.mark.skipif(not importlib.util.find_spec("qwix"), reason="needs qwix: pip install -e '.[quant]'")
FORMS = [pytest.param(form, marks=needs_qwix if form in quantised.CODES else ()) for form in quantised.FORMS[1:]]
BITS = {"int8": 8, "nf4": 4}


def factors(form, **values):
  return LoraConfig(rank=4, alpha=8.0, base=form, **values)


def inputs(batch):
  return [batch[name] for name in ("tokens", "segment_ids", "positions")]


@functools.cache
def held(form, config=CONFIG):
  """The adapted model, parameters whose b is not 0, and the same with the base in arrays."""
  model = lora.adapt(decoder.make(config), factors(form))
  params = jax.jit(model.init)(jax.random.key(0))
  grow = lambda pair: pair | {"b": jnp.full(pair["b"].shape, 0.05)}
  params["lora"] = lora.map_targets(grow, params["lora"])
  own, base = model.split(params)
  return model, params, own | quantised.release(base, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_the_table_describes_what_is_held(form):
  model, params, _ = held(form)
  describe = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(describe, model.abstract()) == jax.tree.map(describe, params)
  for name, weight in decoder.weights(CONFIG)["layers"].items():
    leaves = jax.tree.leaves(params["layers"][name])
    assert leaves[0].shape == weight.shape
    assert len(leaves) == 1 + (form in BITS and bool(weight.inputs))


@needs_qwix
@pytest.mark.parametrize("form", BITS)
def test_what_is_held_is_near_what_was_stored_and_only_matrices_differ(form):
  _, params, dense = held(form)
  stored = jax.jit(decoder.make(CONFIG).init)(jax.random.key(0))
  for name, weight in decoder.weights(CONFIG)["layers"].items():
    w, near = (np.asarray(tree["layers"][name]) for tree in (stored, dense))
    if not weight.inputs:
      np.testing.assert_array_equal(near, w)
      continue
    scale = np.asarray(params["layers"][name].scale)
    for axis in range(w.ndim):
      scale = np.repeat(scale, w.shape[axis] // scale.shape[axis], axis=axis)
    # Half a step of int8; half of nf4's widest gap, from 0.696 to 1.
    assert (np.abs(near - w) <= {"int8": 0.5, "nf4": 0.1520}[form] * scale * (1 + 1e-4)).all()
    assert 0.002 < np.abs(near - w).mean() / np.abs(w).mean() < {"int8": 0.012, "nf4": 0.11}[form]
  for name in ("embed", "norm"):
    np.testing.assert_array_equal(params[name], stored[name])


@needs_qwix
def test_scales_are_per_output_of_int8_and_per_tile_of_nf4():
  shape = lambda form, name: held(form)[1]["layers"][name].scale.shape
  assert shape("int8", "q") == (2, 1, 4, 16)
  assert shape("int8", "o") == (2, 1, 1, 128)
  assert shape("nf4", "q") == (2, 2, 4, 16)
  assert shape("nf4", "o") == (2, 4, 1, 128)  # a head has 16 inputs
  assert shape("nf4", "down") == (2, 4, 128)


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradient_are_those_of_the_dense_base(form, sft_batch):
  model, params, dense = held(form)

  def loss(own, rest):
    hidden, _ = model.forward(rest | own, *inputs(sft_batch))
    return jnp.square(hidden).mean() + hidden[..., 0].sum(), hidden

  f = jax.jit(jax.grad(loss, has_aux=True))
  run = lambda whole: f(*model.split(whole))
  (grads, hidden), (expected_grads, expected) = run(params), run(dense)
  np.testing.assert_allclose(hidden, expected, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), grads, expected_grads)


@needs_qwix
def test_cache_gives_what_the_full_forward_gives():
  model, params, _ = held("nf4")
  tokens = np.random.default_rng(5).integers(1, CONFIG.vocab, (2, 9)).astype(np.int32)
  ids, positions = np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
  forward = jax.jit(model.forward)
  expected, _ = forward(params, tokens, ids, positions)
  cache, hidden = model.init_cache(2, 16), []
  for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
    out, cache = forward(params, *(x[:, start:end] for x in (tokens, ids, positions)), cache)
    hidden.append(out)
  np.testing.assert_allclose(np.concatenate(hidden, axis=1), expected, atol=1e-4)


@needs_qwix
def test_members_under_vmap_are_the_members_alone(sft_batch):
  model, params, _ = held("nf4")
  own, base = model.split(params)
  loss = lambda own: jnp.square(model.forward(base | own, *inputs(sft_batch))[0]).sum()
  members = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), own)
  grads = jax.jit(jax.vmap(jax.grad(loss)))(members)
  alone = jax.jit(jax.grad(loss))(jax.tree.map(lambda x: x[1], members))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-2), grads, alone)


def train(form, batch, mesh, steps):
  run = short_run.make("preference", CONFIG, mesh, OPTIMIZER, factors=factors(form))
  with jax.set_mesh(mesh):
    state, base, batch = run.fresh(), run.held(), sharding.to_mesh(batch, mesh)
    before, losses = jax.device_get(base), []
    for _ in range(steps):
      prepared = run.prepare(Trees({"reference": base}), batch, state.key)
      state, metrics = run.step(state, prepared, run.hparams, base)
      losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)
  return losses


@pytest.mark.parametrize("form", FORMS)
def test_dpo_starts_at_log_2_and_falls(form, preference_batch, one_device):
  losses = train(form, preference_batch, one_device, steps=5)
  assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
  assert losses[-1] < losses[0] - 0.02


@needs_qwix
def test_devices_do_not_change_the_training(preference_batch, one_device):
  alone = train("nf4", preference_batch, one_device, steps=5)
  np.testing.assert_allclose(train("nf4", preference_batch, sharding.make_mesh(2, 2, 2), steps=5), alone, rtol=1e-4)


@functools.cache
def memory(form, dtype="float32"):
  """The compiler's numbers of a DPO step on a base of some size, and how many entries its matrices have."""
  large = dataclasses.replace(CONFIG, embed=256, mlp=1024, layers=8, dtype=dtype)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  run = short_run.make("preference", large, mesh, OPTIMIZER, factors=factors(form))
  batch = batches.preference(rows=1, length=32, pairs=1, vocab=96)
  with jax.set_mesh(mesh):
    state, base = jax.eval_shape(run.fresh), jax.eval_shape(run.held)
    prepared = jax.eval_shape(run.prepare, Trees({"reference": base}), Batch(batch), state.key)
    step = run.step.lower(state, prepared, run.hparams, base).compile().memory_analysis()
  return step, sum(math.prod(w.shape) for w in decoder.weights(large)["layers"].values() if w.inputs)


# In float32 nothing needs a copy of the base. Not asked of bfloat16: XLA's CPU backend makes a float32 copy of any
# bfloat16 array that a loop slices; its TPU backend makes none.
@needs_qwix
@pytest.mark.parametrize(("form", "dtype"), [("int8", "float32"), ("nf4", "float32"), ("nf4", "bfloat16")])
def test_the_base_is_never_dense_as_a_whole(form, dtype):
  (stored, matrices), (step, _) = memory(""), memory(form, dtype)
  # As a whole it would be 4 bytes an entry, or 2; one layer of eight is less than one.
  assert step.temp_size_in_bytes - stored.temp_size_in_bytes < matrices * jnp.dtype(dtype).itemsize / 2
  saved = stored.argument_size_in_bytes - step.argument_size_in_bytes
  assert saved == pytest.approx(matrices * (32 - BITS[form]) / 8, rel=0.05)


@needs_qwix
def test_scales_that_the_mesh_does_not_divide_are_named(eight_devices):
  model = lora.adapt(decoder.make(CONFIG), factors("nf4"))
  with pytest.raises(InputError, match=r"layers\.gate\.scale \(2, 2, 256\) has a dimension of 2, which mesh\.fsdp=8"):
    model.abstract(eight_devices)


@pytest.mark.parametrize(
  ("values", "said"),
  [({"base": "int3"}, r"use one of float32, bfloat16, int8, nf4"), ({"rank": 0, "base": "nf4"}, r"set lora\.rank")],
)
def test_bad_value_is_one_line(values, said):
  with pytest.raises(InputError, match=rf"lora\.base=.*{said}"):
    LoraConfig(**({"rank": 4} | values))


def test_without_qwix_the_command_to_install_it_is_given(monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(InputError, match=r"lora\.base='nf4' needs qwix, which is not installed; pip install qwix"):
    lora.adapt(decoder.make(CONFIG), factors("nf4"))
  lora.adapt(decoder.make(CONFIG), factors("bfloat16"))
