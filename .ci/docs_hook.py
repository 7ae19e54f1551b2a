"""Hook of mkdocs: the search works in pages that are opened as files, and no page asks another server for anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SHIM = "https://unpkg.com/iframe-worker/shim"
"""Script that the theme would load from elsewhere, as browsers start no worker from a file."""

OWN = """<script>
if (location.protocol === "file:")
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inner = frame.contentWindow
      this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.inner.importScripts = async (...urls) => {
        for (const one of urls) await this.load(one)
      }
      this.ready = this.load(new URL(url, document.baseURI).href)
    }
    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.inner.document.body.appendChild(script)
      })
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", {data})))
    }
    terminate() {}
  }
</script>"""
"""Runs a worker's script in a hidden frame of the page instead."""


def on_config(config: Any) -> None:
    """Add pages that the navigation of mkdocs.yml does not list yet, at its end."""
    listed = re.findall(r"'([\w-]+\.md)'", str(config.nav))
    more = sorted({page.name for page in Path(config.docs_dir).glob("*.md")} - set(listed))
    if more:
        config.nav.append({"More": more})


def on_post_page(output: str, **context: Any) -> str:
    """Replace the theme's script by `OWN`."""
    page = output.replace(f'<script src="{SHIM}"></script>', OWN)
    assert SHIM not in page, f"{SHIM} is loaded in another way than before"
    return page
