"""The text of a completion while it grows: pieces of whole characters, cut before the first stop string."""

from collections.abc import Sequence

from alignjax.data.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # the end of a text whose last character lacks bytes


class Text:
  """The text of a completion's ids, of which a part may be shown before the rest is known.

  All pieces that `shown` returns add up to `whole`.

  Attributes:
    ids: so far; none after the one that completed a stop string.
    stopped: whether a stop string was found.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self.ids: list[int] = []
    self.stopped = False
    self._tokenizer = tokenizer
    self._stops = tuple(stops)
    self._longest = max(map(len, self._stops), default=0)
    self._text = ""  # of ids[:_read]
    self._settled = 0  # ids before this one do not change how later ones are decoded
    self._read = 0
    self._shown = 0

  def add(self, ids: Sequence[int]) -> None:
    """Adds ids that were drawn; those after a stop string are dropped."""
    if not self._stops:
      self.ids += ids
      return
    for number in ids:  # one by one: a stop string ends the completion at a token
      self.ids.append(number)
      before = len(self._text)
      self._advance()
      start = max(0, before - self._longest)
      places = [place for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
      if places:
        self._text = self._text[: min(places)]
        self.stopped = True
        return

  def shown(self) -> str:
    """Returns the text that has not been shown yet and that no later id can take back."""
    if not self.stopped:
      self._advance()
    end = len(self._text)
    if not self.stopped:
      end -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
    piece = self._text[self._shown : end]
    self._shown = max(self._shown, end)
    return piece

  def rest(self) -> str:
    """Returns the text that has not been shown yet, when no further id will come."""
    whole = self.whole()
    piece = whole[self._shown :]
    self._shown = len(whole)
    return piece

  def whole(self) -> str:
    """Returns the text of all ids, cut before the first stop string."""
    if self.stopped:
      return self._text
    return self._tokenizer.decode(self.ids)

  def _advance(self) -> None:
    """Appends the text of the ids that were not read, unless its last character is not complete.

    Only the newest ids are decoded, together with those read last: a decoder may write a space in front of a word, but
    not in front of a text.
    """
    if self._read == len(self.ids):
      return
    before = self._tokenizer.decode(self.ids[self._settled : self._read])
    after = self._tokenizer.decode(self.ids[self._settled :])
    if after.endswith(_BROKEN) or len(after) <= len(before):
      return
    self._text += after[len(before) :]
    self._settled = self._read
    self._read = len(self.ids)


def _overlap(text: str, stop: str) -> int:
  """Counts the last characters of a text with which a stop string begins."""
  longest = min(len(text), len(stop) - 1)
  return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
