"""Labelled completions: from records of either form to rows, and the mismatched rows beside them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from alignjax.data import DataConfig, Dataset, open_source
from alignjax.data.format import parse, read
from alignjax.data.transform import unpair
from alignjax.errors import InputError
from alignjax.runs.build import open_data
from alignjax.runs.config import resolve
from tests import golden
from tests.data.conftest import make_pairs, sentence, write
from tests.data.test_loader import join, same, take


def make_labelled(n, seed=0):
  rng = np.random.default_rng(seed)
  words = lambda most: sentence(rng, rng.integers(1, most))
  return [
    {"prompt": f"{k}: {words(8)}", "completion": words(12), "label": bool(k % 3), "weight": 1 + k % 2} for k in range(n)
  ]


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
  return write(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", make_labelled(42))


@pytest.fixture(scope="session")
def config(labelled):
  return DataConfig(train=labelled, holdout=0, rows=4, row_length=96, max_examples=4)


def test_a_row_holds_labelled_examples(config, tokenizer):
  dataset = Dataset.open(config, tokenizer, "unpaired")
  batch = take(dataset, 1)[0]
  assert "margins" not in batch
  assert not any(name.startswith("kl_") for name in batch)
  for row, p in zip(*np.nonzero(batch["example_mask"]), strict=True):
    record = dataset.record(int(batch["record_ids"][row, p]))
    assert batch["labels"][row, p] == record["label"]
    assert batch["weights"][row, p] == record["weight"]
    here = (batch["segment_ids"][row] == p + 1) & (batch["loss_mask"][row] > 0)
    assert tokenizer.decode(batch["tokens"][row, here]) == record["completion"]


def test_messages_serve_as_strings_do():
  said = parse({"prompt": "q", "completion": "a", "label": False}, "unpaired")
  turns = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
  assert parse(turns | {"label": False}, "unpaired") == said
  assert said.labels == (0.0,)


def test_a_pair_gives_a_desirable_and_an_undesirable_example():
  pair = parse({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "weight": 0.5}, "unpaired")
  good, bad = unpair(pair)
  assert (good.completions, bad.completions) == (pair.completions[:1], pair.completions[1:])
  assert (good.labels, bad.labels) == ((1.0,), (0.0,))
  assert (good.prompt, good.weight, good.margin) == (bad.prompt, bad.weight, bad.margin) == (pair.prompt, 0.5, 0.0)


def test_a_file_of_pairs_feeds_unpaired_training(config, tokenizer, pairs):
  dataset = Dataset.open(replace(config, train=pairs), tokenizer, "unpaired")
  assert (dataset.report["records"], len(dataset)) == (61, 122)
  seen = []
  for batch in dataset.epoch():
    held = batch["example_mask"] > 0
    seen += zip(batch["record_ids"][held].tolist(), batch["labels"][held].tolist(), strict=True)
  assert seen == [(i, label) for label in (1.0, 0.0) for i in range(61)]


def test_completions_that_were_cut_off_are_dropped_and_counted(config, tokenizer, tmp_path):
  """`alignjax generate` writes them; trained on, each would end with the stop token where the budget ended."""
  records = [{"prompt": f"{k}: red", "completion": "the cat runs", "finished": k % 3 > 0} for k in range(9)]
  path = tmp_path / "generated.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  dataset = Dataset.open(replace(config, train=str(path)), tokenizer, "sft")
  assert (len(dataset), dataset.report["dropped"]) == (6, {"cut-off completion": 3})


def test_supervised_training_takes_desirable_completions_alone(config, tokenizer):
  dataset = Dataset.open(config, tokenizer, "sft")
  assert (len(dataset), dataset.report["dropped"]) == (28, {"undesirable completion": 14})
  assert all(dataset.record(int(i))["label"] for i in dataset.examples.records)


def test_pairs_and_labelled_records_mix(config, tokenizer, pairs, labelled):
  dataset = Dataset.open(replace(config, train=f"{pairs},{labelled}"), tokenizer, "unpaired")
  assert (dataset.report["records"], len(dataset), dataset.report["dropped"]) == (103, 164, {})


def test_no_prompt_is_on_both_sides_of_the_hold_out(config, tokenizer, pairs):
  config = replace(config, train=pairs, holdout=0.3)
  ids = [set(Dataset.open(config, tokenizer, "unpaired", split).examples.records) for split in ("train", "eval")]
  assert not ids[0] & ids[1]
  assert len(ids[0] | ids[1]) == 61


def test_what_is_lost_is_counted_for_each_side(tokenizer, tmp_path):
  records = make_pairs(8)
  records[2]["chosen"] = " "
  records[4]["rejected"] = "blue dog " * 60
  records[5]["rejected"] = records[5]["chosen"]
  config = DataConfig(train=write(tmp_path / "pairs.jsonl", [*records, *make_labelled(3)]), holdout=0, row_length=128)
  dataset = Dataset.open(config, tokenizer, "unpaired")
  assert dataset.report["dropped"] == {
    "empty completion": 1,
    "chosen equal to rejected": 2,
    "over-long example": 1,
  }
  assert len(dataset) == 16 - 4 + 3
  assert f"  dropped 1 example: over-long example (first: {tmp_path}/pairs.jsonl:5)" in dataset.report_lines()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"label": None}, "no field 'label', which unpaired data needs: an example is"),
    ({"label": "good"}, "field 'label' is 'good'; it must be true or false"),
    ({"label": 1}, "field 'label' is 1; it must be true or false"),
    ({"completion": 3}, "field 'completion' is a int"),
  ],
)
def test_a_malformed_record_is_named_with_its_field_and_place(tmp_path, change, message):
  record = {"prompt": "q", "completion": "a", "label": True} | change
  (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
  with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
    read(open_source(tmp_path / "a.jsonl"), 0, "unpaired")


# --- mismatched completions ------------------------------------------------------------------------------------------


def in_order(batch, prefix=""):
  """(prompt, completion) of each example of a batch, in the order of the stream."""
  found = []
  for row, p in zip(*np.nonzero(batch["example_mask"]), strict=True):
    here = batch[f"{prefix}segment_ids"][row] == p + 1
    tokens, mask = batch[f"{prefix}tokens"][row, here].tolist(), batch[f"{prefix}loss_mask"][row, here].tolist()
    assert batch[f"{prefix}positions"][row, here].tolist() == list(range(len(tokens)))
    start = mask.index(1.0)
    found.append((tokens[:start], tokens[start:]))
  return found


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("order", ["stream", "file"])
def test_each_prompt_has_the_completion_of_the_example_before_it_in_the_step(config, tokenizer, pack, order):
  dataset = Dataset.open(replace(config, pack=pack), tokenizer, "mismatched", seed=1)
  batches = take(dataset, 13) if order == "stream" else list(dataset.epoch())  # over the end of an epoch
  for batch in batches:
    examples = in_order(batch)
    assert len(examples) > 1
    rotated = [(prompt, examples[k - 1][1]) for k, (prompt, _) in enumerate(examples)]
    assert in_order(batch, "kl_") == rotated


@pytest.mark.parametrize("pack", [True, False])
def test_mismatched_rows_are_the_same_for_any_hosts_and_start(config, tokenizer, pack):
  dataset = Dataset.open(replace(config, pack=pack), tokenizer, "mismatched", seed=1)
  whole, passes = take(dataset, 4), list(dataset.epoch())
  for hosts in (2, 4):
    shares = [take(dataset, 2, step=2, process_index=p, process_count=hosts) for p in range(hosts)]
    assert all(same(join(got), want) for got, want in zip(zip(*shares, strict=True), whole[2:], strict=True))
    shares = [list(dataset.epoch(0, p, hosts)) for p in range(hosts)]
    assert all(same(join(got), want) for got, want in zip(zip(*shares, strict=True), passes, strict=True))


def test_mismatched_rows_are_the_same_from_workers(config, tokenizer):
  batches = [take(Dataset.open(replace(config, workers=n), tokenizer, "mismatched"), 2) for n in (0, 1)]
  assert all(map(same, *batches))


def test_the_longest_completion_beside_the_shortest_fits(tokenizer, tmp_path):
  records = [{"prompt": "a", "completion": "red " * n, "label": True} for n in (1, 30, 1, 29, 1, 1)]
  config = DataConfig(train=write(tmp_path / "a.jsonl", records), holdout=0, rows=2, row_length=48)
  for pack in (True, False):
    dataset = Dataset.open(replace(config, pack=pack), tokenizer, "mismatched")
    for batch in take(dataset, 20):
      assert (batch["kl_segment_ids"] > 0).sum() == (batch["segment_ids"] > 0).sum()
    assert dataset.layout.mismatched_length % 16 == 0


def test_one_example_has_no_other_to_be_mismatched_with(config, tokenizer):
  with pytest.raises(InputError, match=r"data\.rows is 1; it must be at least 2 where completions are mismatched"):
    Dataset.open(replace(config, rows=1), tokenizer, "mismatched")


class Words:
  """TRL's tokenizer of the golden file: word "w7" is id 7; a completion ends with 1."""

  identity = ("words", "none")
  pad_id = 0
  ids = staticmethod(lambda messages: [int(word[1:]) for message in messages for word in message["content"].split()])

  def render(self, messages, add_generation_prompt, tools):
    assert add_generation_prompt
    return self.ids(messages)

  def complete(self, prompt, messages, tools):
    ids = [*self.ids(messages), 1]
    return ids, [1] * len(ids)


