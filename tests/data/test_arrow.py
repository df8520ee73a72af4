"""Tables: what Arrow adds to records is taken off again, and what has no JSON form is named."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignjax.data import DataConfig, Dataset, open_source
from alignjax.data.format import read
from alignjax.errors import InputError


def rows(tmp_path, table):
  """The records of a table, read from Parquet and from both of Arrow's own files; they must be the same."""
  table = table if isinstance(table, pa.Table) else pa.Table.from_pylist(table)
  pq.write_table(table, tmp_path / "a.parquet")
  for name, new in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
    with pa.OSFile(str(tmp_path / name), "wb") as file, new(file, table.schema) as out:
      out.write_table(table)
  found = [open_source(tmp_path / name) for name in ("a.parquet", "a.arrow", "b.arrow")]
  assert list(found[0]) == list(found[1]) == list(found[2])
  return found[0]


def call(name, **arguments):
  return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def tool(name, **properties):
  return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


CALLS = [
  {
    "messages": [{"role": "user", "content": "q"}, call("weather", city="Lyon"), {"role": "tool", "content": "sun"}],
    "tools": [tool("weather", city={"type": "string"})],
  },
  {"messages": [{"role": "user", "content": "q"}, call("add", a=1, b=2)], "tools": [tool("add", a={"type": "number"})]},
]


def test_keys_that_other_rows_have_are_not_a_records_own(tmp_path):
  source = rows(tmp_path, CALLS)
  assert list(source) == CALLS
  plain = tmp_path / "a.jsonl"
  plain.write_text("".join(json.dumps(record) + "\n" for record in CALLS))
  for kind in ("sft", "prompt"):
    assert [read(source, i, kind) for i in range(2)] == [read(open_source(plain), i, kind) for i in range(2)]


def test_nulls_that_are_values_stay(tmp_path):
  record = {"prompt": None, "labels": [True, None, False], "deep": [[{"a": [None, 1]}], None]}
  assert list(rows(tmp_path, [record, {"prompt": "q", "labels": None, "deep": [[{"b": 1}]]}])) == [
    record,
    {"prompt": "q", "labels": None, "deep": [[{"b": 1}]]},
  ]


def test_maps_are_objects_and_words_of_a_dictionary_words(tmp_path):
  maps = pa.array([[("city", "Lyon")], [("a", "1"), ("b", None)], None], pa.map_(pa.string(), pa.string()))
  words = pa.array(["x", "y", "x"]).dictionary_encode()
  nested = pa.array([{"m": [("k", 1)]}, {"m": None}, None], pa.struct([("m", pa.map_(pa.string(), pa.int64()))]))
  source = rows(tmp_path, pa.table({"maps": maps, "words": words, "nested": nested}))
  assert [record["maps"] for record in source] == [{"city": "Lyon"}, {"a": "1", "b": None}, None]
  assert [record["words"] for record in source] == ["x", "y", "x"]
  assert [record["nested"] for record in source] == [{"m": {"k": 1}}, {}, None]


DAY = datetime.datetime(2024, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    (pa.array([DAY], pa.timestamp("ms")), "2024-02-03 04:05:06.000"),
    (pa.array([DAY], pa.timestamp("ns")), "2024-02-03 04:05:06.000000000"),
    (pa.array([DAY], pa.timestamp("ms", "UTC")), "2024-02-03 04:05:06.000Z"),
    (pa.array([10**15], pa.int64()).cast(pa.timestamp("s")), None),  # a year that Python has not
    (pa.array([DAY.date()]), "2024-02-03"),
    (pa.array([DAY.time()]), "04:05:06.000000"),
    (pa.array([decimal.Decimal("1.50")]), 1.5),
    (pa.array([1.5], pa.float16()), 1.5),
    (pa.array(["x"], pa.large_string()), "x"),
    (pa.array(["x"], pa.string_view()), "x"),
    (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
    (
      pa.array([{"t": DAY, "n": 1}], pa.struct([("t", pa.timestamp("ms")), ("n", pa.int64())])),
      {"t": "2024-02-03 04:05:06.000", "n": 1},
    ),
    (pa.array([[DAY]], pa.list_(pa.timestamp("ms"))), ["2024-02-03 04:05:06.000"]),
  ],
)
def test_a_column_without_a_json_type_does_not_stop_the_others(tmp_path, values, expected):
  table = pa.table({"prompt": ["q"], "extra": values})
  pq.write_table(table, tmp_path / "a.parquet")
  source = open_source(tmp_path / "a.parquet")
  assert read(source, 0, "prompt").prompt[0]["content"] == "q"
  if expected is not None:
    assert source[0]["extra"] == expected
  assert source.left_out == {}


def test_what_has_no_json_form_is_left_out_and_named(tokenizer, tmp_path):
  image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  table = pa.table(
    {
      "prompt": ["red", "blue"],
      "completion": ["cat", "dog"],
      "image": pa.array([{"bytes": b"\xff", "path": "a.png"}, None], image),
      "raw": pa.array([b"\xff", b"x"]),
      "spent": pa.array([1, 2], pa.duration("s")),
    }
  )
  pq.write_table(table, tmp_path / "a.parquet")
  dataset = Dataset.open(
    DataConfig(train=str(tmp_path / "a.parquet"), holdout=0, rows=1, row_length=64), tokenizer, "sft"
  )
  assert dataset.record(0) == {"prompt": "red", "completion": "cat", "image": {"path": "a.png"}}
  assert dataset.source.left_out == {"image.bytes": "binary", "raw": "binary", "spent": "duration[s]"}
  assert "  left out column 'raw': binary has no JSON form" in dataset.report_lines()


def test_a_column_that_is_needed_and_has_no_json_form_is_the_reason(tmp_path):
  source = rows(tmp_path, pa.table({"prompt": pa.array([b"q"]), "completion": ["a"]}))
  with pytest.raises(InputError, match=r"a\.parquet:1: field 'prompt' is missing.*column 'prompt' is left out: binary"):
    read(source, 0, "sft")


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["r"])], names=["prompt", "prompt"])
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(InputError, match=r"a\.parquet: two columns are called 'prompt'"):
    open_source(tmp_path / "a.parquet")
