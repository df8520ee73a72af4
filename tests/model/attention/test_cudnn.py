"""cuDNN's attention as far as that goes without a GPU: our masks through JAX's own computation in its place, and the
program that a GPU would be given."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import InputError
from alignjax.model.attention import cudnn
from alignjax.model.attention.attention import attention
from alignjax.model.attention.form import Form, Segments
from alignjax.system import sharding

FORMS = {"plain": Form(8**-0.5), "scaled": Form(0.7), "window": Form(8**-0.5, window=7)}
LENGTH = 150  # no multiple of the block
ROWS = {  # (segment, tokens) of each row, in order
  "padding right": [[(1, 90), (0, 60)], [(1, 150)]],
  "padding left": [[(0, 40), (1, 110)], [(0, 149), (1, 1)]],
  "padding on both sides": [[(0, 40), (1, 70), (0, 40)], [(1, 150)]],
  "pairs": [[(1, 60), (2, 50), (0, 40)], [(0, 10), (1, 20), (0, 30), (2, 90)]],
  "packed": [[(1, 30), (2, 50), (3, 20), (4, 50)], [(2, 100), (4, 30), (0, 20)]],
  "an empty row": [[(0, 150)], [(1, 150)]],
}
HOPPER = (9, 0)


def inputs(rows, dtype=np.float32, size=8):
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(len(rows), LENGTH, heads, size)), dtype)
  ids = np.stack([np.concatenate([np.full(count, segment) for segment, count in row]) for row in rows])
  return draw(4), draw(2), draw(2), Segments(jnp.asarray(ids, jnp.int32), int(ids.max()))


@contextlib.contextmanager
def imitated(kernel=jax.nn.dot_product_attention):
  """JAX's XLA computation where cuDNN would be called, in any dtype."""

  def call(*args, implementation, **kwargs):
    assert implementation == "cudnn"
    return kernel(*args, implementation="xla", **kwargs)

  with mock.patch.object(cudnn, "limit", return_value=""), mock.patch.object(jax.nn, "dot_product_attention", call):
    yield


def both(implementation, form, q, k, v, segments):
  """The output and the gradients, of the tokens that are no padding."""
  counts = (segments.ids > 0)[..., None, None]

  def total(*qkv):
    out = jnp.where(counts, attention(implementation, form, *qkv, segments), 0)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *gradients


def near(found, expected, atol):
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(np.float32(one), np.float32(other), atol=atol)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_texts_laid_apart_give_what_the_row_gives(rows, form):
  arguments = form, *inputs(rows)
  with imitated():
    found = both("cudnn", *arguments)
  near(found, both("xla", *arguments), 2e-5)


def test_in_bfloat16_to_its_digits():
  arguments = FORMS["window"], *inputs(ROWS["pairs"], jnp.bfloat16)
  with imitated():
    found = both("cudnn", *arguments)
  assert all(x.dtype == jnp.bfloat16 for x in found)
  near(found, both("xla", *arguments), 0.05)


def spoilt(x, lengths):
  return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None, None], x, jnp.nan)


@jax.custom_vjp
def spoilt_forwards(x, lengths):
  return spoilt(x, lengths)


@jax.custom_vjp
def spoilt_backwards(x, lengths):
  return x


spoilt_forwards.defvjp(lambda x, n: (spoilt(x, n), None), lambda _, d: (d, None))
spoilt_backwards.defvjp(lambda x, n: (x, n), lambda n, d: (spoilt(d, n), None))


def test_nothing_is_read_of_what_a_kernel_leaves_behind_the_texts():
  original = jax.nn.dot_product_attention

  def kernel(*qkv, query_seq_lengths, **kwargs):
    qkv = (spoilt_backwards(x, query_seq_lengths) for x in qkv)
    out = original(*qkv, query_seq_lengths=query_seq_lengths, **kwargs)
    return spoilt_forwards(out, query_seq_lengths)

  arguments = FORMS["plain"], *inputs(ROWS["pairs"])
  with imitated(kernel):
    found = both("cudnn", *arguments)
  near(found, both("xla", *arguments), 2e-5)


def test_a_segment_beyond_the_most_is_no_number():
  q, k, v, segments = inputs(ROWS["pairs"])
  with imitated():
    out = attention("cudnn", FORMS["plain"], q, k, v, segments.replace(most=1))
  np.testing.assert_array_equal(np.isnan(out).all(axis=(2, 3)), segments.ids > 1)


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_it_equals_itself_alone(sizes):
  arguments = FORMS["window"], *inputs(ROWS["pairs"])
  with imitated():
    alone = both("cudnn", *arguments)
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=jax.devices()[: 2 * len(sizes)])):
      near(both("cudnn", *arguments), alone, 1e-5)


