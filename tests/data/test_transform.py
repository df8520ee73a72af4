import numpy as np
import pytest

from alignjax.data.format import Example
from alignjax.data.transform import REASONS, cut, encode, fit, measure

USER = [{"role": "user", "content": "red cat"}]


def say(content):
  return [{"role": "assistant", "content": content}]


def one(prompt, completions, shared=0, **limits):
  """(reason, lengths, cut) of one record of these lengths."""
  result = fit(
    np.zeros(1, np.uint8),
    np.array([prompt], np.int32),
    np.array([completions], np.int32).reshape(1, len(completions)),
    np.array([shared], np.int32),
    **limits,
  )
  return REASONS[result.status[0]], result.lengths[0].tolist(), bool(result.cut[0])


def test_sides_are_the_prompt_and_each_completion_with_the_loss_on_the_completion(tokenizer):
  example = Example(USER, (say("blue"), say("blue dog")))
  prompt = tokenizer.render(USER, add_generation_prompt=True)
  sides = encode(example, tokenizer).sides()
  for side, text in zip(sides, ("blue", "blue dog"), strict=True):
    completion = [*tokenizer.encode(text), tokenizer.stop_id]
    assert side.ids.tolist() == prompt + completion
    assert side.mask.tolist() == [0.0] * len(prompt) + [1.0] * len(completion)


def test_measure_agrees_with_the_sides(tokenizer):
  encoded = encode(Example(USER, (say("blue"), say("blue dog"))), tokenizer)
  lengths = measure(encoded)
  assert [lengths.prompt + n for n in lengths.completions] == [len(side.ids) for side in encoded.sides()]
  assert lengths.shared == len(tokenizer.encode("blue"))


def test_a_prompt_alone_is_one_side_without_loss(tokenizer):
  (side,) = encode(Example(USER, ()), tokenizer).sides()
  assert side.ids.tolist() == tokenizer.render(USER, add_generation_prompt=True)
  assert not side.mask.any()


@pytest.mark.parametrize(
  ("prompt", "completions", "limits", "expected"),
  [
    (4, (6,), {}, ("kept", [10], False)),
    (4, (7,), {}, ("over-long example", [11], False)),
    (4, (7,), {"overlong": "cut"}, ("kept", [10], True)),
    (9, (7,), {"overlong": "cut"}, ("kept", [10], True)),
    (10, (1,), {"overlong": "cut"}, ("over-long prompt", [10], False)),
    (5, (1,), {"max_prompt_length": 4}, ("over-long prompt", [6], False)),
    (0, (3,), {}, ("empty prompt", [3], False)),
    (10, (), {}, ("kept", [10], False)),
    (11, (), {"overlong": "cut"}, ("over-long prompt", [10], False)),
    (2, (2, 4), {}, ("kept", [4, 6], False)),
    (2, (2, 5), {}, ("over-long example", [4, 7], False)),
    (2, (2, 9), {"overlong": "cut"}, ("kept", [4, 6], True)),
    (2, (9, 2), {"overlong": "cut"}, ("kept", [6, 4], True)),
    (2, (8, 9), {"overlong": "cut"}, ("kept", [5, 5], True)),
    (2, (8, 9), {"overlong": "cut", "shared": 3}, ("chosen equal to rejected after the cut", [5, 5], False)),
    (2, (8, 9), {"overlong": "cut", "shared": 2}, ("kept", [5, 5], True)),
    (2, (2, 3), {"overlong": "cut", "shared": 2}, ("kept", [4, 5], False)),
    (2, (2, 2), {"shared": 2}, ("chosen equal to rejected", [4, 4], False)),
    (5, (1, 1), {"overlong": "cut"}, ("over-long prompt", [5, 5], False)),
    (5, (1, 1), {"share_prompt": True}, ("kept", [6, 2], False)),
    (5, (2, 2), {"share_prompt": True}, ("kept", [7, 3], False)),
    (5, (3, 2), {"share_prompt": True}, ("over-long example", [8, 3], False)),
    (5, (6, 9), {"share_prompt": True, "overlong": "cut"}, ("kept", [7, 3], True)),
    (8, (1, 1), {"share_prompt": True, "overlong": "cut"}, ("over-long prompt", [8, 1], False)),
  ],
)
def test_what_fits_a_row_of_ten(prompt, completions, limits, expected):
  assert one(prompt, completions, row_length=10, **limits) == expected


@pytest.mark.parametrize("sides", [0, 1, 2])
@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_what_is_kept_fits_and_has_a_token_under_the_loss(sides, overlong):
  rng = np.random.default_rng(0)
  n, length = 500, 24
  prompt = rng.integers(1, 30, n).astype(np.int32)
  completions = rng.integers(1, 30, (n, sides)).astype(np.int32)
  shared = rng.integers(0, 30, n).astype(np.int32)
  if sides == 2:
    shared = np.minimum(shared, completions.min(1))
  result = fit(np.zeros(n, np.uint8), prompt, completions, shared, length, overlong=overlong)
  kept = result.status == 0
  assert kept.any()
  assert (result.lengths[kept].sum(1) <= length).all()
  if sides:
    assert (result.lengths[kept] > prompt[kept, None]).all()
    assert (result.lengths <= prompt[:, None] + completions).all()
  assert result.cut[kept].any() == (overlong == "cut" and sides > 0)
  assert not result.cut[~kept].any()


def test_a_cut_takes_the_end(tokenizer):
  (side,) = encode(Example(USER, (say("blue dog"),)), tokenizer).sides()
  (short,) = cut([side], np.array([len(side.ids) - 2]))
  assert short.ids.tolist() == side.ids[:-2].tolist()
  assert len(short.mask) == len(short.ids)
