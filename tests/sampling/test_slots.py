"""Requests that share a decode loop get the completions of `generate`, whatever the others ask, whenever they come."""

import functools

import jax
import numpy as np
import pytest

from alignjax.sampling import slots
from alignjax.sampling.generate import make_generate
from alignjax.system.sharding import make_mesh, ways
from tests.sampling.test_generate import MODEL, NEW, PAD, STOP, full_logits, left_pad, weights

WIDTH = 8
ROWS, CHUNK = 8, 3
# (prompt, seed, prompt id, sample id, temperature, top_k, top_p, limit)
ASKED = [
  ([5, 6, 7], 1, 0, 0, 1.0, 0, 1.0, NEW),
  ([9], 2**32 - 1, 4, 1, 0.0, 0, 1.0, NEW),
  ([4, 8, 15, 16, 23, 10], 7, 0, 2, 0.7, 5, 1.0, 4),
  ([11, 12, 13, 14], 7, 3, 0, 1.3, 0, 0.8, NEW),
  ([9], 3, 0, 0, 1.0, 6, 0.9, 1),
  ([22, 4], 1, 0, 1, 0.9, 0, 1.0, 9),
]


@functools.cache
def programs():
  return slots.make_programs(MODEL, CHUNK, STOP, PAD)


@functools.cache
def alone(prompt, seed, prompt_id, sample_id, temperature, top_k, top_p, limit):
  """The completion that `generate` gives for one prompt by itself."""
  tokens, lengths = left_pad([list(prompt)], WIDTH)
  ids = {"prompt_ids": np.array([prompt_id]), "sample_ids": np.array([sample_id])}
  options = {"temperature": temperature, "top_k": top_k or None, "top_p": None if top_p == 1 else top_p}
  samples = make_generate(MODEL, limit)(
    weights(), tokens, lengths, key=jax.random.key(seed), stop_id=STOP, pad_id=PAD, **ids, **options
  )
  return samples.tokens[0, : samples.lengths[0]].tolist()


