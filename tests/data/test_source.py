import gzip
import json
import pickle
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from alignjax.data import expansion, open_source
from alignjax.errors import InputError

RECORDS = [{"prompt": f"q{i} ä😀", "n": i} for i in range(10)]
LINES = [json.dumps(r, ensure_ascii=False).encode() for r in RECORDS]


def write_all(folder):
  """The same records in every format."""
  (folder / "a.jsonl").write_bytes(b"\n".join(LINES))  # without a newline at the end
  with gzip.open(folder / "a.jsonl.gz", "wb") as file:
    file.write(b"\n".join(LINES) + b"\n")
  pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet", row_group_size=3)
  writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
  for line in LINES:
    writer.write(line)
  writer.close()
  return [str(folder / f"a{suffix}") for suffix in (".jsonl", ".jsonl.gz", ".parquet", ".arrayrecord")]


def test_every_format_gives_the_same_records_in_any_order(tmp_path):
  for path in write_all(tmp_path):
    source = open_source(path)
    assert len(source) == 10
    assert [source[i] for i in (7, 0, 9)] == [RECORDS[i] for i in (7, 0, 9)]
    assert list(source) == RECORDS
    assert source.where(6) == f"{path}:7"


def test_files_globs_and_lists_are_joined_in_order(tmp_path):
  paths = write_all(tmp_path)
  (tmp_path / "b.jsonl").write_bytes(LINES[3])
  joined = open_source([paths[2], str(tmp_path / "*.jsonl")])
  assert [r["n"] for r in joined] == [*range(10), *range(10), 3]
  assert joined.where(20) == f"{tmp_path / 'b.jsonl'}:1"
  commas = open_source(f"{paths[2]}, {tmp_path}/*.jsonl")
  assert list(commas) == list(joined)
  assert commas.fingerprint == joined.fingerprint


def test_fingerprint_is_of_the_content_alone(tmp_path):
  paths = write_all(tmp_path)
  (tmp_path / "elsewhere.jsonl").write_bytes(b"\n".join(LINES))
  same = open_source(str(tmp_path / "elsewhere.jsonl")).fingerprint
  assert open_source(paths[0]).fingerprint == same
  (tmp_path / "elsewhere.jsonl").write_bytes(b"\n".join(LINES[::-1]))
  assert open_source(str(tmp_path / "elsewhere.jsonl")).fingerprint != same


def test_blank_lines_are_skipped_counted_and_do_not_move_the_places(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\n" + LINES[0] + b"\r\n  \n\n" + LINES[1] + b"\n" + LINES[2] + b"\n\n")
  source = open_source(path)
  assert [r["n"] for r in source] == [0, 1, 2]
  assert [source.where(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 5, 6)]
  assert source.blanks == 4


def test_a_source_survives_pickling_and_threads(tmp_path):
  for path in write_all(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(path)))
    wrong = []

    def read(source=source, wrong=wrong):
      wrong.extend(i for _ in range(20) for i in range(10) if source[i]["n"] != i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not wrong


def test_nothing_is_written_beside_the_data_and_a_changed_file_is_read_anew(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(LINES[0])
  open_source(path)
  assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
  path.write_bytes(b"\n".join(LINES))
  assert len(open_source(path)) == 10


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{} \n" * 730 + b'{"a": 1,,}\n', r"a\.jsonl:731: not valid JSON .* column 9"),
    (b"[1, 2]\n", r"a\.jsonl:1: a record is a JSON object"),
    (b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
  ],
)
def test_a_malformed_record_is_named_with_its_line(tmp_path, content, message):
  (tmp_path / "a.jsonl").write_bytes(content)
  source = open_source(str(tmp_path / "a.jsonl"))
  with pytest.raises(InputError, match=message):
    source[len(source) - 1]


def test_a_damaged_missing_empty_or_unknown_file_is_named(tmp_path):
  paths = write_all(tmp_path)
  for path in paths[1:]:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{path}: damaged"):
      open_source(path)
  (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
  (tmp_path / "a.csv").write_bytes(b"x")
  for name, message in (
    ("none.jsonl", "no such file"),
    ("empty.jsonl", "no records"),
    ("a.csv", "unknown format"),
    ("", "is a folder"),
  ):
    with pytest.raises(InputError, match=message):
      open_source(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused_and_leaves_nothing(tmp_path, kind):
  path, store = tmp_path / f"a.{kind}", tmp_path / "cache"
  if kind == "parquet":
    pq.write_table(pa.table({"prompt": ["a" * 1_000_000] * 70}), path, compression="zstd")
  else:
    with gzip.open(path, "wb") as file:
      for _ in range(70):
        file.write(b"\0" * 1_000_000)
  assert path.stat().st_size < 100_000
  with pytest.raises(InputError, match=r"unpacks to more than 67108864 bytes, 200 times its size"):
    open_source(str(path), str(store))
  assert sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) == 0
  assert not list(store.iterdir())


def test_records_that_repeat_a_long_text_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(expansion, "FREE", 1000)
  path = tmp_path / "a.jsonl.gz"
  lines = [json.dumps({"prompt": f"{i} " + "the same words again and again " * 20}) for i in range(3000)]
  with gzip.open(path, "wb") as file:
    file.write("\n".join(lines).encode())
  assert 100 < len("".join(lines)) / path.stat().st_size < 200
  assert len(open_source(str(path), str(tmp_path / "cache"))) == 3000


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(LINES[0])
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(InputError, match="set ALIGNJAX_CACHE"):
    open_source(str(tmp_path / "a.jsonl"), cache=str(tmp_path / "file" / "cache"))
