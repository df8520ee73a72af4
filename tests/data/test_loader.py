import os
from dataclasses import replace

import numpy as np
import pytest

from alignjax.data import DataConfig, Dataset, load_tokenizer
from alignjax.errors import InputError
from tests.data.conftest import make_pairs, write


@pytest.fixture(scope="session")
def config(pairs):
  return DataConfig(train=pairs, holdout=0, rows=8, row_length=96, max_examples=4)


def take(dataset, n, **start):
  batches = dataset.batches(**start)
  taken = [next(batches) for _ in range(n)]
  batches.close()
  return taken


def join(shares):
  """Hosts' batches of one step as the global batch."""
  return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
  ("pack", "workers", "hosts", "steps"),
  [
    (True, 0, (1, 2, 4), (0, 7)),
    (False, 0, (1, 2, 4), (0, 7)),
    (True, 2, (1,), (7,)),
    pytest.param(True, 2, (1, 2, 4), (0, 7), marks=pytest.mark.slow),
    pytest.param(False, 2, (1, 2, 4), (0, 7), marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_a_step_has_one_batch_for_any_hosts_workers_and_start(config, tokenizer, pack, workers, hosts, steps):
  config = replace(config, pack=pack)
  reference = take(Dataset.open(config, tokenizer, "preference", seed=3), 12)
  dataset = Dataset.open(replace(config, workers=workers), tokenizer, "preference", seed=3)
  for count in hosts:
    for step in steps:
      shares = [take(dataset, 12 - step, step=step, process_index=p, process_count=count) for p in range(count)]
      for got, expected in zip(zip(*shares, strict=True), reference[step:], strict=True):
        assert same(join(got), expected)


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_each_example_once(config, tokenizer, pack):
  dataset = Dataset.open(replace(config, pack=pack, rows=1), tokenizer, "preference")
  n = dataset.plan.rows
  rows = take(dataset, 3 * n)
  orders = [
    np.concatenate([row["record_ids"][row["example_mask"] > 0] for row in rows[epoch * n : (epoch + 1) * n]]).tolist()
    for epoch in range(3)
  ]
  assert all(sorted(order) == list(range(61)) for order in orders)
  assert orders[0] != orders[1] != orders[2]


def test_another_seed_is_another_order_of_the_same_data(config, tokenizer):
  first, second = (Dataset.open(config, tokenizer, "preference", seed=seed) for seed in (0, 1))
  assert not same(take(first, 1)[0], take(second, 1)[0])
  assert first.fingerprint == second.fingerprint


def test_a_packed_row_holds_whole_pairs_with_their_own_numbers(config, tokenizer):
  dataset = Dataset.open(config, tokenizer, "preference")
  for batch in take(dataset, 4):
    for b in range(8):
      row = {name: values[b] for name, values in batch.items()}
      for k in np.flatnonzero(row["example_mask"]):
        i = int(row["record_ids"][k])
        record = dataset.record(i)
        assert (row["margins"][k], row["weights"][k]) == (np.float32(record["margin"]), record["weight"])
        for segment, field in ((2 * k + 1, "chosen"), (2 * k + 2, "rejected")):
          here = row["segment_ids"] == segment
          prompt = tokenizer.render([{"role": "user", "content": record["prompt"]}], add_generation_prompt=True)
          completion = [*tokenizer.encode(record[field]), tokenizer.stop_id]
          assert row["tokens"][here].tolist() == prompt + completion
          assert row["loss_mask"][here].tolist() == [0.0] * len(prompt) + [1.0] * len(completion)
          assert row["positions"][here].tolist() == list(range(here.sum()))
      assert row["segment_ids"].max() == 2 * row["example_mask"].sum()
      assert not row["loss_mask"][row["segment_ids"] == 0].any()


@pytest.mark.parametrize("kind", ["preference", "sft", "prompt"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_one_pass_has_each_example_once_in_file_order(config, tokenizer, kind, hosts):
  dataset = Dataset.open(config, tokenizer, kind)
  shares = [list(dataset.epoch(process_index=p, process_count=hosts)) for p in range(hosts)]
  batches = [join(share) for share in zip(*shares, strict=True)]
  assert {len(batch["tokens"]) for batch in batches} == {8}
  ids = np.concatenate([batch["record_ids"][batch["example_mask"] > 0] for batch in batches])
  assert ids.tolist() == list(range(61))
  assert take(dataset, 1)[0].keys() == batches[0].keys()


def test_what_is_lost_is_counted_with_its_first_place(tokenizer, tmp_path):
  records = make_pairs(10)
  records[2]["chosen"] = ""
  records[5]["rejected"] = " "
  records[7]["rejected"] = records[7]["chosen"]
  records[8]["prompt"] = "red cat " * 90
  records[9]["rejected"] = "blue dog " * 60
  config = DataConfig(train=write(tmp_path / "pairs.jsonl", records), holdout=0, row_length=128)
  dataset = Dataset.open(config, tokenizer, "preference")
  assert dataset.report["records"] == 10
  assert dataset.report["examples"] == len(dataset) == 5
  assert dataset.report["dropped"] == {
    "empty completion": 2,
    "chosen equal to rejected": 1,
    "over-long prompt": 1,
    "over-long example": 1,
  }
  assert f"  dropped 2 records: empty completion (first: {tmp_path}/pairs.jsonl:3)" in dataset.report_lines()
  assert dataset.where(5) == f"{tmp_path}/pairs.jsonl:6"
  assert dataset.record(5) == records[5]

  dataset = Dataset.open(replace(config, overlong="cut"), tokenizer, "preference")
  assert (dataset.report["examples"], dataset.report["cut"]) == (6, 1)
  assert f"  cut 1 record to the row (first: {tmp_path}/pairs.jsonl:10)" in dataset.report_lines()
  row = next(b for b in dataset.epoch(rows=1) if 9 in b["record_ids"])
  assert (row["segment_ids"] > 0).all()

  dataset = Dataset.open(config, tokenizer, "sft")
  assert (dataset.report["examples"], dataset.report["dropped"]) == (8, {"empty completion": 1, "over-long prompt": 1})


def test_columns_are_the_fields_of_the_records_that_are_asked_for(tokenizer, tmp_path):
  records = [
    {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    {"prompt": "a cat", "level": 3},
    {"question": "2 + 2?", "answer": 4},
  ]
  config = DataConfig(train=write(tmp_path / "a.jsonl", records), holdout=0, rows=1, row_length=96)
  dataset = Dataset.open(config, tokenizer, "prompt")
  assert dataset.columns([2, 1, 2]) == {
    "question": ["2 + 2?", None, "2 + 2?"],
    "answer": [4, None, 4],
    "prompt": [None, "a cat", None],
    "level": [None, 3, None],
  }
  assert dataset.columns(np.array([0]))["answer"] == [records[0]["answer"]]


def test_counts_of_an_epoch_are_those_of_its_rows(config, tokenizer):
  dataset = Dataset.open(replace(config, rows=1), tokenizer, "preference")
  rows = take(dataset, dataset.report["rows"])
  tokens = sum(int((row["segment_ids"] > 0).sum()) for row in rows)
  assert dataset.report["tokens"] == tokens
  assert dataset.report["padding_share"] == pytest.approx(1 - tokens / (len(rows) * 96))


def test_shared_prompts_are_the_same_records_in_fewer_tokens(config, tokenizer):
  whole, shared = (
    Dataset.open(replace(config, pack=False, share_prompts=on), tokenizer, "preference") for on in (False, True)
  )
  np.testing.assert_array_equal(shared.examples.records, whole.examples.records)
  repeated = sum(item.sides[0].prompt - 1 for item in (whole.examples[m] for m in range(len(whole))))
  assert shared.report["tokens"] == whole.report["tokens"] - repeated
  rows = take(shared, 1)[0]
  assert rows["readers"].shape == (*rows["tokens"].shape, 1)


@pytest.mark.parametrize("kind", ["sft", "unpaired", "mismatched", "prompt"])
def test_prompts_of_one_completion_are_not_shared(config, tokenizer, kind):
  with pytest.raises(InputError, match=f"share_prompts is True; .* {kind} data"):
    Dataset.open(replace(config, share_prompts=True), tokenizer, kind)


def test_the_held_out_prompts_are_the_same_for_every_kind_and_seed_and_in_no_training(tokenizer, tmp_path):
  records = make_pairs(200)
  records = [r | {"chosen": r["chosen"] + suffix} for r in records for suffix in ("", " a")]  # each prompt twice
  config = DataConfig(train=write(tmp_path / "pairs.jsonl", records), holdout=0.25, row_length=256)
  splits = [
    {
      split: set(Dataset.open(config, tokenizer, kind, split, seed).examples.records.tolist())
      for split in ("train", "eval")
    }
    for kind, seed in (("preference", 0), ("sft", 1), ("prompt", 2))
  ]
  assert splits[0] == splits[1] == splits[2]
  prompts = {split: {records[i]["prompt"] for i in ids} for split, ids in splits[0].items()}
  assert not prompts["train"] & prompts["eval"]
  assert len(splits[0]["train"]) + len(splits[0]["eval"]) == 400
  assert 60 < len(splits[0]["eval"]) < 140


def test_a_separate_file_for_evaluation_leaves_the_training_file_whole(config, tokenizer, tmp_path):
  config = replace(config, eval=write(tmp_path / "eval.jsonl", make_pairs(7, seed=1)), holdout=0.5)
  assert len(Dataset.open(config, tokenizer, "preference")) == 61
  assert len(Dataset.open(config, tokenizer, "preference", "eval")) == 7


@pytest.mark.parametrize(
  "change",
  [
    {"row_length": 100},
    {"rows": 4},
    {"pack": False},
    {"overlong": "cut"},
    {"max_prompt_length": 50},
    {"share_prompts": True},
  ],
)
def test_the_fingerprint_covers_what_batches_depend_on(config, tokenizer, change):
  base = Dataset.open(config, tokenizer, "preference").fingerprint
  assert Dataset.open(replace(config, **change), tokenizer, "preference").fingerprint != base
  assert Dataset.open(replace(config, workers=2), tokenizer, "preference").fingerprint == base


def test_a_malformed_record_stops_the_opening_with_its_place(tokenizer, tmp_path):
  path = tmp_path / "pairs.jsonl"
  write(path, make_pairs(10))
  path.write_text(path.read_text().replace('{"prompt": "7:', '{"prompt" "7:'))
  with pytest.raises(InputError, match=r"pairs\.jsonl:8: not valid JSON"):
    Dataset.open(DataConfig(train=str(path)), tokenizer, "preference")
  write(path, [*make_pairs(10), {"prompt": "q", "chosen": "a"}])
  with pytest.raises(InputError, match=r"pairs\.jsonl:11: field 'rejected' is missing"):
    Dataset.open(DataConfig(train=str(path)), tokenizer, "preference")


def test_data_of_which_nothing_is_left_is_an_error(tokenizer, tmp_path):
  path = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 2)
  with pytest.raises(InputError, match="no example is left: dropped 2 records: chosen equal to rejected"):
    Dataset.open(DataConfig(train=path, holdout=0), tokenizer, "preference")


def test_a_split_without_records_says_what_to_set(tokenizer, tmp_path):
  few = write(tmp_path / "few.jsonl", make_pairs(3))
  config = DataConfig(train=few, rows=1, row_length=96)
  train = Dataset.open(config, tokenizer, "preference")
  assert (
    "no record is held out (data.holdout=0.1), so training refuses it: set data.holdout=0" in train.report_lines()[-1]
  )
  with pytest.raises(InputError, match=r"none of its 3 records is in the share.*set data.holdout=0 .* or data.eval"):
    Dataset.open(config, tokenizer, "preference", "eval")
  with pytest.raises(InputError, match=r"all of its 3 records are in the share.*set data.holdout=0, or data.eval"):
    Dataset.open(replace(config, holdout=0.999), tokenizer, "preference")
  assert len(Dataset.open(replace(config, holdout=0), tokenizer, "preference")) == 3
  with pytest.raises(InputError, match="no example is left: dropped 3 records: over-long prompt"):
    Dataset.open(replace(config, holdout=0, row_length=5), tokenizer, "preference")


def test_the_held_out_share_is_said(tokenizer, pairs):
  config = DataConfig(train=pairs, holdout=0.3, rows=1, row_length=96)
  train, held_out = (Dataset.open(config, tokenizer, "preference", split) for split in ("train", "eval"))
  count = held_out.report["records"]
  assert 0 < count < 61
  line = f"  held out for evaluation: {count} of 61 records (data.holdout=0.3, by a hash of the prompt)"
  assert train.report_lines()[-1] == line
  for quiet in (held_out, Dataset.open(replace(config, holdout=0), tokenizer, "preference")):
    assert not any("held out" in line for line in quiet.report_lines())


def test_the_same_size_and_date_with_other_records_is_another_fingerprint(tokenizer, tmp_path):
  path = tmp_path / "pairs.jsonl"
  config = DataConfig(train=str(path), holdout=0, rows=1, row_length=96)
  prints, tokens = [], []
  for word in ("red", "cat"):
    write(path, [{"prompt": "two", "chosen": f"{word} river", "rejected": "no"}])
    os.utime(path, ns=(10**18, 10**18))
    dataset = Dataset.open(config, tokenizer, "preference")
    prints.append(dataset.fingerprint)
    tokens.append(tokenizer.decode(dataset.examples[0].sides[0].ids))
  assert prints[0] != prints[1]
  assert ["red" in tokens[0], "cat" in tokens[1]] == [True, True]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": 0}, "data.rows=0: must be at least 1"),
    ({"holdout": 1.0}, "data.holdout=1.0: must be at least 0 and less than 1"),
    ({"overlong": "trim"}, "data.overlong is 'trim'"),
    ({"format": "csv"}, "data.format is 'csv'"),
    ({"train": ""}, "data.train is ''"),
  ],
)
def test_a_wrong_setting_is_named(config, tokenizer, change, message):
  with pytest.raises(InputError, match=message):
    Dataset.open(replace(config, **change), tokenizer, "preference")


def test_rows_must_divide_over_hosts(config, tokenizer):
  dataset = Dataset.open(config, tokenizer, "preference")
  with pytest.raises(InputError, match="8 rows do not divide over 3 hosts"):
    dataset.batches(process_count=3)
  with pytest.raises(InputError, match="process_index 2"):
    dataset.epoch(process_index=2, process_count=2)


def test_two_thousand_human_pairs(real_data):
  config = DataConfig(train=f"{real_data}/hh-rlhf/harmless.jsonl.gz", holdout=0.1, rows=4)
  mistral = load_tokenizer(f"{real_data}/tokenizers/mistral-v3.model")
  train, held_out = (Dataset.open(config, mistral, "preference", split) for split in ("train", "eval"))
  assert train.report["records"] + held_out.report["records"] == 2000
  assert 150 < held_out.report["records"] < 250
  dropped = train.report["dropped"], held_out.report["dropped"]
  assert sum(d.get("empty completion", 0) for d in dropped) == 4
  assert len(train) > 0.95 * train.report["records"]
  assert train.report["padding_share"] < 0.02
  batch = take(train, 1)[0]
  last = train.record(int(batch["record_ids"][0, 0]))["chosen"].rsplit("\n\nAssistant:")[-1]
  here = (batch["segment_ids"][0] == 1) & (batch["loss_mask"][0] > 0)
  assert mistral.decode(batch["tokens"][0][here]).split() == last.split()
  assert batch["tokens"][0][here][-1] == mistral.stop_id
