"""Records of more than two completions: triples, rankings and answers in steps."""

import json
from dataclasses import replace

import numpy as np
import pytest

from alignjax.data import DataConfig, Dataset, open_source
from alignjax.data.format import parse, read
from alignjax.data.transform import Encoded, check_steps, cut, encode, fit, join_steps, measure
from alignjax.errors import InputError
from tests import golden
from tests.data.conftest import make_pairs, sentence, write
from tests.data.test_loader import take

TRIPLE = {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "c"}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"], "rankings": [2, 1, 2]}
STEPWISE = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}


def make_ranked(n, seed=0):
  rng = np.random.default_rng(seed)
  for k in range(n):
    count = int(rng.integers(2, 5))
    yield {
      "prompt": f"{k}: {sentence(rng, 3)}",
      "responses": [f"{j} {sentence(rng, rng.integers(1, 6))}" for j in range(count)],
      "rankings": [float(x) for x in rng.integers(1, 4, count)],
    }


def make_stepwise(n, seed=0):
  rng = np.random.default_rng(seed)
  for k in range(n):
    count = int(rng.integers(1, 5))
    steps = [sentence(rng, rng.integers(1, 6)) for _ in range(count)]
    labels = [[True, False, None][i] for i in rng.integers(0, 3, count - 1)] + [True]
    yield {"prompt": f"{k}: {sentence(rng, 3)}", "completions": steps, "labels": labels}


@pytest.fixture(scope="session")
def config(tmp_path_factory):
  return DataConfig(holdout=0, rows=4, row_length=128, max_examples=3)


def rows(dataset, tokenizer, steps=4):
  """(row, {segment: (ids, loss mask)}) of every row of some batches."""
  for batch in take(dataset, steps):
    for b in range(len(batch["tokens"])):
      row = {name: values[b] for name, values in batch.items()}
      assert (np.diff(row["segment_ids"][row["segment_ids"] > 0]) >= 0).all()
      here = lambda s, row=row: row["segment_ids"] == s
      yield row, {s: (row["tokens"][here(s)], row["loss_mask"][here(s)]) for s in set(row["segment_ids"]) - {0}}


def said(tokenizer, segment):
  ids, mask = segment
  return tokenizer.decode(ids[mask > 0])


@pytest.mark.parametrize("pack", [True, False])
def test_a_row_of_triples_has_the_third_completions_at_its_end(config, tokenizer, tmp_path, pack):
  records = [pair | {"reference": f"the best of {k}"} for k, pair in enumerate(make_pairs(23))]
  config = replace(config, train=write(tmp_path / "triples.jsonl", records), pack=pack)
  dataset = Dataset.open(config, tokenizer, "triple")
  assert len(dataset) == 23
  for row, segments in rows(dataset, tokenizer):
    P = len(row["example_mask"])
    for p in np.flatnonzero(row["example_mask"]):
      record = dataset.record(int(row["record_ids"][p]))
      numbers = (2 * p + 1, 2 * p + 2, 2 * P + p + 1)
      assert [said(tokenizer, segments[s]) for s in numbers] == [record[f] for f in ("chosen", "rejected", "reference")]
      assert row["margins"][p] == np.float32(record["margin"])
    assert len(segments) == 3 * row["example_mask"].sum()


@pytest.mark.parametrize("pack", [True, False])
def test_a_row_of_rankings_has_each_response_and_its_rank(config, tokenizer, tmp_path, pack):
  records = list(make_ranked(23))
  config = replace(config, train=write(tmp_path / "ranked.jsonl", records), pack=pack)
  dataset = Dataset.open(config, tokenizer, "ranked")
  K = max(len(record["responses"]) for record in records)
  assert dataset.layout.responses == K == 4
  for row, segments in rows(dataset, tokenizer):
    assert row["ranks"].shape == (len(row["example_mask"]), K)
    for p in np.flatnonzero(row["example_mask"]):
      record = dataset.record(int(row["record_ids"][p]))
      n, ranks = len(record["responses"]), row["ranks"][p]
      assert [said(tokenizer, segments[K * p + j + 1]) for j in range(n)] == record["responses"]
      assert not ranks[n:].any()
      assert ranks[:n].min() == 1
      below = lambda values: np.less.outer(values, values).tolist()
      assert below(ranks[:n]) == below(np.array(record["rankings"]))
    assert not row["ranks"][row["example_mask"] == 0].any()


def test_a_pair_is_a_ranking_of_two(config, tokenizer, pairs):
  dataset = Dataset.open(replace(config, train=pairs), tokenizer, "ranked")
  assert dataset.layout.responses == 2
  for batch in take(dataset, 2):
    np.testing.assert_array_equal(batch["ranks"], batch["example_mask"][..., None] * [1, 2])