def prompts(asked):
  """`slots.Prompts` of some of `ASKED`, filled up with absent rows."""
  rows = -(-len(asked) // ways("batch")) * ways("batch")
  tokens, lengths = left_pad([a[0] for a in asked] + [[]] * (rows - len(asked)), WIDTH)
  absent = (((), 0, 0, 0, 1.0, 0, 1.0, 0),) * (rows - len(asked))
  columns = [np.array([a[k] for a in (*asked, *absent)]) for k in range(1, 8)]
  seeds, prompt_ids, sample_ids, temperature, top_k, top_p, limits = columns
  return slots.Prompts(
    tokens,
    lengths,
    seeds.astype(np.uint32),
    prompt_ids.astype(np.int32),
    sample_ids.astype(np.int32),
    slots.Options(
      None,
      temperature.astype(np.float32),
      top_k.astype(np.int32),
      top_p.astype(np.float32),
      limits.astype(np.int32),
      np.ones(rows, bool),
    ),
  )


def enter(state, asked, places):
  """The slots with these requests in them, and the first tokens."""
  begun, first, _ = programs().prefill(weights(), prompts(asked), top=0)
  rows = len(first.counts)
  return programs().join(state, begun, np.array([*places, *[ROWS] * (rows - len(asked))], np.int32)), first


def serve(arrivals, sizes=()):
  """Completions of `ASKED` that arrive in groups, one before each chunk; {place: tokens}, and their scores."""
  unstacked = jax.jit(MODEL.unstack)(weights())
  p = programs()
  state = p.empty(ROWS, 32)
  given, scores = {}, {}
  sizes = iter(sizes)
  for group in [*arrivals, *[()] * NEW]:
    if group:
      state, first = enter(state, [ASKED[k] for k in group], group)
      for row, k in enumerate(group):
        given[k] = first.tokens[row, : first.counts[row]].tolist()
        scores[k] = [jax.tree.map(lambda x, row=row: np.asarray(x[row, 0]), first.scores)]
    if columns := next(sizes, None):
      state = p.resize(state, np.arange(ROWS), columns=columns)
    state, drawn = p.decode(unstacked, state, np.ones(ROWS, bool), CHUNK, 1)
    for k in given:
      count = int(drawn.counts[k])
      given[k] += drawn.tokens[k, :count].tolist()
      scores[k] += [jax.tree.map(lambda x, k=k, i=i: np.asarray(x[k, i]), drawn.scores) for i in range(count)]
  return given, scores


@pytest.mark.parametrize(
  ("arrivals", "sizes"),
  [([range(6)], ()), ([(5,), (2, 0), (), (1, 4), (3,)], (64, 32, 32, 64))],
)
def test_completions_are_those_of_generate_whoever_else_is_served(arrivals, sizes):
  given, _ = serve([tuple(group) for group in arrivals], sizes)
  assert given == {k: alone(tuple(a[0]), *a[1:]) for k, a in enumerate(ASKED)}


def test_the_reported_log_probs_are_those_of_the_full_forward():
  given, scores = serve([tuple(range(6))])
  for k, (prompt, *_) in enumerate(ASKED):
    logits = full_logits(prompt, given[k])  # without the pad
    for token, row, score in zip(given[k], logits, scores[k], strict=True):
      finite = np.delete(row, PAD)
      ours = score.logps - score.top_logps[0]
      assert ours == pytest.approx(row[token] - finite.max(), abs=1e-4) or score.top_tokens[0] == PAD
      assert np.all(np.diff(score.top_logps) <= 0)


def test_a_slot_is_free_for_another_at_once():
  p = programs()
  unstacked = jax.jit(MODEL.unstack)(weights())
  state, _ = enter(p.empty(ROWS, 32), ASKED[:1], [3])
  state, drawn = p.decode(unstacked, state, np.ones(ROWS, bool), 1, 1)
  assert drawn.counts[3] == 1
  state, drawn = p.decode(unstacked, state, np.arange(ROWS) != 3, CHUNK, 1)  # its client went away
  assert not drawn.counts.any()
  state, first = enter(state, ASKED[3:4], [3])
  tokens = first.tokens[0].tolist()
  while state.running.any():
    state, drawn = p.decode(unstacked, state, np.ones(ROWS, bool), CHUNK, 1)
    tokens += drawn.tokens[3, : drawn.counts[3]].tolist()
  assert tokens == alone(tuple(ASKED[3][0]), *ASKED[3][1:])


def test_prompts_are_scored_as_by_the_full_forward():
  _, _, scores = programs().prefill(weights(), prompts(ASKED), top=3)
  for row, (prompt, *_) in enumerate(ASKED):
    if len(prompt) == 1:
      continue
    logits = full_logits(prompt[:1], prompt[1:]).astype(np.float64)
    at = slice(WIDTH - len(prompt) + 1, WIDTH)
    own = logits[np.arange(len(logits)), prompt[1:]]
    gap = np.asarray(scores.logps[row, at])[:, None] - np.asarray(scores.top_logps[row, at])
    there = np.asarray(scores.top_tokens[row, at])
    expected = own[:, None] - np.take_along_axis(logits, there, axis=1)
    np.testing.assert_allclose(gap[there != PAD], expected[there != PAD], atol=1e-4)
    # The greedy flag of lm-eval: a token's own log-prob is the best one, bit for bit, if it is the likeliest.
    is_best = there[:, 0] == prompt[1:]
    np.testing.assert_array_equal(scores.logps[row, at] == scores.top_logps[row, at][:, 0], is_best)


def test_rows_go_on_in_fewer_slots_and_in_more():
  p = programs()
  unstacked = jax.jit(MODEL.unstack)(weights())
  asked = [ASKED[1], ASKED[3]]
  state, first = enter(p.empty(ROWS, 32), asked, [2, 5])
  tokens = [first.tokens[row].tolist() for row in range(2)]
  places = [2, 5]  # of the two requests
  for taken in ([5, 2], [1, 0, *[9] * 6], [0, 1]):
    state = p.resize(state, np.array(taken), columns=32)
    places = [taken.index(place) for place in places]
    state, drawn = p.decode(unstacked, state, np.ones(len(taken), bool), CHUNK, 1)
    for row, place in enumerate(places):
      tokens[row] += drawn.tokens[place, : drawn.counts[place]].tolist()
    assert not drawn.counts[2:].any()
  for row, (prompt, *rest) in enumerate(asked):
    assert tokens[row] == alone(tuple(prompt), *rest)[: len(tokens[row])]
    assert len(tokens[row]) > CHUNK


@pytest.mark.slow
def test_sharded_slots_give_the_same_completions():
  expected = serve([tuple(range(6))])[0]
  for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    programs.cache_clear()
    with jax.set_mesh(make_mesh(**sizes)):
      assert serve([(0, 1), (2, 3, 4, 5)])[0] == expected
  programs.cache_clear()
