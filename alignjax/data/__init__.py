"""Records on disk to batches: sources, formats, tokenizer, packing, loading. NumPy and Grain; no JAX.

What reads, checks, tokenises, packs or caches records comes in here.
It may import `system` alone, and of that what needs no JAX.
"""

from alignjax.data.loader import DataConfig, Dataset
from alignjax.data.sentencepiece_tokenizer import read_texts, train_tokenizer
from alignjax.data.source import open_source
from alignjax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
  "DataConfig",
  "Dataset",
  "Tokenizer",
  "load_tokenizer",
  "open_source",
  "read_texts",
  "train_tokenizer",
]
