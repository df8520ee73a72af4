"""Laws of the sampler: what it returns is what the full forward says, whatever the batch around it."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from alignjax.errors import InputError
from alignjax.losses import logps
from alignjax.losses.support import Support
from alignjax.model import ModelConfig, decoder
from alignjax.sampling.generate import bucket, generate, make_generate, sample_text, sampling_logps
from alignjax.sampling.stream import stream
from alignjax.system.sharding import make_mesh

VOCAB, PAD, STOP = 24, 0, 3
NEW = 12
CONFIG = ModelConfig(vocab=VOCAB, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48)
MODEL = decoder.make(CONFIG)
PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23, 10], [11, 12, 13, 14]]


@functools.cache
def weights():
  # Larger embeddings than at initialisation: logits that differ enough for their order to matter.
  params = jax.jit(MODEL.init)(jax.random.key(0))
  return params | {"embed": 8 * params["embed"]}


def left_pad(prompts, width):
  tokens = np.full((len(prompts), width), PAD, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, width - len(prompt) :] = prompt
  return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def run(prompts=PROMPTS, *, width=8, prompt_ids=None, sample_ids=None, new=NEW, **options):
  tokens, lengths = left_pad(prompts, width)
  rows = np.arange(len(prompts), dtype=np.int32)
  options = {"key": jax.random.key(1), "stop_id": STOP, "pad_id": PAD} | options
  samples = make_generate(MODEL, new)(
    weights(),
    tokens,
    lengths,
    prompt_ids=rows if prompt_ids is None else np.asarray(prompt_ids, np.int32),
    sample_ids=np.zeros_like(rows) if sample_ids is None else np.asarray(sample_ids, np.int32),
    **options,
  )
  return jax.device_get(samples)


@jax.jit
def forward(tokens, segment_ids):
  return MODEL.forward(weights(), tokens, segment_ids, jnp.arange(tokens.shape[1])[None])[0]


def full_hidden(prompt, completion, width=24):
  """Tokens [1, T] and hidden states [1, T, D] of one right-padded forward without a cache."""
  text = [*prompt, *completion]
  tokens, segment_ids = np.zeros((2, 1, width), np.int32)
  tokens[0, : len(text)], segment_ids[0, : len(text)] = text, 1
  return tokens, forward(tokens, segment_ids)


def full_logits(prompt, completion):
  """Logits [n, V] at the completion's tokens, PAD excluded."""
  hidden = np.asarray(full_hidden(prompt, completion)[1])[0]
  logits = hidden @ np.asarray(MODEL.unembedding(weights())).T
  logits[:, PAD] = -np.inf
  return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]


def completions(samples):
  return [samples.tokens[row, :length].tolist() for row, length in enumerate(samples.lengths)]


def test_cached_decode_equals_the_full_forward():
  tokens, lengths = left_pad(PROMPTS, 8)
  columns = np.arange(8) - (8 - lengths[:, None])
  segment_ids, positions = (columns >= 0).astype(np.int32), np.maximum(columns, 0)
  decode = jax.jit(functools.partial(MODEL.forward, weights()))
  cache = MODEL.init_cache(len(PROMPTS), 8 + NEW)
  hidden, cache = decode(tokens, segment_ids, positions, cache)
  follow = np.random.default_rng(0).integers(4, VOCAB, (len(PROMPTS), NEW)).astype(np.int32)
  decoded = [hidden[:, -1]]
  one = np.ones((len(PROMPTS), 1), np.int32)
  for step in range(NEW - 1):
    hidden, cache = decode(follow[:, step : step + 1], one, lengths[:, None] + step, cache)
    decoded.append(hidden[:, 0])
  cached = np.stack(decoded, axis=1) @ np.asarray(MODEL.unembedding(weights())).T
  cached[..., PAD] = -np.inf
  for row, prompt in enumerate(PROMPTS):
    np.testing.assert_allclose(cached[row], full_logits(prompt, follow[row]), atol=1e-4)


