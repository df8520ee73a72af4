"""The form of a file by its first bytes, regardless of its name, and the reason for which some are no data."""

HEAD = 4096  # number of first bytes
BOM = b"\xef\xbb\xbf"

_PACKED = {
  b"PK\x03\x04": "zip",
  b"BZh": "bzip2",
  b"\xfd7zXZ\x00": "xz",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"7z\xbc\xaf\x27\x1c": "7z",
  b"\x04\x22\x4d\x18": "lz4",
}
_OTHER = {
  b"SQLite format 3\x00": "an SQLite database",
  b"\x89HDF\r\n\x1a\n": "an HDF5 file",
  b"Obj\x01": "an Avro file",
  b"ORC": "an ORC file",
  b"\x80\x04": "a pickle",
  b"\x80\x05": "a pickle",
  b"GGUF": "a GGUF file",
}


def form(head: bytes) -> str:
  """Returns the form of a file of records: "gzip", "parquet", "arrow file", "arrow stream", or "text"."""
  for start, name in {b"\x1f\x8b": "gzip", b"PAR1": "parquet", b"ARROW1": "arrow file"}.items():
    if head.startswith(start):
      return name
  if head.startswith(b"\xff\xff\xff\xff") and b"\0" in head[4:8]:
    return "arrow stream"
  return "text"


def first_letter(head: bytes) -> bytes:
  """Returns the first byte of a text that is no blank; b"" if there is none."""
  return head.removeprefix(BOM).lstrip()[:1]


def foreign(head: bytes) -> str:
  """Names the form of a file that is neither text nor a table, with the remedy; "" if it may be data."""
  if not head:
    return "is empty; fetch or write it again"
  if head.startswith(b"version https://git-lfs"):
    return "is a Git LFS pointer and not the file itself; run `git lfs pull` in its repository"
  if b"annex/objects/" in head[:512]:
    return "is a git-annex pointer and not the file itself; run `git annex get` in its repository"
  if not head.strip(b"\0"):
    return "holds zero bytes alone, as a copy that was cut off does; fetch it again"
  if head[:2] in (b"\xff\xfe", b"\xfe\xff") or _is_wide(head):
    return "is UTF-16 or UTF-32 text; save it as UTF-8"
  if first_letter(head) == b"<":
    return "is a web page (HTML or XML), such as a site sends in place of a file; download the file itself"
  for start, name in _PACKED.items():
    if head.startswith(start):
      return f"is packed with {name}; unpack it, or pack it with gzip"
  if head[257:262] == b"ustar":
    return "is a tar archive; unpack it"
  for start, name in _OTHER.items():
    if head.startswith(start):
      return f"is {name}; write its records as JSON lines or Parquet"
  return ""


def _is_wide(head: bytes) -> bool:
  """True if a text without a byte-order mark has more than one byte for a letter."""
  return len(head) > 3 and head[:4].count(0) >= 2 and any(byte in b'{["' for byte in head[:4].replace(b"\0", b""))
