"""Flaws of a tokenizer.json with which the library that opens it would end the process, or panic."""

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from alignjax.system.hub import shown


def flaw(text: str) -> str:
  """Returns the reason for which the library must not open this text of a tokenizer.json; "" if none is known.

  Three things the library does not check: it allocates room for every id up to the largest, allocates a table of as
  many bytes as the table's head says, and cuts the model's prefix off the second half of a merge. Other flaws it
  reports itself.
  """
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    return f"no JSON: {error}"
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    return "no object with a model"
  model = content["model"]
  vocab = model.get("vocab")
  if isinstance(vocab, dict):
    ids = [number for number in vocab.values() if isinstance(number, int)]
    if reason := sparse(ids):
      return reason
    if len(set(ids)) < len(ids):  # the library writes one token of an id, and then misses the other
      duplicate = next(number for number, count in Counter(ids).items() if count > 1)
      return f"several tokens have the id {duplicate}"
    if reason := _flaw_of_merges(model, vocab):
      return reason
  return next(filter(None, map(_flaw_of_table, _tables(content.get("normalizer")))), "")


def sparse(ids: Sequence[int]) -> str:
  """Returns the reason for which these are not the ids of a vocabulary, or "".

  A model has a row for each id up to the largest, so the largest is limited by the number of tokens.
  """
  if ids and max(ids) <= 4 * len(ids) + 10_000:
    return ""
  return f"it has {len(ids)} tokens and ids up to {max(ids, default=-1)}"


def _flaw_of_merges(model: dict[str, Any], vocab: dict[str, Any]) -> str:
  """Returns the flaw of a model's merges; "" if there is none, or no merge."""
  prefix = model.get("continuing_subword_prefix") or ""
  merges = model.get("merges")
  if not isinstance(prefix, str) or not isinstance(merges, list):
    return ""
  for merge in merges:
    pair = merge
    if isinstance(merge, str):
      pair = merge.split(" ")
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
  """Iterates the tables of characters in a normalizer, which may be a sequence of normalizers."""
  waiting = [normalizer]
  while waiting:
    part = waiting.pop()
    if isinstance(part, dict):
      if part.get("type") == "Precompiled":
        yield part.get("precompiled_charsmap")
      inner = part.get("normalizers")
      if isinstance(inner, list):
        waiting += inner


def _flaw_of_table(table: Any) -> str:
  """Returns the flaw of a SentencePiece table, or ""; a table is the length of a trie, the trie, and texts."""
  try:
    content = base64.b64decode(table, validate=True)
    size = int.from_bytes(content[:4], "little")
    content[4 + size :].decode()
  except (TypeError, ValueError, binascii.Error) as error:
    return f"its precompiled_charsmap is none ({error})"
  if len(content) < 8 or not size or size % 4 or 4 + size > len(content):
    return f"its precompiled_charsmap of {len(content)} bytes has a trie of {size}"
  return ""