@pytest.mark.parametrize("pack", [True, False])
def test_a_row_of_steps_has_a_label_after_each(config, tokenizer, tmp_path, pack):
  config = replace(config, train=write(tmp_path / "steps.jsonl", make_stepwise(23)), pack=pack)
  dataset = Dataset.open(config, tokenizer, "stepwise")
  for row, segments in rows(dataset, tokenizer):
    for p in np.flatnonzero(row["example_mask"]):
      record = dataset.record(int(row["record_ids"][p]))
      here = row["segment_ids"] == p + 1
      prompt = tokenizer.render([{"role": "user", "content": record["prompt"]}], add_generation_prompt=True)
      ids = row["tokens"][here].tolist()
      assert ids[: len(prompt)] == prompt
      assert tokenizer.decode(ids[len(prompt) :]) == "".join(f"{step}\n" for step in record["completions"])
      ends = np.flatnonzero(row["tokens"][here] == tokenizer.encode("\n")[-1])
      for end, label in zip(ends, record["labels"], strict=True):
        assert (row["loss_mask"][here][end], row["step_labels"][here][end]) == (label is not None, label is True)
      assert row["loss_mask"][here].sum() == sum(label is not None for label in record["labels"])
    assert len(segments) == row["example_mask"].sum()


def test_a_separator_where_there_are_no_steps_is_refused(config, tokenizer):
  with pytest.raises(InputError, match=r"data\.step_separator is ' red\.'; it must be left alone: preference data"):
    Dataset.open(replace(config, step_separator=" red."), tokenizer, "preference")


def test_another_separator_is_other_data(config, tokenizer, tmp_path):
  config = replace(config, train=write(tmp_path / "steps.jsonl", make_stepwise(5)))
  newline, star = (Dataset.open(replace(config, step_separator=s), tokenizer, "stepwise") for s in ("\n", " red."))
  assert newline.fingerprint != star.fingerprint
  end = tokenizer.encode(" red.")[-1]
  for batch in take(star, 2):
    assert (batch["tokens"][batch["loss_mask"] > 0] == end).all()


