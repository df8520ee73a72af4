"""What a tokenizer.json may not hold, for the library that opens it would end the process, or panic."""

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from alignjax.system.hub import shown


def flaw(text: str) -> str:
  """Why the library must not open this text of a tokenizer.json; "" where nothing is known against it.

  It makes room for every id up to the largest, and for a table of as many bytes as its head says, and cuts the second
  half of a merge behind the model's prefix, without a look. What is merely wrong it finds itself.
  """
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    return f"no JSON: {error}"
  if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
    return "no object with a model"
  model = found["model"]
  vocab = model.get("vocab")
  if isinstance(vocab, dict):
    ids = [number for number in vocab.values() if isinstance(number, int)]
    if reason := sparse(ids):
      return reason
    if len(set(ids)) < len(ids):  # of two it writes one, and then lacks the other
      twice = next(number for number, count in Counter(ids).items() if count > 1)
      return f"several tokens have the id {twice}"
    if reason := _flaw_of_merges(model, vocab):
      return reason
  return next(filter(None, map(_flaw_of_table, _tables(found.get("normalizer")))), "")


def sparse(ids: Sequence[int]) -> str:
  """Why these are not the ids of a vocabulary; a model has a row for each up to the largest."""
  if ids and max(ids) <= 4 * len(ids) + 10_000:
    return ""
  return f"it has {len(ids)} tokens and ids up to {max(ids, default=-1)}"


def _flaw_of_merges(model: dict[str, Any], vocab: dict[str, Any]) -> str:
  """What is wrong with the merges of a model, if it has any."""
  prefix, merges = model.get("continuing_subword_prefix") or "", model.get("merges")
  if not isinstance(prefix, str) or not isinstance(merges, list):
    return ""
  for merge in merges:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
      continue
    first, second = pair
    if not second.startswith(prefix):
      return f"continuing_subword_prefix is {shown(prefix)}, and the merge {shown(merge)} goes on without it"
    for part in (first, second, first + second.removeprefix(prefix)):
      if part not in vocab:
        return f"the merge {shown(merge)} is of or makes {shown(part)}, which is no token"
  return ""


def _tables(normalizer: Any) -> Iterator[Any]:
  """The tables of characters in a normalizer, itself one or a sequence of them."""
  waiting = [normalizer]
  while waiting:
    part = waiting.pop()
    if isinstance(part, dict):
      if part.get("type") == "Precompiled":
        yield part.get("precompiled_charsmap")
      inner = part.get("normalizers")
      waiting += inner if isinstance(inner, list) else []


def _flaw_of_table(table: Any) -> str:
  """What is wrong with a table of SentencePiece's: a trie behind its length in bytes, then the texts that it names."""
  try:
    content = base64.b64decode(table, validate=True)
    size = int.from_bytes(content[:4], "little")
    content[4 + size :].decode()
  except (TypeError, ValueError, binascii.Error) as error:
    return f"its precompiled_charsmap is none ({error})"
  if len(content) < 8 or not size or size % 4 or 4 + size > len(content):
    return f"its precompiled_charsmap of {len(content)} bytes has a trie of {size}"
  return ""
