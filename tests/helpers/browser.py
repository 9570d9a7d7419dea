"""A headless browser for tests of the viewer's page, and what it finds wrong with a page."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE = 15_000.0  # ms that anything on the page may take to come

# Texts whose contrast with what is behind them is below AA's 4.5. Grounds that are half transparent are laid over each
# other; disabled controls and what is hidden from sight are left out, as WCAG has it.
CONTRAST = """() => {
  const parse = (text) => {
    const parts = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number);
    const unit = text.startsWith("color(") ? 255 : 1;
    return [...parts.slice(0, 3).map((part) => part * unit), parts[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((at) => top[at] * top[3] + below[at] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map((part) => linear(part / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const grounds = new Map([[null, [255, 255, 255, 1]]]);
  const ground = (node) => {
    if (!grounds.has(node)) {
      grounds.set(node, over(parse(getComputedStyle(node).backgroundColor), ground(node.parentElement)));
    }
    return grounds.get(node);
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("svg, noscript, option, :disabled, .hidden, .skip") || !node.checkVisibility()) continue;
    const behind = ground(node);
    const letters = over(parse(getComputedStyle(node).color), behind);
    const [one, other] = [light(letters), light(behind)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    const what = `${node.tagName}.${node.className} "${node.textContent.trim().slice(0, 20)}"`;
    if (ratio < 4.5) found.push(`${what} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""


def missing() -> str | None:
    """Why there is no browser to test with; None: there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the Python package playwright is missing: tools/setup_browser.sh"
    return None if executable() else "no chromium or Chrome on PATH: tools/setup_browser.sh"


def executable() -> str | None:
    """The browser's path: of MEGATRON_LASER_BROWSER, or what is on PATH."""
    named = os.environ.get("MEGATRON_LASER_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # No sandbox: containers, in which tests run as root, do not allow it. The pages are our own.
        launched = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield launched
        launched.close()


class Watched:
    """A page, with the errors of its console and the requests that left its origin."""

    def __init__(self, launched: Any, *, width: int = 1280, scheme: str = "light", origin: str = "") -> None:
        self._context = launched.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        self._context.set_default_timeout(DEADLINE)
        self.page = self._context.new_page()
        self.errors: list[str] = []
        self.strays: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url[:100]}"))
        self.page.on("request", lambda request: self._asked(request.url, origin))

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _asked(self, url: str, origin: str) -> None:
        if not url.startswith((origin, "data:", "blob:")):
            self.strays.append(url)

    def until(self, condition: str, seconds: float = DEADLINE / 1000) -> None:
        """Wait for a condition in JavaScript. (Playwright's own way evaluates text in the page, which it forbids.)"""
        end = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds:g} s: {condition}; errors: {self.errors}")
            time.sleep(0.01)

    def faults(self) -> list[str]:
        """What is wrong with what the page shows now."""
        wide = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        too_wide = [f"the page is {wide} px wider than the window"] if wide > 0 else []
        return [*self.errors, *self.strays, *too_wide, *self.page.evaluate(CONTRAST)]


def measure(
    launched: Any, url: str, drawn: str, *, loads: int = 3, shot: Path | None = None
) -> list[dict[str, float]]:
    """Milliseconds from the navigation to the first paint and to `drawn`, a condition in JavaScript; nothing cached."""
    times: list[dict[str, float]] = []
    for _ in range(loads):
        with Watched(launched) as watched:
            page = watched.page
            page.goto(url, wait_until="commit")
            now = page.evaluate(
                f"new Promise((done) => {{ const look = () => {drawn} ? done(performance.now()) : "
                "requestAnimationFrame(look); look(); })"
            )
            # The entry is written with the frame, which may be a little later.
            watched.until("performance.getEntriesByName('first-contentful-paint').length")
            entries = page.evaluate("performance.getEntriesByType('paint').map((e) => [e.name, e.startTime])")
            times.append({**dict(entries), "drawn": now})
            if shot is not None:
                page.screenshot(path=shot)
    return times
