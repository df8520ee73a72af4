"""Opens the chat page in a headless Chromium, for another environment: page_client.py URL CHROMIUM; prints JSON."""

import json
import sys

from playwright.sync_api import sync_playwright

HOSTILE = """\
# Head
**bold** [good](https://example.com) [bad](javascript:alert(1)) <img src=x onerror="window.hacked = 1">
<script>window.hacked = 1</script>

- one
- two

```
<b>code</b>
```
"""


def main(url: str, chromium: str) -> None:
  told = {}
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for name, scheme, width in (("light", "light", 1200), ("dark", "dark", 1200), ("phone", "light", 390)):
      context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
      told[name] = visit(context.new_page(), url)
    browser.close()
  print(json.dumps(told))


def visit(page, url: str) -> dict:
  errors = []
  page.on("pageerror", lambda error: errors.append(str(error)))
  page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
  page.goto(url)
  page.wait_for_selector("#first option", state="attached")
  page.click("summary")
  page.fill("#limit", "8")
  page.fill("#seed", "3")
  page.fill("#annotator", "Ann")
  page.click("summary")
  page.fill("#text", "Hi")
  page.keyboard.press("Enter")
  page.wait_for_selector("#send:not([hidden])")
  answer = page.inner_text(".answer")
  page.click("#fresh")
  page.check("#compare")
  page.fill("#text", "Hi")
  page.click("#send")
  page.wait_for_selector(".vote")
  blind = page.inner_text(".sides")
  page.click("text=B much better")
  page.wait_for_selector(".side.chosen")
  page.wait_for_load_state("networkidle")
  page.evaluate("text => { const p = document.createElement('div'); p.className = 'answer hostile';"
                " p.append(markdown(text)); document.getElementById('turns').append(p); }", HOSTILE)  # fmt: skip
  return {
    "answer": answer,
    "blind": blind,
    "shown": [head.inner_text() for head in page.query_selector_all(".side h2")],
    "tags": page.evaluate("[...document.querySelectorAll('.hostile *')].map(x => x.tagName).join(' ')"),
    "links": page.evaluate("[...document.querySelectorAll('.hostile a')].map(x => x.href)"),
    "hacked": page.evaluate("window.hacked === 1"),
    "fits": page.evaluate("document.documentElement.scrollWidth <= innerWidth"),
    "ground": page.evaluate("getComputedStyle(document.body).backgroundColor"),
    "errors": errors,
  }


if __name__ == "__main__":
  main(*sys.argv[1:])
