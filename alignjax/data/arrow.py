"""Arrow tables as JSON lines: Parquet, and the files of `datasets.save_to_disk`.

A column of objects has all keys of all rows, and null for a key that a row lacks. So a null key of an object
is left out; a null in a list stays, and so does the null of a whole column. Maps become objects, dates and times
ISO text, decimals floats. Columns without a JSON form, such as images, are left out and named.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from alignjax.errors import InputError

_ROWS = 1024  # converted into Python values together

Convert = Callable[[Any], Any]


class Target(NamedTuple):
  """How a column is converted: cast to an Arrow type, then to Python, then by a function.

  Attributes:
    kind: the Arrow type whose Python values are those of JSON, except objects.
    convert: makes JSON values of these; None if they are JSON values.
  """

  kind: Any
  convert: Convert | None = None


def lines(path: str, form: str, left_out: dict[str, str]) -> Iterator[bytes]:
  """Iterates the rows of a file as JSON lines.

  Args:
    path: of the file.
    form: "parquet", "arrow file" or "arrow stream".
    left_out: receives the types of the columns that have no JSON form, by name.

  Raises:
    InputError: the file is damaged, or a column of it cannot be read.
  """
  import pyarrow  # 30 MB that the other formats do not need

  try:
    for schema, batch in _batches(path, form):
      if len(set(schema.names)) < len(schema.names):
        duplicate = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"{path}: two columns are called '{duplicate}'; rename one")
      columns = {}
      for i, field in enumerate(schema):
        values = _column(path, field, batch.column(i), left_out)
        if values is not None:
          columns[field.name] = values
      for k in range(batch.num_rows):
        row = {name: column[k] for name, column in columns.items()}
        yield json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
  except pyarrow.ArrowException as error:
    reason = str(error).split("\n")[0] or "unreadable"
    raise InputError(f"{path}: damaged file ({reason}); fetch or write it again") from error


def _batches(path: str, form: str) -> Iterator[tuple[Any, Any]]:
  """Iterates (schema, batch of at most _ROWS rows) of a file."""
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
  """Returns the values of a column as JSON has them; None if the column has no JSON form."""
  import pyarrow

  target = _target(field.type, field.name, left_out)
  if target is None:
    return None
  try:
    if target.kind != field.type:
      values = values.cast(target.kind)
    plain = values.to_pylist()
  except (pyarrow.ArrowException, ValueError) as error:
    reason = str(error).split("\n")[0]
    raise InputError(f"{path}: column '{field.name}' ({field.type}) cannot be read ({reason}); drop it") from error
  if target.convert:
    return list(map(target.convert, plain))
  return plain


def _target(kind: Any, name: str, left_out: dict[str, str]) -> Target | None:
  """Returns how values of an Arrow type are converted; None if they have no JSON form.

  Args:
    kind: the Arrow type of a column or of a part of its values.
    name: the path of the column or part, such as "meta.score".
    left_out: as in `lines`.
  """
  import pyarrow as pa

  is_ = pa.types
  if isinstance(kind, pa.BaseExtensionType):
    target = _target(kind.storage_type, name, left_out)
    if target is None or target.kind != kind.storage_type:
      _leave_out(kind, name, left_out)
      return None
    return Target(kind, target.convert)
  if is_.is_float16(kind):
    return Target(pa.float32())
  if is_.is_null(kind) or is_.is_boolean(kind) or is_.is_integer(kind) or is_.is_floating(kind):
    return Target(kind)
  if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
    return Target(kind)
  if is_.is_timestamp(kind) or is_.is_date(kind) or is_.is_time(kind):
    return Target(pa.string())
  if is_.is_decimal(kind):
    return Target(pa.float64())
  if is_.is_dictionary(kind):
    return _target(kind.value_type, name, left_out)
  if is_.is_struct(kind):
    return _target_of_struct(kind, name, left_out)
  if is_.is_map(kind):
    return _target_of_map(kind, name, left_out)
  if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
    return _target_of_list(kind, name, left_out)
  _leave_out(kind, name, left_out)
  return None


def _target_of_list(kind: Any, name: str, left_out: dict[str, str]) -> Target | None:
  import pyarrow as pa

  item = _target(kind.value_type, name, left_out)
  if item is None:
    return None
  if item.kind != kind.value_type:
    kind = pa.list_(item.kind)
  convert = item.convert
  if convert is None:
    return Target(kind)

  def as_list(values: list | None) -> list | None:
    if values is None:
      return None
    return list(map(convert, values))

  return Target(kind, as_list)


def _target_of_struct(kind: Any, name: str, left_out: dict[str, str]) -> Target:
  import pyarrow as pa

  converts = {}
  fields = []
  for field in kind:
    target = _target(field.type, f"{name}.{field.name}", left_out)
    if target is not None:
      converts[field.name] = target.convert or _identity
      if target.kind != field.type:
        field = pa.field(field.name, target.kind)
    fields.append(field)

  def as_object(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
      return None
    return {key: convert(value[key]) for key, convert in converts.items() if value[key] is not None}

  return Target(pa.struct(fields), as_object)


def _target_of_map(kind: Any, name: str, left_out: dict[str, str]) -> Target | None:
  import pyarrow as pa

  item = _target(kind.item_type, name, left_out)
  if item is None:
    return None
  if not (pa.types.is_string(kind.key_type) or pa.types.is_large_string(kind.key_type)):
    _leave_out(kind, name, left_out)
    return None
  if item.kind != kind.item_type:
    kind = pa.map_(kind.key_type, item.kind)
  convert = item.convert or _identity

  def as_object(pairs: list[tuple[str, Any]] | None) -> dict[str, Any] | None:
    if pairs is None:
      return None
    return {key: convert(value) for key, value in pairs}

  return Target(kind, as_object)


def _identity(value: Any) -> Any:
  return value


def _leave_out(kind: Any, name: str, left_out: dict[str, str]) -> None:
  """Notes a column or part that has no JSON form."""
  left_out[name] = str(kind)
