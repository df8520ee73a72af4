"""The chat page: one file, sent with a policy by which the browser runs its own script and nothing else."""

import base64
import hashlib
import re
from importlib import resources


def content() -> str:
  """Returns the page's HTML."""
  return (resources.files("alignjax.serving") / "page.html").read_text(encoding="utf-8")


def headers(html: str) -> dict[str, str]:
  """Returns the headers with which the page is sent: script and style are allowed by their hashes, and nothing else."""

  def sources(tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in hashes)

  policy = {
    "default-src": "'none'",
    "script-src": sources("script"),
    "style-src": sources("style"),
    "connect-src": "'self'",
    "form-action": "'none'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
  }
  return {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
  }
