"""The types and ranges of the fields of a Hugging Face config.json, checked before any field is used."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.errors import InputError
from alignjax.system.hub import shown


class Field(NamedTuple):
  """The values that a field may have.

  Attributes:
    wanted: a description of them, for error messages.
    holds: returns True if a value is one of them.
    null: True if the field may be null, which means the family's default.
  """

  wanted: str
  holds: Callable[[Any], bool]
  null: bool = False


def whole(least: int, most: int, null: bool = False) -> Field:
  """Makes the Field of whole numbers in least .. most: 512.0 is none, nor is true.

  Args:
    least, most: the bounds, both allowed.
    null: True to allow null too.
  """

  def holds(value):
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

  return Field(f"a whole number from {least} to {most}", holds, null)


def number(above: float, below: float, null: bool = False) -> Field:
  """Makes the Field of numbers x with above < x < below, whole or not; NaN is none.

  Args:
    above, below: the bounds, neither allowed.
    null: True to allow null too.
  """

  def holds(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below

  return Field(f"a number between {above:g} and {below:g}", holds, null)


FLAG = Field("true or false", lambda x: isinstance(x, bool), null=True)
TEXT = Field("a text", lambda x: isinstance(x, str))
TEXTS = Field("a list of texts", lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x), null=True)
NAMES = Field("an object of texts", lambda x: isinstance(x, dict) and all(isinstance(y, str) for y in x.values()))
OBJECT = Field("an object", lambda x: isinstance(x, dict), null=True)

SIZE = whole(1, 10**7)
THETA = number(0, 1e30)
CAP = number(0, 1e30, null=True)
FIELDS = {
  "architectures": TEXTS,
  "vocab_size": whole(1, 2**31 - 1),
  "num_hidden_layers": whole(1, 10**4),
  "hidden_size": SIZE,
  "intermediate_size": SIZE,
  "num_attention_heads": whole(1, 10**5),
  "num_key_value_heads": whole(1, 10**5, null=True),
  "head_dim": whole(2, 10**5, null=True),
  "max_position_embeddings": whole(1, 2**31 - 1, null=True),
  "rms_norm_eps": number(0, 1),
  "rope_theta": THETA,
  "rope_local_base_freq": THETA,
  "rope_scaling": OBJECT,
  "rope_parameters": OBJECT,
  "sliding_window": whole(0, 2**31 - 1, null=True),
  "sliding_window_pattern": whole(1, 10**4),
  "max_window_layers": whole(0, 10**4),
  "layer_types": TEXTS,
  "use_sliding_window": FLAG,
  "query_pre_attn_scalar": number(0, 1e30),
  "attn_logit_softcapping": CAP,
  "final_logit_softcapping": CAP,
  "attention_bias": FLAG,
  "mlp_bias": FLAG,
  "tie_word_embeddings": FLAG,
  "hidden_act": TEXT,
  "hidden_activation": TEXT._replace(null=True),
  "id2label": NAMES,
}
ROPE = {
  "rope_theta": THETA,
  "rope_type": TEXT,
  "type": TEXT,
  "factor": number(0, 1e30),
  "low_freq_factor": number(0, 1e30),
  "high_freq_factor": number(0, 1e30),
  "original_max_position_embeddings": whole(1, 2**31 - 1),
}


def check(raw: Mapping[str, Any], where: str, kinds: tuple[str, ...]) -> None:
  """Checks all fields of a config.json that are read; a missing one is no error here.

  Args:
    raw: its object.
    where: its path.
    kinds: of layers; each may have its own object in rope_parameters.

  Raises:
    InputError: a field has an invalid value; the message names file and field.
  """
  _check(raw, where, FIELDS)
  for name in ("rope_scaling", "rope_parameters"):
    rope = raw.get(name) or {}
    _check(rope, where, ROPE | dict.fromkeys(kinds, OBJECT._replace(null=False)), f"{name}.")
    for kind in kinds:
      _check(rope.get(kind, {}), where, ROPE, f"{name}.{kind}.")


def _check(raw, where, fields, parent=""):
  for name, field in fields.items():
    if name not in raw or (field.null and raw[name] is None):
      continue
    if not field.holds(raw[name]):
      raise InputError(f"{where}: {parent}{name} is {shown(raw[name])}; it must be {field.wanted}")