@contextlib.contextmanager
def gpu(capability=HOPPER):
  """As on a machine with such a GPU."""
  from jax._src.cudnn import fused_attention_stablehlo as source

  able = lambda asked: capability >= tuple(map(int, asked.split(".")))
  with (
    mock.patch.object(cudnn, "capability", return_value=capability),
    mock.patch.object(source, "check_cudnn_version", return_value=91000),
    mock.patch.object(source, "check_compute_capability", side_effect=able),
  ):
    yield


def program(implementation, form, q, k, v, segments, wrap=lambda f: f):
  """What a GPU would be given to take the gradient."""
  total = lambda q, k, v: jnp.sin(attention(implementation, form, q, k, v, segments).astype(jnp.float32)).sum()
  return jax.jit(wrap(jax.grad(total, argnums=(0, 1, 2)))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_a_gpu_is_given_the_kernel_forwards_and_backwards(sizes):
  arguments = FORMS["window"], *inputs(ROWS["pairs"], jnp.bfloat16)
  with gpu(), contextlib.ExitStack() as stack:
    if sizes:
      stack.enter_context(jax.set_mesh(sharding.make_mesh(**sizes, devices=jax.devices()[: 2 * len(sizes)])))
    text = program("cudnn", *arguments)
  assert text.count("@__cudnn$fmhaSoftmax(") == 1
  assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
  assert '"mask_type": "PADDING_CAUSAL"' in text.replace("\\22", '"')
  assert '"sliding_window_length": 7' in text.replace("\\22", '"')
  rows, heads = 2 * 2 // sizes.get("fsdp", sizes.get("data", 1)), 4 // sizes.get("tensor", 1)
  assert f"tensor<{rows}x256x{heads}x8xbf16>" in text  # a device's own rows and heads, each text in one


def test_a_gpu_is_given_the_kernel_for_several_members_of_a_sweep_at_once():
  q, k, v, segments = inputs(ROWS["pairs"], jnp.bfloat16)
  several = [jnp.stack([x, x, x]) for x in (q, k, v)]
  with gpu():
    text = program("cudnn", FORMS["plain"], *several, segments, wrap=jax.vmap)
  assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
  assert "tensor<12x256x4x8xbf16>" in text


LIMITS = {
  "compute in float32": (Form(1.0), {"dtype": jnp.float32}, 1, HOPPER),
  "head_dim=12": (Form(1.0), {"size": 12}, 1, HOPPER),
  "head_dim=136 is no multiple of 8 up to 128": (Form(1.0), {"size": 136}, 1, (8, 6)),
  "softcap": (Form(1.0, softcap=30.0), {}, 1, HOPPER),
  "not known how many": (Form(1.0), {}, 0, HOPPER),
  "a row may hold 32 texts": (Form(1.0), {}, 32, HOPPER),
  "this GPU has 7.5": (Form(1.0), {}, 1, (7, 5)),
  "no NVIDIA GPU": (Form(1.0), {}, 1, None),
}


@pytest.mark.parametrize("words", LIMITS)
def test_what_it_can_not_take_is_said_with_a_remedy_and_goes_to_xla_by_itself(words):
  form, changes, most, capability = LIMITS[words]
  q, k, v, segments = inputs(ROWS["padding left"], **{"dtype": jnp.bfloat16} | changes)
  segments = segments.replace(most=most)
  with gpu(capability), mock.patch.object(jax, "default_backend", return_value="gpu"):
    with pytest.raises(InputError, match=rf"^model.attention='cudnn': .*{words}.*; (use|give) \S+$"):
      attention("cudnn", form, q, k, v, segments)
    assert "cudnn" not in program("auto", form, q, k, v, segments)


def test_shared_prompts_go_to_xla():
  q, _, _, segments = inputs(ROWS["pairs"], jnp.bfloat16)
  shared = segments.replace(ids=jnp.stack([segments.ids, segments.ids], axis=-1))
  with gpu():
    assert "data.share_prompts" in cudnn.limit(FORMS["plain"], q, shared)


@pytest.mark.parametrize(
  ("platform", "taken"), [("tpu", "pallas_call"), ("gpu", "dot_product_attention_fwd"), ("cpu", "")]
)
def test_automatic_goes_by_the_platform_of_the_mesh(platform, taken):
  arguments = FORMS["plain"], *inputs(ROWS["pairs"], jnp.bfloat16)
  device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
  mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh.update(abstract_device=device)
  with gpu(), jax.sharding.use_abstract_mesh(mesh):
    traced = str(jax.make_jaxpr(functools.partial(attention, "auto", *arguments[:1]))(*arguments[1:]))
  assert [name for name in ("pallas_call", "dot_product_attention_fwd") if name in traced] == ([taken] if taken else [])