@pytest.mark.parametrize(
  "support",
  [Support(), Support(excluded=PAD), Support(PAD, top_k=5, top_p=0.9), Support(top_p=0.6)],
  ids=str,
)
def test_logps_equal_rescoring_with_the_chunked_losses(support):
  samples = run(pad_id=support.excluded, temperature=0.7, top_k=support.top_k, top_p=support.top_p)
  rescore = jax.jit(functools.partial(logps.next_token_logps, chunk=5))
  for row, completion in enumerate(completions(samples)):
    tokens, hidden = full_hidden(PROMPTS[row], completion)
    rescored = rescore(hidden, MODEL.unembedding(weights()), tokens, temperature=0.7, support=support)
    start = len(PROMPTS[row])
    np.testing.assert_allclose(
      samples.logps[row, : len(completion)],
      rescored[0, start : start + len(completion)],
      atol=1e-5,
    )


@pytest.mark.parametrize(
  "options",
  [
    {"top_k": 3},
    {"top_p": 0.6},
    {"temperature": 1.7, "top_k": 8, "top_p": 0.8},
    {"temperature": 0.0, "top_k": 5},
  ],
)
def test_logps_are_of_the_truncated_distribution(options):
  samples = run(**options)
  for row, completion in enumerate(completions(samples)):
    logits = full_logits(PROMPTS[row], completion)
    rescored = sampling_logps(logits, **options)
    picked = np.take_along_axis(np.asarray(rescored), np.array(completion)[:, None], 1)[:, 0]
    np.testing.assert_allclose(samples.logps[row, : len(completion)], picked, atol=1e-4)


def test_a_completion_is_the_same_alone_in_a_batch_and_under_other_padding():
  rng = np.random.default_rng(0)
  crowd = [rng.integers(4, VOCAB, rng.integers(1, 9)).tolist() for _ in range(60)]
  places = [3, 17, 42, 63]
  prompts, ids = list(crowd), list(range(100, 160))
  for place, prompt, prompt_id in zip(places, PROMPTS, range(4), strict=True):
    prompts.insert(place, prompt)
    ids.insert(place, prompt_id)
  together = completions(run(prompts, prompt_ids=ids, width=10))
  for place, prompt, prompt_id in zip(places, PROMPTS, range(4), strict=True):
    alone = completions(run([prompt], prompt_ids=[prompt_id], width=9))
    assert together[place] == alone[0]


def test_every_prompt_and_sample_has_its_own_noise():
  prompts = [PROMPTS[0]] * 4
  found = completions(run(prompts, prompt_ids=[0, 0, 1, 1], sample_ids=[0, 1, 0, 1]))
  assert len({tuple(completion) for completion in found}) == 4
  again = completions(run(prompts, prompt_ids=[1, 1, 0, 0], sample_ids=[1, 0, 1, 0]))
  assert again == found[::-1]
  other = completions(run(prompts, key=jax.random.key(2)))
  assert other[0] != found[0]


def test_temperature_zero_is_greedy_with_the_untempered_logps():
  samples = run(temperature=0.0)
  for row, completion in enumerate(completions(samples)):
    logits = full_logits(PROMPTS[row], completion)
    assert completion == np.argmax(logits, axis=-1).tolist()
    expected = jax.nn.log_softmax(logits).max(axis=-1)
    np.testing.assert_allclose(samples.logps[row, : len(completion)], expected, atol=1e-4)


def test_a_completion_ends_at_its_stop_token():
  greedy = completions(run(temperature=0.0, stop_id=-1))
  stop = greedy[0][4]  # a token that row 0 is known to reach
  samples = run(temperature=0.0, stop_id=stop)
  for row, completion in enumerate(completions(samples)):
    whole = greedy[row]
    assert samples.finished[row] == (stop in whole)
    assert completion == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    length = len(completion)
    np.testing.assert_array_equal(samples.mask[row], np.arange(NEW) < length)
    assert (samples.tokens[row, length:] == PAD).all()
    assert (samples.logps[row, length:] == 0).all()
    assert (samples.logps[row, :length] <= 0).all()


def test_the_loop_ends_when_all_rows_have_stopped():
  tokens, lengths = left_pad(PROMPTS, 8)
  forwards = []

  def counted(*args):
    jax.debug.callback(lambda: forwards.append(1))
    return MODEL.forward(*args)

  ids = np.arange(4, dtype=np.int32)
  samples = jax.jit(
    lambda: generate(
      MODEL._replace(forward=counted), weights(), tokens, lengths, key=jax.random.key(1),
      prompt_ids=ids, sample_ids=ids, max_new_tokens=1000, stop_id=STOP, pad_id=PAD,
    )
  )()  # fmt: skip
  jax.effects_barrier()
  assert samples.finished.all()
  assert len(forwards) == samples.lengths.max()


