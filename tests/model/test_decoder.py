"""The decoder against a float64 reference, and the invariances that packing, padding and caching rely on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.model import decoder
from alignjax.preflight.flops import matmul_flops
from tests.model import reference


@functools.cache
def jitted(config):
  """forward(params, tokens, segment_ids, positions, cache=None), compiled once per config."""
  return jax.jit(decoder.make(config).forward)


def hidden_states(config, params, batch):
  """Hidden states [B, T, D] in float32, zero on padding: what stands there has no meaning."""
  hidden, _ = jitted(config)(params, *map(batch.get, ("tokens", "segment_ids", "positions")))
  return np.where(batch["segment_ids"][..., None] > 0, np.asarray(hidden, np.float32), 0)


def alone(batch, row, segment):
  """One segment of a batch as a batch of one row, without padding."""
  place = batch["segment_ids"][row] == segment
  tokens = batch["tokens"][row, place][None]
  return {
    "tokens": tokens,
    "segment_ids": np.ones_like(tokens),
    "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
  }


def test_hidden_states_equal_the_float64_reference(config, params, sft_batch):
  expected = reference.packed_hidden_states(config, params, sft_batch)
  np.testing.assert_allclose(hidden_states(config, params, sft_batch), expected, atol=1e-5)


def test_logits_equal_the_float64_reference_when_the_embedding_is_not_tied(config, sft_batch):
  untied = dataclasses.replace(config, tied=False)
  model = decoder.make(untied)
  params = jax.jit(model.init)(jax.random.key(3))
  expected = reference.packed_hidden_states(untied, params, sft_batch) @ np.float64(params["unembed"]).T
  logits = hidden_states(untied, params, sft_batch) @ model.unembedding(params).T
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_tied_model_has_one_table_and_an_untied_one_two(config, model, params):
  untied = decoder.make(dataclasses.replace(config, tied=False))
  assert model.unembedding(params) is params["embed"]
  assert untied.num_params() - model.num_params() == config.vocab * config.embed


def test_a_scalar_head_starts_at_zero(config):
  weight = decoder.make(dataclasses.replace(config, head="scalar")).weights()["score"]
  assert weight.shape == (config.embed, 1)
  assert not weight.init(jax.random.key(0), weight.shape).any()


def test_a_packed_row_equals_its_segments_alone(config, params, sft_batch):
  packed = hidden_states(config, params, sft_batch)
  for segment in (1, 2, 3):
    single = alone(sft_batch, 0, segment)
    expected = packed[0, sft_batch["segment_ids"][0] == segment]
    np.testing.assert_allclose(hidden_states(config, params, single)[0], expected, rtol=2e-6, atol=2e-6)


def test_padding_on_either_side_changes_nothing(config, params, sft_batch):
  single = alone(sft_batch, 0, 1)
  expected = hidden_states(config, params, single)[0]
  for before, after in ((0, 7), (7, 0)):
    padded = {name: np.pad(x, ((0, 0), (before, after))) for name, x in single.items()}
    hidden = hidden_states(config, params, padded)[0]
    np.testing.assert_allclose(hidden[before : before + len(expected)], expected, atol=2e-6)


def test_tokens_of_other_segments_change_nothing_bitwise(config, params, sft_batch):
  others = sft_batch["segment_ids"] != 2
  changed = sft_batch | {"tokens": np.where(others, 1 + sft_batch["tokens"] % 90, sft_batch["tokens"])}
  hidden, again = (hidden_states(config, params, batch) for batch in (sft_batch, changed))
  np.testing.assert_array_equal(hidden[~others], again[~others])
  assert (hidden[others] != again[others]).any()


def test_later_tokens_change_nothing_bitwise(config, params, sft_batch):
  row = alone(sft_batch, 0, 1)
  changed = row | {"tokens": row["tokens"].copy()}
  changed["tokens"][0, -1] = 1 + row["tokens"][0, -1] % 90
  hidden, again = (hidden_states(config, params, batch)[0] for batch in (row, changed))
  np.testing.assert_array_equal(hidden[:-1], again[:-1])
  assert (hidden[-1] != again[-1]).any()


@pytest.mark.parametrize("left_padding", [0, 3])
def test_prefill_and_decoding_one_by_one_equal_the_full_forward(config, model, params, left_padding):
  rng = np.random.default_rng(5)
  tokens = rng.integers(1, config.vocab, (2, 11)).astype(np.int32)
  full = {
    "tokens": tokens,
    "segment_ids": np.ones_like(tokens),
    "positions": np.tile(np.arange(11, dtype=np.int32), (2, 1)),
  }
  expected = hidden_states(config, params, full)
  # The second row is padded on the left, as a shorter prompt beside a longer one is.
  shifts = (0, left_padding)
  ids, positions = np.zeros((2, 2, 11 + left_padding), np.int32)
  padded = np.zeros_like(ids)
  for row, shift in enumerate(shifts):
    place = slice(shift, shift + 11)
    padded[row, place], ids[row, place], positions[row, place] = tokens[row], 1, np.arange(11)
  forward, cache = jitted(config), model.init_cache(2, 16)
  hidden, column = [], 0
  for width in (6, *[1] * (5 + left_padding)):
    part = slice(column, column + width)
    out, cache = forward(params, padded[:, part], ids[:, part], positions[:, part], cache)
    hidden.append(out)
    column += width
  hidden = np.concatenate(hidden, axis=1)
  for row, shift in enumerate(shifts):
    np.testing.assert_allclose(hidden[row, shift : shift + 11], expected[row], atol=1e-4)
  assert int(cache["index"]) == column


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_ring_is_written_around_its_end(count):
  ring, new = np.zeros((2, 5, 3), np.int32), np.arange(1, 1 + 6 * count).reshape(2, count, 3).astype(np.int32)
  for index in (0, 3, 9, -2):
    expected = ring.copy()
    expected[:, (index + np.arange(count)) % 5] = new
    np.testing.assert_array_equal(decoder.write_ring(ring, new, jnp.int32(index), axis=1), expected)


def test_a_prefill_is_one_program_for_all_layers(config):
  def matmuls(layers):
    model = decoder.make(dataclasses.replace(config, layers=layers))
    tokens = jnp.ones((2, 6), jnp.int32)
    forward = lambda params: model.forward(params, tokens, tokens, tokens, model.init_cache(2, 8))
    return str(jax.make_jaxpr(forward)(model.abstract())).count("dot_general")

  assert matmuls(2) == matmuls(6)


def test_parameters_with_their_layers_apart_decode_alike(config, model, params):
  tokens = np.random.default_rng(0).integers(1, config.vocab, (2, 6)).astype(np.int32)
  _, cache = model.forward(params, tokens, 0 * tokens + 1, jnp.arange(6)[None], model.init_cache(2, 8))
  run = lambda params: model.forward(params, tokens[:, :1], 0 * tokens[:, :1] + 1, jnp.full((2, 1), 6), cache)[0]
  np.testing.assert_array_equal(run(model.unstack(params)), run(params))


def test_a_loop_of_cached_forwards_reads_no_more_bits_than_it_computes_with(config, params):
  half = dataclasses.replace(config, dtype="bfloat16")
  loop = decoder.make(half).unstack(params)
  assert {loop["embed"].dtype, *(layer["q"].dtype for layer in loop["layers"])} == {jnp.dtype("bfloat16")}
  assert {layer["mlp_norm"].dtype for layer in loop["layers"]} == {jnp.dtype("float32")}


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_neither_value_nor_gradient(config, params, sft_batch, remat):
  def value_and_grad(config):
    forward = decoder.make(config).forward
    inputs = [sft_batch[name] for name in ("tokens", "segment_ids", "positions")]
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(forward(p, *inputs)[0]))))(params)

  value, grads = value_and_grad(config)
  again, again_grads = value_and_grad(dataclasses.replace(config, remat=remat))
  np.testing.assert_allclose(again, value, rtol=1e-6)
  # Recomputing fuses differently: entries that cancel carry the rounding of their large terms.
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(b).max()))
  jax.tree.map(near, grads, again_grads)


def test_remat_recomputes_the_matmuls_that_it_says(config, params, sft_batch):
  inputs = [sft_batch[name] for name in ("tokens", "segment_ids", "positions")]

  def work(remat):
    forward = decoder.make(dataclasses.replace(config, remat=remat)).forward
    return matmul_flops(jax.jit(jax.grad(lambda p: jnp.sum(forward(p, *inputs)[0]))).trace(params).jaxpr)

  rows, length = inputs[0].shape
  scores = 4 * rows * length**2 * config.layers * config.heads * config.head_dim  # of queries and keys; of values
  weights = sum(w.size for name, w in params["layers"].items() if w.ndim > 2)
  assert work("dots") - work("none") == scores
  # The last product of a layer is of no use in its backward pass.
  assert work("full") - work("dots") == 2 * rows * length * (weights - params["layers"]["down"].size)


def test_bfloat16_compute_keeps_float32_weights_and_stays_near(config, params, sft_batch):
  half = dataclasses.replace(config, dtype="bfloat16")
  hidden, _ = jitted(half)(params, *map(sft_batch.get, ("tokens", "segment_ids", "positions")))
  assert hidden.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  # 8 bits of mantissa through two layers; the hidden states are of size one.
  drift = hidden_states(half, params, sft_batch) - hidden_states(config, params, sft_batch)
  assert 1e-4 < np.abs(drift).mean() < 0.01
  assert np.abs(drift).max() < 0.1


def test_frozen_matrices_are_narrower_and_say_the_same_to_the_bit(config, params, sft_batch):
  half = dataclasses.replace(config, dtype="bfloat16")
  frozen = jax.tree.map(lambda x, to: x.astype(to.dtype), params, decoder.make(half).frozen().abstract())
  assert {frozen["embed"].dtype, frozen["layers"]["q"].dtype} == {jnp.dtype("bfloat16")}
  assert {frozen["norm"].dtype, frozen["layers"]["mlp_norm"].dtype} == {jnp.dtype("float32")}
  np.testing.assert_array_equal(hidden_states(half, frozen, sft_batch), hidden_states(half, params, sft_batch))


@pytest.mark.parametrize("dtypes", [{}, {"param_dtype": "bfloat16"}], ids=str)
def test_frozen_parameters_are_never_wider_than_they_were(config, dtypes):
  model = decoder.make(dataclasses.replace(config, **dtypes))
  assert model.frozen().abstract() == model.abstract()


def test_a_weight_does_not_depend_on_the_other_weights(config, params):
  more = decoder.make(dataclasses.replace(config, tied=False, head="scalar"))
  other = jax.jit(more.init)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, {name: other[name] for name in params})


def test_the_abstract_tree_is_the_shape_of_the_parameters(model, params, eight_devices):
  shape_of = lambda x: (x.shape, x.dtype)
  for abstract in (model.abstract(), model.abstract(eight_devices)):
    assert jax.tree.map(shape_of, abstract) == jax.tree.map(shape_of, params)
  assert model.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
