"""Which files a path means, and what a message says where it means none."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignjax.data import open_source, read_texts
from alignjax.data.files import expand
from alignjax.errors import InputError
from tests.data.conftest import write

RECORDS = [{"prompt": f"q{i}", "n": i} for i in range(5)]


def save_to_disk(folder, parts):
  """A folder as `datasets.Dataset.save_to_disk` writes it."""
  folder.mkdir(parents=True)
  names = [f"data-{k:05}-of-{len(parts):05}.arrow" for k in range(len(parts))]
  for name, records in zip(names, parts, strict=True):
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
      stream.write_table(table)
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
  (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
  return folder


def test_the_home_folder_is_expanded_in_every_part(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = write(tmp_path / "a.jsonl", RECORDS)
  assert expand("~/a.jsonl") == [path]
  assert expand("~/a.jsonl, ~/*.jsonl,") == [path, path]
  assert expand(["~/a.jsonl"]) == [path]
  assert len(open_source("~/a.jsonl")) == 5


def test_a_folder_of_save_to_disk_is_read_in_its_order(tmp_path):
  source = open_source(save_to_disk(tmp_path / "saved", [RECORDS[:3], RECORDS[3:]]))
  assert list(source) == RECORDS
  assert source.where(3).endswith("data-00001-of-00002.arrow:1")


def test_a_folder_of_several_splits_names_them_and_each_is_read(tmp_path):
  for split in ("train", "test"):
    save_to_disk(tmp_path / "saved" / split, [RECORDS])
  (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
  with pytest.raises(InputError, match=r"several splits; name one: (\S+)/train, ") as caught:
    open_source(tmp_path / "saved")
  named = str(caught.value).rpartition("name one: ")[2].split(", ")
  assert [len(open_source(name)) for name in named] == [5, 5]


@pytest.mark.parametrize(
  ("files", "counts"),
  [
    (["a.jsonl"], [5]),
    (
      ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
      [5, 10],
    ),
    ([f"{letter}.jsonl" for letter in "abcdef"], [30]),
    (["a.json", "notes/a.jsonl"], [5]),
    (["config.json"], [5]),
  ],
)
def test_the_remedy_for_a_folder_is_one_that_works(tmp_path, files, counts):
  for file in files:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if file.endswith(".parquet"):
      pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / file)
    else:
      write(tmp_path / file, RECORDS)
  with pytest.raises(InputError, match="is a folder; name its files: ") as caught:
    open_source(tmp_path)
  named = str(caught.value).rpartition("name its files: ")[2].split(", ")
  assert [len(open_source(name)) for name in named] == counts


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("", r"is a folder without data \(it holds b\.csv\)"),
    ("hf://datasets/Anthropic/hh-rlhf", r"hf download --repo-type dataset Anthropic/hh-rlhf --local-dir hh-rlhf"),
    ("hf://datasets/a/b/data/train.jsonl", r"--repo-type dataset a/b --local-dir b"),
    ("https://example.org/a.jsonl", "download it"),
    ("gs://bucket/a.jsonl", "copy it to a disk"),
    ("Anthropic/hh-rlhf", "hf download --repo-type dataset Anthropic/hh-rlhf"),
    ("pears.jsonl", r"no such file; the nearest is \S*pairs\.jsonl"),
    ("*.parquet", "the pattern matches nothing"),
    ("gone.jsonl", "is a link to /nowhere, which does not exist"),
  ],
)
def test_what_is_not_there_is_named_with_what_would_work(tmp_path, monkeypatch, name, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "only").mkdir()
  (tmp_path / "only" / "b.csv").write_text("a,b")
  write(tmp_path / "pairs.jsonl", RECORDS)
  os.symlink("/nowhere", tmp_path / "gone.jsonl")
  with pytest.raises(InputError, match=message):
    open_source(name or "only")


def test_a_pipe_is_no_file_of_records(tmp_path):
  os.mkfifo(tmp_path / "a.jsonl")
  with pytest.raises(InputError, match=r"a\.jsonl: is a pipe or a device"):
    open_source(tmp_path / "a.jsonl")


def test_a_glob_may_cross_folders(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  write(tmp_path / "deep" / "er" / "a.jsonl", RECORDS)
  assert len(open_source(f"{tmp_path}/**")) == 5


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_plain_text_gives_its_lines_to_the_tokenizer(tmp_path, end):
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + f"red cat{end}{end}blue  dog".encode())
  path = write(tmp_path / "b.jsonl", [{"prompt": "q"}])
  assert list(read_texts([str(tmp_path / "a.txt"), path])) == ["red cat", "", "blue  dog", "q"]


def test_a_plain_text_that_is_none_is_named(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"caf\xe9")
  with pytest.raises(InputError, match=r"a\.txt: not UTF-8"):
    list(read_texts(tmp_path / "a.txt"))