def test_a_decode_step_copies_neither_the_cache_nor_the_weights():
  rows, columns = 3, 8 + NEW
  like = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
  ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
  options = {"prompt_ids": ints, "sample_ids": ints, "key": like(jax.random.key(0)), "stop_id": STOP, "pad_id": PAD}
  prompts = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
  lowered = make_generate(MODEL, NEW).lower(jax.tree.map(like, weights()), prompts, ints, **options)
  program = lowered.compile().as_text().splitlines()
  keys, values, gate = f"f32[{rows},2,8,{columns}]", f"f32[{rows},2,{columns},8]", "f32[32,48]"
  assert any("dynamic-update-slice(" in line and keys in line for line in program)
  for line in program:
    assert not (
      re.search(r" (copy|transpose)\(", line) and re.search(rf"= {re.escape(keys)}|= {re.escape(values)}", line)
    )
    assert not (re.search(r" (copy|slice)\(", line) and f"= {gate}" in line and "while/body" in line)


def test_the_pad_is_never_sampled():
  params = weights() | {"embed": weights()["embed"].at[PAD].multiply(50.0)}
  tokens, lengths = left_pad(PROMPTS, 8)
  ids = np.arange(4, dtype=np.int32)
  options = {"prompt_ids": ids, "sample_ids": ids, "stop_id": -1, "key": jax.random.key(0)}
  sampled = make_generate(MODEL, NEW)(params, tokens, lengths, pad_id=PAD, **options)
  assert (sampled.tokens != PAD).all()
  free = make_generate(MODEL, NEW)(params, tokens, lengths, pad_id=None, **options)
  assert (free.tokens == PAD).any()


def test_a_row_without_a_prompt_yields_nothing():
  samples = run([PROMPTS[0], [], PROMPTS[1], []])
  assert samples.lengths[1] == 0
  assert not samples.finished[1]
  assert not samples.mask[1].any()
  assert completions(samples)[0] == completions(run())[0]


def test_frequencies_are_those_of_the_distribution():
  n = 4000
  options = {"temperature": 1.3, "top_k": 12, "top_p": 0.9}
  samples = run([PROMPTS[2]] * n, prompt_ids=[7] * n, sample_ids=range(n), new=1, **options)
  logits = full_logits(PROMPTS[2], [STOP])[0]
  expected = np.exp(np.asarray(sampling_logps(logits, **options), np.float64))
  observed = np.bincount(samples.tokens[:, 0], minlength=VOCAB)
  support = expected > 0
  assert 3 <= support.sum() <= 12
  assert observed[~support].sum() == 0
  expected = expected[support] / expected[support].sum() * n
  assert stats.chisquare(observed[support], expected).pvalue > 1e-3


@pytest.mark.parametrize(
  ("options", "support"),
  [
    ({}, {0, 1, 2, 3, 4}),
    ({"top_k": 2}, {0, 1}),
    ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3, 4}),
    ({"top_k": 100}, {0, 1, 2, 3, 4}),
    ({"top_p": 0.5}, {0}),
    ({"top_p": 0.51}, {0, 1}),
    ({"top_p": 1e-6}, {0}),
    ({"top_k": 3}, {0, 1, 2, 3}),  # tokens 2 and 3 tie: both stay
    ({"top_k": 2, "top_p": 0.6}, {0}),  # of what top-k left, token 0 holds 5/8
  ],
)
def test_truncation_keeps_the_best_tokens(options, support):
  logits = jnp.log(jnp.array([0.5, 0.3, 0.08, 0.08, 0.04]))
  probabilities = np.exp(sampling_logps(logits, **options))
  assert set(np.flatnonzero(probabilities).tolist()) == support
  kept = [0.5, 0.3, 0.08, 0.08, 0.04]
  total = sum(kept[token] for token in support)
  for token in support:
    assert probabilities[token] == pytest.approx(kept[token] / total, rel=1e-5)


def test_sampling_options_are_traced():
  compiled = make_generate(MODEL, NEW)
  assert make_generate(MODEL, NEW) is compiled
  run(temperature=0.5, top_k=3)
  size = compiled._cache_size()
  run(temperature=0.9, top_k=7, stop_id=5, key=jax.random.key(9))
  assert compiled._cache_size() == size


