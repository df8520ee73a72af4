import errno
import functools
import gzip
import json
import os
import pickle
import threading
from pathlib import Path
from unittest import mock

import numpy as np
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
    (b"[1, 2]\n", r"a\.jsonl: item 2: a record is a JSON object"),  # an array of records is read
    (b"{}\n[1, 2]\n", r"a\.jsonl:2: a record is a JSON object"),
    (b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    (b'{}\n{"a": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:2: .*integer of thousands of digits"),
    (b'{"a": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: .*lists and objects in each other"),
    (b'{"a": ' + b'{"b":' * 200 + b"1" + b"}" * 201, r"a\.jsonl:1: .*lists and objects in each other"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"a\.jsonl:1: the key \"c\" occurs twice"),
    (b'{"a": 1, "a": 1}', r"a\.jsonl:1: the key \"a\" occurs twice"),
    (b'{"a": [{"b": "x\\ud83d"}]}', r"a\.jsonl:1: field 'a\[0\]\.b' holds half a surrogate pair at character 1"),
    (b'{"a\\udc00": 1}', r"a\.jsonl:1: .*half a surrogate pair"),
    (b"null", r"a\.jsonl:1: a record is a JSON object .*, not null"),
    (b'{\n  "prompt": "q"\n}\n{\n "prompt": "r"\n}'[:2], r"a\.jsonl:1: .*record is cut off"),
    (b'{"prompt": "q', r"a\.jsonl:1: .*record is cut off"),
    (b'{"prompt": "q"}\0\0\0', r"a\.jsonl:1: .*zero bytes, as a copy that was cut off"),
  ],
)
def test_a_malformed_record_is_named_with_its_line(tmp_path, content, message):
  (tmp_path / "a.jsonl").write_bytes(content)
  source = open_source(str(tmp_path / "a.jsonl"))
  with pytest.raises(InputError, match=message):
    source[len(source) - 1]


def test_a_record_over_several_lines_says_how_to_make_one_of_them(tmp_path):
  (tmp_path / "a.json").write_text('{\n  "prompt": "q"\n}\n{\n "prompt": "r"\n}')
  with pytest.raises(InputError, match=r"a\.json:1: .*continues in the next line: .*jq -c \. OLD > NEW\.jsonl"):
    open_source(tmp_path / "a.json")[0]


@pytest.mark.parametrize(
  "text", ['{"prompt": "\\ud83d\\ude00"}', '{"prompt": "\\\\ud83d"}', '{"a": NaN, "prompt": "q"}']
)
def test_what_only_looks_wrong_is_read(tmp_path, text):
  (tmp_path / "a.jsonl").write_text(text)
  assert open_source(tmp_path / "a.jsonl")[0]["prompt"] in ("😀", "\\ud83d", "q")


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


def test_a_file_is_known_by_its_bytes_and_not_by_size_and_date(tmp_path):
  for name in ("a.jsonl", "b.json"):
    path, text = tmp_path / name, json.dumps(RECORDS[0])
    path.write_text(text if name == "a.jsonl" else f"[{text}]")
    first, status = open_source(path), path.stat()
    path.write_text(path.read_text().replace("q0", "q9"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    again = open_source(path)
    assert again[0]["prompt"] == "q9 ä😀"
    assert again.fingerprint != first.fingerprint
    with pytest.raises(InputError, match=f"{name}.*: changed since the file was opened; start again"):
      first[0]  # it was opened in place, and is another text now


def test_a_packed_or_columnar_file_is_known_by_its_bytes(tmp_path):
  path = tmp_path / "a.parquet"
  prints = []
  for word in ("one", "two"):
    pq.write_table(pa.table({"prompt": [word]}), path, compression="none")
    os.utime(path, ns=(10**18, 10**18))
    prints.append((path.stat().st_size, open_source(path).fingerprint, open_source(path)[0]["prompt"]))
  assert prints[0][0] == prints[1][0]
  assert prints[0][1] != prints[1][1]
  assert [prompt for _, _, prompt in prints] == ["one", "two"]


def test_a_damaged_cache_is_made_anew_and_a_damaged_copy_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path / "cache"))
  with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
    file.write(b"\n".join(LINES))
  path = tmp_path / "a.jsonl.gz"
  fingerprint = open_source(path).fingerprint
  kept = next((tmp_path / "cache").glob("*/records.jsonl")).parent
  for damage in (lambda old: old[:-1], lambda old: old[:-1] + bytes([old[-1] ^ 1])):
    for part in ("spans.npy", "sums.npy", "lines.npy", "facts.json"):
      (kept / part).write_bytes(damage((kept / part).read_bytes()))
      source = open_source(path)
      assert (list(source), source.fingerprint) == (RECORDS, fingerprint)
  copy = bytearray((kept / "records.jsonl").read_bytes())
  copy[-4] ^= 1
  (kept / "records.jsonl").write_bytes(copy)
  with pytest.raises(InputError, match=r"a\.jsonl\.gz:10: changed .* its copy in the cache is damaged; delete "):
    list(open_source(path))
  (kept / "records.jsonl").write_bytes(copy[:-1])
  assert list(open_source(path)) == RECORDS


def test_a_disk_that_is_full_is_the_caches_fault(tmp_path, monkeypatch):
  (tmp_path / "a.jsonl").write_bytes(LINES[0] + b" ")
  for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("12 requested and 0 written")):
    monkeypatch.setattr(np, "save", mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=r"the data cache cannot be written .*(space|written).*set ALIGNJAX_CACHE"):
      open_source(tmp_path / "a.jsonl", cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


packed = functools.partial(gzip.compress, mtime=0)  # a header without the time: a test's name, too
GZIPPED = packed(b"\n".join(LINES))
ARRAY = b"[\n" + b",\n ".join(LINES) + b"\n]\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a", "a.data"])
@pytest.mark.parametrize(
  "content",
  [
    b"\n".join(LINES),
    b"\r\n".join(LINES) + b"\r\n",
    b"\r".join(LINES),
    b"\xef\xbb\xbf" + b"\n".join(LINES),
    b"\xef\xbb\xbf\r\n" + b"\n".join(LINES),
    ARRAY,
    b"\xef\xbb\xbf  " + ARRAY.replace(b"\n", b""),
    json.dumps(RECORDS, indent=2).encode(),
    GZIPPED,
    packed(ARRAY),
    packed(b"\r".join(LINES)),
  ],
)
def test_what_a_file_is_says_its_content_and_not_its_name(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert list(open_source(tmp_path / name)) == RECORDS


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_are_counted_as_an_editor_does_whatever_ends_them(tmp_path, end):
  (tmp_path / "a.jsonl").write_bytes(end.join([LINES[0], b"", LINES[1], b"{"]))
  source = open_source(tmp_path / "a.jsonl")
  assert (len(source), source.blanks) == (3, 1)
  with pytest.raises(InputError, match=r"a\.jsonl:4: not valid JSON .*: fetch or write the file again"):
    source[2]


def test_an_array_names_its_items(tmp_path):
  (tmp_path / "a.json").write_text('[{"a": "],[}\\""}, {"b": [1, {}]},\n{"c": }]')
  source = open_source(tmp_path / "a.json")
  assert [source[i] for i in range(2)] == [{"a": '],[}"'}, {"b": [1, {}]}]
  with pytest.raises(InputError, match=r"a\.json: item 3: not valid JSON"):
    source[2]


UTF16 = json.dumps({"prompt": "q"}).encode("utf-16-le")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "no records .the file is empty."),
    (b"[]", "no records"),
    (b"[ ]\n", "no records"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    (b"/annex/objects/SHA256E-s1--00.jsonl\n", "git-annex pointer"),
    (b"\n <!DOCTYPE html><html>", "web page"),
    (b"<?xml version='1.0'?><Error/>", "web page"),
    (b"\xff\xfe" + UTF16, "UTF-16"),
    (UTF16, "UTF-16"),
    (json.dumps({"prompt": "q"}).encode("utf-16-be"), "UTF-16"),
    (json.dumps({"prompt": "q"}).encode("utf-32"), "UTF-16 or UTF-32"),
    (b"\0" * 5000, "zero bytes alone"),
    (b"PK\x03\x04rest", "packed with zip"),
    (b"\x28\xb5\x2f\xfdrest", "packed with zstd"),
    (b"BZh91AY", "packed with bzip2"),
    (b"SQLite format 3\x00", "SQLite"),
    (packed(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    (packed(packed(LINES[0])), "packed with gzip twice"),
    (b"\x1f\x8b\x08", "damaged file"),
    (b"PAR1 and no more", "damaged file"),
    (ARRAY[:-8], "array is not closed: the file is cut off"),
    (ARRAY + b"\n{}", "has text behind its JSON array"),
    (ARRAY + ARRAY, "has text behind its JSON array"),
    (b"[{}, , {}]", "item 2 of its JSON array is empty"),
    (b"[{},\n]", "item 2 of its JSON array is empty"),
  ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_is_no_data_is_called_by_its_name(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message) as caught:
    open_source(tmp_path / name)
  assert str(tmp_path / name) in str(caught.value)
  assert "\n" not in str(caught.value)


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