def records_of(columns):
  return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_golden_rotation_of_completions(tmp_path):
  section = golden.section("kto")["kl_completion_rotation"]
  rows = int(re.search(r"batch_size=(\d+)", section["how"])[1])
  path = write(tmp_path / "kto.jsonl", records_of(section["dataset"]))
  config = DataConfig(train=path, holdout=0, rows=rows, row_length=64, pack=False)
  batches = list(Dataset.open(config, Words(), "mismatched").epoch())
  own, beside = ([x for batch in batches for x in in_order(batch, prefix)] for prefix in ("", "kl_"))
  labels = np.concatenate([batch["labels"][batch["example_mask"] > 0] for batch in batches])
  prepared = section["prepared"]
  assert own == [(example["prompt_ids"], example["completion_ids"]) for example in prepared]
  assert beside == [(example["prompt_ids"], example["KL_completion_ids"]) for example in prepared]
  assert labels.tolist() == [example["label"] for example in prepared]


def test_golden_unpairing(tokenizer, tmp_path):
  section = golden.section("data_utils")["unpair_preference_dataset"]
  config = DataConfig(train=write(tmp_path / "pairs.jsonl", records_of(section["in"])), holdout=0, rows=1)
  examples = Dataset.open(config, tokenizer, "unpaired").examples
  parts = [unpair(examples.parse(i))[part] for i, part in zip(examples.records, examples.parts, strict=True)]
  texts = [(e.prompt[0]["content"], e.completions[0][0]["content"], bool(e.labels[0])) for e in parts]
  out = section["out"]
  assert texts == list(zip(out["prompt"], out["completion"], out["label"], strict=True))