@pytest.mark.parametrize("third", ["data", "sequence"])
def test_sharded_rows_give_the_same_samples(third):
  expected = run(PROMPTS * 2)
  with jax.set_mesh(make_mesh(fsdp=2, tensor=2, **{third: 2})):
    sharded = run(PROMPTS * 2)
  np.testing.assert_array_equal(sharded.tokens, expected.tokens)
  np.testing.assert_allclose(sharded.logps, expected.logps, atol=1e-4)


TOKENIZER = SimpleNamespace(pad_id=PAD, stop_id=STOP, decode=lambda ids: " ".join(str(i) for i in ids if i != STOP))


def test_sample_text_keeps_the_order_and_does_not_depend_on_the_batch_size():
  prompts = [*PROMPTS, [4 + i % 20 for i in range(40)], [20, 21]]  # two buckets
  sample = functools.partial(sample_text, MODEL, weights(), TOKENIZER, key=jax.random.key(1), max_new_tokens=NEW)
  found = sample(prompts)
  expected = completions(run())
  assert [completion.tokens for completion in found[:4]] == expected
  in_threes = sample(prompts, batch_size=3)
  assert [completion.tokens for completion in in_threes] == [c.tokens for c in found]
  backwards = sample(prompts[::-1], prompt_ids=range(5, -1, -1))
  assert [completion.tokens for completion in backwards[::-1]] == [c.tokens for c in found]
  for completion in found:
    assert completion.text == TOKENIZER.decode(completion.tokens)
    assert completion.logps.shape == (len(completion.tokens),)
    assert completion.finished == (completion.tokens[-1] == STOP)


def test_a_stop_that_is_also_the_pad_ends_completions():
  params = weights()
  params = params | {"embed": params["embed"].at[STOP].set(10 * params["norm"])}  # often by far the likeliest
  tokenizer = SimpleNamespace(stop_id=STOP, pad_id=STOP, decode=str)
  found = sample_text(MODEL, params, tokenizer, PROMPTS, key=jax.random.key(1), max_new_tokens=NEW)
  assert [completion.finished for completion in found] == [STOP in completion.tokens for completion in found]
  assert any(completion.finished for completion in found)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([[5], []], {}, "prompt 1 .* no tokens"),
    ([[5]], {"temperature": -1.0}, "temperature=-1.0"),
    ([[5]], {"top_p": 0.0}, "top_p=0.0"),
    ([[5]], {"top_k": -2}, "top_k=-2"),
    ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
  ],
)
def test_bad_requests_are_named(prompts, options, message):
  options = {"key": jax.random.key(0), "max_new_tokens": 4} | options
  with pytest.raises(InputError, match=message):
    sample_text(MODEL, weights(), TOKENIZER, prompts, **options)


def test_no_prompts_give_no_completions():
  assert sample_text(MODEL, weights(), TOKENIZER, [], key=jax.random.key(0), max_new_tokens=4) == []


def test_buckets_cover_and_waste_little():
  widths = [bucket(length) for length in range(1, 2000)]
  assert all(width >= length for length, width in enumerate(widths, 1))
  assert all(width <= 1.5 * length for length, width in enumerate(widths, 1) if length > 32)
  assert len(set(widths)) < 20


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_compiled(monkeypatch):
  tokenizer = SimpleNamespace(stop_id=STOP, pad_id=PAD, decode=str)
  ask = lambda model, length: sample_text(
    model, weights(), tokenizer, [[5], [6] * length], key=jax.random.key(0), max_new_tokens=1
  )
  short = decoder.make(dataclasses.replace(CONFIG, max_positions=6))
  assert len(ask(short, 6)) == 2
  with pytest.raises(InputError, match=r"prompt 1 \(from 0\) has 7 tokens, more than the 6 positions of the model"):
    ask(short, 7)
  with pytest.raises(InputError, match=r"prompt 1 \(from 0\) has 3000000 tokens; attention in a batch of .* takes"):
    ask(MODEL, 3_000_000)
  monkeypatch.setattr("alignjax.sampling.generate.device_bytes", lambda: 10_000)
  with pytest.raises(InputError, match="the dialogue has 9 tokens"):
    next(stream(MODEL, weights(), [5] * 9, key=jax.random.key(0), prompt_id=0, max_new_tokens=1))
