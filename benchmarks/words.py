"""Texts for trainers that want text where a benchmark has token ids: one token per word, and nothing is added.

For environments of requirements-trl.txt and the like.
"""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def as_text(record: dict[str, Any]) -> dict[str, Any]:
  """A record with words for token ids; the blank before a completion's first word is the completion's."""
  texts = {name: f" {words(ids)}" for name, ids in record.items() if isinstance(ids, list)}
  return record | texts | {"prompt": words(record["prompt"])}


def words(ids: list[int]) -> str:
  """The text of token ids."""
  return " ".join(word(i) for i in ids)


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
  """One token per word, as `word` writes them; adds nothing at the beginning."""
  tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(vocab)}, unk_token=word(2)))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  special = {"pad_token": word(0), "eos_token": word(1), "unk_token": word(2)}
  return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word(token: int) -> str:
  """What stands for a token id in texts."""
  return ("<pad>", "<eos>", "<unk>")[token] if token < 3 else f"w{token}"
