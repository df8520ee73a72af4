"""A SentencePiece tokenizer in Hugging Face's files: tokenizer.json, and our chat template as Jinja text.

The two libraries find the same byte-pair merges in different ways: SentencePiece joins the pair whose piece has the
best score, tokenizers the pair that is first in a list. The list is made from the scores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers

from alignjax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from alignjax.errors import InputError

SPACE = "\u2581"
PROBES = ("  two  spaces ", "a\n\nb\r\n\tc", "1234567890 12.5", "😀 ä \x00 漢字", "don't-stop (now)!", "ab" * 40)
JINJA = (
  "{%- set opening = OPENING -%}{%- set closing = CLOSING -%}{%- set ns = namespace(waiting='') -%}{{- START -}}"
  "{%- for message in messages -%}{%- if message.role not in opening -%}"
  "{%- set ns.waiting = ns.waiting + message.content + '\\n\\n' -%}{%- else -%}"
  "{{- opening[message.role] + ns.waiting + message.content + closing[message.role] -}}{%- set ns.waiting = '' -%}"
  "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- opening['assistant'] -}}{%- endif -%}"
)


def convert(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
  """Returns the texts of tokenizer.json and tokenizer_config.json by name.

  With them, another program gets the same ids from the same text, and from the same dialogue.

  Raises:
    InputError: the model normalises text, or is no byte-pair model: its ids would differ.
  """
  processor = tokenizer.processor
  pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
  control = [piece for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
  ours = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=_merges(processor, pieces),
      unk_token=processor.id_to_piece(processor.unk_id()),
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  ours.normalizer = normalizers.Replace(" ", SPACE)
  ours.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
  ours.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
  _check(ours, tokenizer, pieces)
  names = {-1: None} | dict(enumerate(pieces))
  config = {
    "bos_token": names[tokenizer.bos_id],
    "eos_token": names[tokenizer.stop_id],
    "pad_token": names[tokenizer.pad_id],
    "unk_token": names[processor.unk_id()],
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": _template(tokenizer, pieces),
  }
  return {"tokenizer.json": ours.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def _merges(processor: SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
  """Returns the pairs of pieces that make a piece, in descending order of its score."""
  texts = {piece for i, piece in enumerate(pieces) if not (processor.is_control(i) or processor.is_byte(i))}
  joined = [i for i, piece in enumerate(pieces) if piece in texts and len(piece) > 1]

  def pairs(piece: str) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(piece)):
      if piece[:cut] in texts and piece[cut:] in texts:
        yield piece[:cut], piece[cut:]

  return [pair for i in sorted(joined, key=lambda i: -processor.get_score(i)) for pair in pairs(pieces[i])]


def _template(tokenizer: SentencePieceTokenizer, pieces: list[str]) -> str:
  """Returns the template as Jinja text."""

  def text(ids: Sequence[int]) -> str:
    return "".join(pieces[i] for i in ids)

  def by_role(turns: Mapping[str, Sequence[int]]) -> str:
    return json.dumps({role: text(ids) for role, ids in turns.items()})

  template = tokenizer.template
  jinja = JINJA.replace("OPENING", by_role(template.opening)).replace("CLOSING", by_role(template.closing))
  return jinja.replace("START", json.dumps(text(template.start)))


def _check(ours: tokenizers.Tokenizer, tokenizer: SentencePieceTokenizer, pieces: list[str]) -> None:
  """Raises InputError if the two tokenizers encode a probe text differently."""
  ours.encode_special_tokens = True
  for text in (*PROBES, " ".join(pieces[:2000]).replace(SPACE, " ")):
    if ours.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
      raise InputError(
        f"the SentencePiece model gives other ids for {text[:20]!r} than a tokenizer.json of its pieces would; copy "
        "the .model file, and give ids to other programs"
      )
  ours.encode_special_tokens = False
