"""The fields of a request's JSON object, each read by its type; a field that is not known is an error that names it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from alignjax.data import field as record_field
from alignjax.data import strict_json
from alignjax.data.strict_json import described
from alignjax.errors import InputError
from alignjax.system import ranges


class RefusedError(InputError):
  """A request that is not served as it stands.

  Attributes:
    param: the field at fault; "" if it is the request as a whole.
    status: of the HTTP response.
    code: a word for programs.
  """

  def __init__(self, message: str, param: str = "", status: int = 400, code: str = "invalid_request"):
    super().__init__(message)
    self.param = param
    self.status = status
    self.code = code


class Fields:
  """A JSON object whose fields are taken one by one; `done` refuses those that nobody took."""

  def __init__(self, value: Any, parent: str = ""):
    """Raises RefusedError if the value is no object; `parent` is the path of it, "" for the whole request."""
    if not isinstance(value, dict):
      raise RefusedError(f"{parent or 'the body'} is {described(value)}; it must be a JSON object", parent)
    self._left = dict(value)
    self._parent = parent

  def path(self, name: str) -> str:
    """The name of a field with those of the objects around it."""
    return ".".join(filter(None, (self._parent, name)))

  def raw(self, name: str) -> Any:
    """Takes a field as it is; None if it is absent or null."""
    return self._left.pop(name, None)

  def read(self, name: str, reader: Callable[[Any, str], Any], default: Any) -> Any:
    """Takes a field by reader(value, path), which raises InputError; the default if it is absent or null."""
    value = self.raw(name)
    if value is None:
      return default
    path = self.path(name)
    try:
      return reader(value, path)
    except RefusedError:
      raise
    except InputError as error:
      raise RefusedError(str(error), path) from error

  def number(self, name: str, kind: Any, default: Any) -> Any:
    """Takes a number of a type of `ranges`."""

    def checked(value, path):
      ranges.check(path, value, kind)
      return value

    return self.read(name, checked, default)

  def flag(self, name: str, default: bool = False) -> bool:
    """Takes a true or false."""

    def checked(value, path):
      if not isinstance(value, bool):
        raise InputError(f"{path} is {described(value)}; it must be true or false")
      return value

    return self.read(name, checked, default)

  def text(self, name: str, default: str = "") -> str:
    """Takes a string of whole characters."""
    return self.read(name, record_field.text, default)

  def required_text(self, name: str) -> str:
    """Takes a string that must be there and not empty."""
    text = self.text(name)
    if not text:
      raise RefusedError(f"field '{self.path(name)}' is missing; give a string", self.path(name))
    return text

  def neutral(self, accepted: Mapping[str, Collection[Any]]) -> None:
    """Takes fields that are not supported, whose values must be among those that ask for nothing; null always is."""
    for name, values in accepted.items():
      value = self.raw(name)
      if value is not None and not any(value == other and type(value) is type(other) for other in values):
        raise RefusedError(
          f"field '{self.path(name)}' is not supported by this server with that value; leave it out", self.path(name)
        )

  def done(self) -> None:
    """Raises RefusedError if a field was not taken."""
    if self._left:
      name = self.path(min(self._left))
      raise RefusedError(f"field '{name}' is not supported by this server; leave it out", name)


def parse(body: bytes) -> Fields:
  """Parses the body of a request."""
  try:
    return Fields(strict_json.loads(body))
  except strict_json.MalformedError as error:
    raise RefusedError(f"the body is {error}", code="invalid_json") from error