@pytest.mark.parametrize(
  ("label", "lines"),
  [
    (True, ["  9 desirable and 0 undesirable", "  no undesirable example: nothing is compared, all of these are only"]),
    (False, ["  0 desirable and 9 undesirable", "  no desirable example: nothing is compared, all of these are only"]),
  ],
)
@pytest.mark.parametrize("kind", ["unpaired", "mismatched"])
def test_data_of_one_class_is_said_to_be(label, lines, kind, tokenizer, tmp_path):
  records = [record | {"label": label} for record in make_labelled(9)]
  config = DataConfig(train=write(tmp_path / "one.jsonl", records), holdout=0, row_length=96, cache=str(tmp_path))
  said = Dataset.open(config, tokenizer, kind).report_lines()
  assert all(any(line.startswith(expected) for line in said) for expected in lines)


def test_data_of_both_classes_is_counted_alone(config, tokenizer):
  dataset = Dataset.open(config, tokenizer, "unpaired")
  assert dataset.labels == (14, 28)
  assert dataset.label_lines() == ["28 desirable and 14 undesirable"]


def test_a_class_that_weighs_nothing_alone_is_refused(tokenizer, tmp_path):
  records = [record | {"label": True} for record in make_labelled(9)]
  raw = {
    "algorithm": {"name": "unpaired", "desirable_weight": 0.0},
    "run": {"steps": 1},
    "data": {"train": write(tmp_path / "one.jsonl", records), "holdout": 0.0, "row_length": 96, "cache": str(tmp_path)},
  }
  with pytest.raises(InputError, match="nothing to learn from: 9 desirable completions of weight 0, 0 undesirable of"):
    open_data(resolve(raw), tokenizer)


def test_rankings_that_are_all_tied_are_refused(tokenizer, tmp_path):
  records = [{"prompt": f"{k}: red", "responses": ["a", "b"], "rankings": [1, 1]} for k in range(4)]
  config = DataConfig(train=write(tmp_path / "ties.jsonl", records), holdout=0, row_length=96, cache=str(tmp_path))
  with pytest.raises(InputError, match="all responses of all 4 rankings are tied, so there is no order to learn"):
    Dataset.open(config, tokenizer, "ranked")
  records[2]["rankings"] = [2, 1]
  config = replace(config, train=write(tmp_path / "some.jsonl", records))
  lines = Dataset.open(config, tokenizer, "ranked").label_lines()
  assert lines == ["3 rankings in which all responses are tied: no order is learned from them"]


def test_steps_of_one_label_are_said_to_be(tokenizer, tmp_path):
  records = [{"prompt": f"{k}: red", "completions": ["a", "b"], "labels": [True, True]} for k in range(4)]
  config = DataConfig(train=write(tmp_path / "right.jsonl", records), holdout=0, row_length=96, cache=str(tmp_path))
  assert Dataset.open(config, tokenizer, "stepwise").label_lines() == [
    "4 answers with a right step, 0 with a wrong one",
    "all steps have one label: a score that is always the same fits them",
  ]
