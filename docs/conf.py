"""The site of docs/: `pip install -e '.[docs]'`, then `sphinx-build -W --keep-going -b html docs docs/_build`.

Pages are Markdown (MyST). The API reference is made from the docstrings, one page a module: `sphinx.ext.apidoc` writes
docs/api/ at each build, and autodoc imports the package. Nothing is computed, and no device is touched.
"""

import os
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
MEMBERS = ("members", "ignore-module-all")  # what a module defines, not what it passes on
os.environ["SPHINX_APIDOC_OPTIONS"] = ",".join(MEMBERS)  # of packages, for which apidoc takes no option

project = "alignjax"
release = re.search(r'version="(.*?)"', (ROOT / "setup.py").read_text())[1]
project_copyright = "the alignjax authors; Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "api/modules.rst"]
html_theme = "furo"
html_title = "alignjax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
myst_heading_anchors = 3  # links such as online.md#trainer-and-sampler

apidoc_modules = [
  {
    "path": "../alignjax",
    "destination": "api",
    "exclude_patterns": ["**/rewards/sandbox/cell"],  # a program of its own, which the package does not import
    "module_first": True,
    "separate_modules": True,
    "automodule_options": MEMBERS,
  }
]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a record's attributes are a list, not an entry each
default_role = "code"  # names and formulas in docstrings stand in single backquotes

SHOWN = {  # files outside of docs/ that a page includes whole
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "CONTRIBUTING.md": "contributing.md",
  "SECURITY.md": "reporting.md",
  "launch/README.md": "launch.md",
}


def on_site(text: str, folder: pathlib.Path) -> str:
  """Markdown with its links, written for a reader of the repository, turned to the pages of the site.

  Args:
    text: of a file in `folder`.
    folder: to which its links are relative.
  """

  def turned(link: re.Match) -> str:
    target, anchor = link[1], link[2] or ""
    path = os.path.relpath(folder / target, ROOT)
    target = SHOWN.get(path) or os.path.relpath(ROOT / path, DOCS)
    return f"]({target}{anchor})"

  return re.sub(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", turned, text)


def read_page(app, docname, content):
  if not docname.startswith("api/"):
    content[0] = on_site(content[0], DOCS)


def read_included(app, relative_path, parent_docname, content):
  content[0] = on_site(content[0], (ROOT / os.path.relpath(DOCS / relative_path, ROOT)).parent)


SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")


def plain(app, what, name, obj, options, lines):
  """A docstring as reStructuredText. Ours are plain text: markup is single backquotes and Google's sections alone.

  A block that is laid out by hand (indented, or with columns) is shown as it is.
  """
  blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
  lines[:] = [*"\n\n".join(map(_literal_or_escaped, blocks)).split("\n"), ""]


def _literal_or_escaped(block: str) -> str:
  rows = block.split("\n")
  if rows[0] == "Attributes:":  # napoleon knows "chosen, rejected: ..." of arguments, not of attributes
    entries = re.split(r"\n(?=  \S)", block)
    block = "\n".join(line for entry in entries for line in _for_each_name(entry))
  elif not SECTION.match(rows[0]) and (block.startswith("  ") or any(re.search(r"\S {2,}\S", row) for row in rows)):
    return "::\n\n" + "\n".join(f"  {row}" for row in rows)
  parts = re.split(r"((?<!`)`[^`]+`(?!`))", block)
  return "".join(part if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _for_each_name(entry: str) -> list[str]:
  names, colon, text = entry.partition(":")
  several = re.fullmatch(r"  (\w+(?:, \w+)+)", names)
  return [f"  {name}{colon}{text}" for name in several[1].split(", ")] if several else [entry]


def _escaped(text: str) -> str:
  text = re.sub(r"[*|`]|(?<=\w)_(?!\w)", r"\\\g<0>", text)
  return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def skipped(app, what, name, obj, skip, options):
  """A field of a NamedTuple says "Alias for field number 0"; the class's own docstring says what it is."""
  return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
  app.connect("source-read", read_page)
  app.connect("include-read", read_included)
  app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
  app.connect("autodoc-skip-member", skipped)
