"""The settings of a run's data, and which of them suit which kind of training."""

from dataclasses import dataclass
from typing import Any

from alignjax.data.format import FORMATS, KINDS
from alignjax.data.transform import SHARING
from alignjax.errors import InputError
from alignjax.system import ranges
from alignjax.system.ranges import Count, Several, ShareBelowOne, Whole


@dataclass(frozen=True)
class DataConfig:
  """What to read, and the shape of a batch."""

  train: str = ""  # JSON lines or array (may be gzipped), Parquet, Arrow, ArrayRecord; globs and commas join files
  eval: str = ""  # the same; if empty, the held-out share of `train`
  holdout: ShareBelowOne = 0.1  # share of the prompts of `train` held out if `eval` is empty; 0: none
  tokenizer: str = ""  # a .model file, a tokenizer.json, a folder with one, or hf://org/name; empty: that of run.init
  format: str = "auto"  # or one of format.FORMATS, then for every record
  rows: Count = 32  # B, rows of a batch over all hosts
  row_length: Several = 1024  # T, tokens of a row
  pack: bool = True  # several examples in a row; off: one in a row
  max_examples: Count = 16  # P, the most examples (pairs) in a packed row
  max_prompt_length: Whole = 0  # tokens; records with a longer prompt are dropped; 0: no limit
  overlong: str = "drop"  # examples longer than a row; "cut": the end of their completions
  share_prompts: bool = False  # in a row, a prompt once for all its completions, instead of once for each
  step_separator: str = "\n"  # follows each step of a stepwise answer; its last token learns the label of the step
  workers: Whole = 0  # processes that prepare batches; 0: two threads of the main one
  cache: str = ""  # where indices and measures are kept; empty: $ALIGNJAX_CACHE, ~/.cache/alignjax

  def __post_init__(self):
    ranges.check_record("data", self)
    require(self.step_separator != "", "step_separator", self.step_separator, "a string, such as a newline")
    require(self.overlong in ("drop", "cut"), "overlong", self.overlong, "'drop' or 'cut'")
    require(self.format in ("auto", *FORMATS), "format", self.format, f"auto, {', '.join(FORMATS)}")


def check_request(config: DataConfig, kind: str, split: str) -> None:
  """Raises InputError if the settings do not suit the kind, or there is no such kind or split."""
  require(kind in KINDS and kind != "text", "kind", kind, ", ".join(name for name in KINDS if name != "text"))
  can_mismatch = kind != "mismatched" or config.rows > 1
  require(can_mismatch, "rows", config.rows, "at least 2 where completions are mismatched")
  require(split in ("train", "eval"), "split", split, "train or eval")
  uses_separator = kind == "stepwise" or config.step_separator == DataConfig.step_separator
  require(uses_separator, "step_separator", config.step_separator, f"left alone: {kind} data has no steps")


def check_sharing(config: DataConfig, kind: str) -> None:
  """Raises InputError if `share_prompts` is on for a kind whose rows have one completion for each prompt."""
  can_share = not config.share_prompts or kind in SHARING
  require(can_share, "share_prompts", True, f"off: {kind} data has no several completions")


def require(allowed_value: bool, field: str, value: Any, allowed: str) -> None:
  """Raises InputError about a setting unless its value is allowed."""
  if not allowed_value:
    raise InputError(f"data.{field} is {value!r}; it must be {allowed}")
