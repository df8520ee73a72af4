"""Tables of Arrow's as JSON lines: Parquet, and the files of `datasets.save_to_disk`.

A column of objects has all keys of all rows, and null where a row lacks one. So within a column a null key of an object
is no value and left out; a null in a list stays, and so does one of a whole column. Maps are objects, dates and times
ISO text, decimals floats. What has no JSON form, as images, is left out and named.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from alignjax.errors import InputError

_ROWS = 1024  # that are turned into Python values together

Convert = Callable[[Any], Any]


def lines(path: str, form: str, left_out: dict[str, str]) -> Iterator[bytes]:
  """The rows of a file as JSON lines.

  Args:
    path: of the file.
    form: "parquet", "arrow file" or "arrow stream".
    left_out: takes the columns that have no JSON form, and their types.

  Raises:
    InputError: the file is damaged, or a column of it cannot be read.
  """
  import pyarrow  # 30 MB that the other formats can do without

  try:
    for schema, batch in _batches(path, form):
      if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"{path}: two columns are called '{twice}'; rename one")
      columns = {field.name: _column(path, field, batch.column(i), left_out) for i, field in enumerate(schema)}
      columns = {name: column for name, column in columns.items() if column is not None}
      for k in range(batch.num_rows):
        row = {name: column[k] for name, column in columns.items()}
        yield json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
  except pyarrow.ArrowException as error:
    reason = str(error).split("\n")[0] or "unreadable"
    raise InputError(f"{path}: damaged file ({reason}); fetch or write it again") from error


def _batches(path: str, form: str) -> Iterator[tuple[Any, Any]]:
  import pyarrow
  import pyarrow.parquet

  if form == "parquet":
    with pyarrow.parquet.ParquetFile(path) as file:
      yield from ((file.schema_arrow, batch) for batch in file.iter_batches(batch_size=_ROWS))
    return
  with pyarrow.memory_map(path) as mapped:
    if form == "arrow stream":
      reader = pyarrow.ipc.open_stream(mapped)
      batches = iter(reader)
    else:
      reader = pyarrow.ipc.open_file(mapped)
      batches = map(reader.get_batch, range(reader.num_record_batches))
    for batch in batches:
      yield from ((reader.schema, batch.slice(k, _ROWS)) for k in range(0, batch.num_rows, _ROWS))


def _column(path: str, field: Any, values: Any, left_out: dict[str, str]) -> list | None:
  """The values of a column; None where it has no JSON form."""
  import pyarrow

  target, convert = _plain(field.type, field.name, left_out)
  if target is None:
    return None
  try:
    values = values if target == field.type else values.cast(target)
    plain = values.to_pylist()
  except (pyarrow.ArrowException, ValueError) as error:
    reason = str(error).split("\n")[0]
    raise InputError(f"{path}: column '{field.name}' ({field.type}) cannot be read ({reason}); drop it") from error
  return list(map(convert, plain)) if convert else plain


def _plain(kind: Any, name: str, left_out: dict[str, str]) -> tuple[Any, Convert | None]:
  """The Arrow type whose Python values are JSON's but for objects, and what makes those; (None, None) for none.

  Args:
    kind: of a column, or of what is in it.
    name: of that, with the names of what it is in.
    left_out: as in `lines`.
  """
  import pyarrow as pa

  is_ = pa.types
  if isinstance(kind, pa.BaseExtensionType):
    target, convert = _plain(kind.storage_type, name, left_out)
    return (kind, convert) if target == kind.storage_type else _nothing(kind, name, left_out)
  if is_.is_null(kind) or is_.is_boolean(kind) or is_.is_integer(kind) or is_.is_floating(kind):
    return (pa.float32() if is_.is_float16(kind) else kind), None
  if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
    return kind, None
  if is_.is_timestamp(kind) or is_.is_date(kind) or is_.is_time(kind):
    return pa.string(), None
  if is_.is_decimal(kind):
    return pa.float64(), None
  if is_.is_dictionary(kind):
    return _plain(kind.value_type, name, left_out)
  if is_.is_struct(kind):
    return _object(kind, name, left_out)
  if is_.is_map(kind):
    return _map(kind, name, left_out)
  if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
    item, convert = _plain(kind.value_type, name, left_out)
    if item is None:
      return None, None
    each = convert and (lambda values: None if values is None else [convert(value) for value in values])
    return (kind if item == kind.value_type else pa.list_(item)), each
  return _nothing(kind, name, left_out)


def _object(kind: Any, name: str, left_out: dict[str, str]) -> tuple[Any, Convert | None]:
  import pyarrow as pa

  parts, fields = {}, []
  for field in kind:
    target, convert = _plain(field.type, f"{name}.{field.name}", left_out)
    fields.append(field if target in (None, field.type) else pa.field(field.name, target))
    if target is not None:
      parts[field.name] = convert or (lambda value: value)

  def as_object(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
      return None
    return {key: convert(value[key]) for key, convert in parts.items() if value[key] is not None}

  return pa.struct(fields), as_object


def _map(kind: Any, name: str, left_out: dict[str, str]) -> tuple[Any, Convert | None]:
  import pyarrow as pa

  item, convert = _plain(kind.item_type, name, left_out)
  if item is None or not (pa.types.is_string(kind.key_type) or pa.types.is_large_string(kind.key_type)):
    return (None, None) if item is None else _nothing(kind, name, left_out)
  convert = convert or (lambda value: value)

  def as_object(pairs: list[tuple[str, Any]] | None) -> dict[str, Any] | None:
    return None if pairs is None else {key: convert(value) for key, value in pairs}

  return (kind if item == kind.item_type else pa.map_(kind.key_type, item)), as_object


def _nothing(kind: Any, name: str, left_out: dict[str, str]) -> tuple[None, None]:
  left_out[name] = str(kind)
  return None, None