@pytest.mark.parametrize(
  ("record", "kind", "message"),
  [
    (TRIPLE | {"reference": None}, "triple", "field 'reference' is missing"),
    (TRIPLE | {"reference": 4}, "triple", "field 'reference' is a int"),
    ({"prompt": "q", "completion": "a"}, "triple", "no field 'chosen' and 'rejected', which triple data needs"),
    (RANKED | {"rankings": None}, "ranked", "field 'rankings' is missing"),
    (RANKED | {"rankings": [1, 2]}, "ranked", "field 'rankings' holds 2; it must hold one for each of the 3 responses"),
    (RANKED | {"rankings": [1, 2, "c"]}, "ranked", r"field 'rankings\[2\]' is a str; it must be a number"),
    (RANKED | {"rankings": [1, 2, None]}, "ranked", r"field 'rankings\[2\]' is null"),
    (RANKED | {"responses": ["a"]}, "ranked", "field 'responses' holds 1; a ranking is of two or more"),
    (RANKED | {"responses": "ab"}, "ranked", "field 'responses' is a str; it must be a list"),
    (RANKED | {"responses": ["a", 2, "c"]}, "ranked", r"field 'responses\[1\]' is a int"),
    (RANKED, "stepwise", "no field 'completions', which stepwise data needs"),
    (RANKED, "preference", "no field 'chosen' and 'rejected', which preference data needs"),
    (
      STEPWISE | {"labels": [True]},
      "stepwise",
      "field 'labels' holds 1; it must hold one for each of the 2 completions",
    ),
    (STEPWISE | {"labels": [True, 0]}, "stepwise", r"field 'labels\[1\]' is 0; it must be true or false"),
    (STEPWISE | {"completions": []}, "stepwise", "field 'completions' is empty"),
    (STEPWISE | {"completions": ["a", {"b": 1}]}, "stepwise", r"field 'completions\[1\]' is a dict"),
    (STEPWISE, "sft", "no field 'completion'"),
  ],
)
def test_a_malformed_record_is_named_with_its_field_and_place(tmp_path, record, kind, message):
  (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
  with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
    read(open_source(tmp_path / "a.jsonl"), 0, kind)


def test_what_is_lost_is_counted(config, tokenizer, tmp_path):
  ranked = [*make_ranked(4), RANKED | {"responses": ["a", "a", "c"]}, RANKED | {"responses": ["a", "b", "a"]}]
  ranked += [RANKED | {"responses": ["a", " ", "c"]}, RANKED | {"responses": ["house " * 200, "b", "c"]}]
  dataset = Dataset.open(replace(config, train=write(tmp_path / "r.jsonl", ranked)), tokenizer, "ranked")
  assert dataset.report["dropped"] == {"chosen equal to rejected": 1, "empty completion": 1, "over-long example": 1}
  stepwise = [*make_stepwise(4), STEPWISE | {"labels": [None, None]}, STEPWISE | {"completions": ["a", ""]}]
  stepwise += [STEPWISE | {"completions": ["a", "a"]}]
  dataset = Dataset.open(replace(config, train=write(tmp_path / "s.jsonl", stepwise)), tokenizer, "stepwise")
  assert dataset.report["dropped"] == {"no labelled step": 1, "empty completion": 1}


def test_the_longest_of_several_sides_give_way_first():
  completions = np.array([[2, 9, 9], [9, 2, 0], [1, 1, 30], [30, 30, 30]], np.int32)
  got = fit(np.zeros(4, np.uint8), np.full(4, 2, np.int32), completions, np.zeros(4, np.int32), 20, overlong="cut")
  assert got.lengths.tolist() == [[4, 8, 8], [11, 4, 0], [3, 3, 14], [6, 6, 6]]
  assert got.cut.tolist() == [True, False, True, True]
  assert not got.status.any()


@pytest.mark.parametrize(
  ("separator", "steps", "message"),
  [
    ("\n", ["red\ncat", "blue"], r"field 'completions\[0\]' holds the step separator '\\n'"),
    ("\n", ["red", "blue\n"], r"field 'completions\[1\]' holds the step separator"),
    ("\n\n", ["red", "\n\nblue"], r"field 'completions\[1\]' holds the step separator"),
    (" cat", ["red cats"], "holds the step separator ' cat'"),
  ],
)
def test_a_step_that_would_be_cut_in_use_is_refused(tokenizer, tmp_path, separator, steps, message):
  record = {"prompt": "q", "completions": steps, "labels": [True] * len(steps)}
  path = write(tmp_path / "steps.jsonl", [STEPWISE, record])
  config = DataConfig(train=path, holdout=0, rows=1, row_length=64, step_separator=separator)
  with pytest.raises(InputError, match=rf"steps\.jsonl:2: .*{message}"):
    Dataset.open(config, tokenizer, "stepwise")


@pytest.mark.parametrize("labels", [[True, False], [None, True]])
def test_steps_are_counted_in_tokens_as_in_use(labels):
  """A separator of two ids, behind a step that ends with the first of them: use finds the end one id early."""
  example = parse(STEPWISE | {"labels": labels}, "stepwise")
  encoded = lambda *steps: Encoded([1], [join_steps(steps, labels, [9, 9])[:2]])
  check_steps(example, encoded([5], [6, 9, 7]), "\n\n", ((9, 9),))
  for wrong in ([5], [6, 9]), ([5, 9, 9, 5], [6]):
    with pytest.raises(InputError, match="has 2 steps, of which a policy's answer would have"):
      check_steps(example, encoded(*wrong), "\n\n", ((9, 9),))


def test_a_cut_that_leaves_no_label_is_a_loss(tokenizer):
  example = parse(STEPWISE | {"completions": ["red cat", "blue"], "labels": [None, True]}, "stepwise")
  lengths = measure(encode(example, tokenizer, "stepwise"))
  assert lengths.shared == lengths.completions[0] - 1
  one = lambda *values: np.array(values, np.int32)
  fits = lambda T: fit(
    np.zeros(1, np.uint8), one(lengths.prompt), one(lengths.completions), one(lengths.shared), T, overlong="cut"
  )
  whole = lengths.prompt + lengths.completions[0]
  assert fits(whole).status[0] == 0
  assert fits(whole - 1).status[0] != 0


class Words:
  """TRL's tokenizer of the golden file: word "w7" is id 7."""

  ids = staticmethod(lambda text: [int(word[1:]) for word in text.split()])


def test_golden_tokens_and_labels_of_steps():
  section = golden.section("prm")["tokenize_row"]
  features = section["features"]
  prompt = Words.ids(features["prompt"])
  for case in section["cases"].values():
    wanted = dict(case["kwargs"])
    separator = Words.ids(wanted.pop("step_separator"))
    labels = [float(label) for label in features["labels"]]
    last_only = wanted.pop("train_on_last_step_only")
    if last_only and not wanted.pop("is_eval", False):  # here: null for the others in the record
      labels = [None] * (len(labels) - 1) + labels[-1:]
    ids, mask, values = join_steps([Words.ids(step) for step in features["completions"]], labels, separator)
    most, most_of_all = wanted.pop("max_completion_length"), wanted.pop("max_length")
    wanted.pop("is_eval", None)
    assert not wanted, f"no equal here of {wanted}"
    (side,) = Encoded(prompt, [(ids, mask)], (), values).sides()
    length = len(prompt) + min(len(ids), most or len(ids))
    (side,) = cut([side], np.array([min(length, most_of_all or length)]))
    assert side.ids.tolist() == case["out"]["input_ids"]
    assert np.where(side.mask > 0, side.labels, -100).tolist() == case["out"]["labels"]
