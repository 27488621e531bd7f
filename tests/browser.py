"""Chromium without a window, driven through chromedriver in the form of W3C WebDriver; no package is needed for that."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of a reference to an element, as the standard has it."""

KEYS = {"enter": "\ue007", "escape": "\ue00c", "tab": "\ue004", "shift": "\ue008"}


def chromium() -> tuple[str, str] | None:
    """The browser and its driver; None if one of them is not there."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


class Browser:
    def __init__(self, session: str) -> None:
        self.session = session

    def open(self, url: str) -> None:
        _post(f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, which is the body of a function."""
        return _post(f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        return _post(f"{self.session}/element", {"using": "css selector", "value": selector})[ELEMENT]

    def text(self, selector: str) -> str:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('|')", selector
        )

    def click(self, selector: str) -> None:
        _post(f"{self.session}/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        _post(f"{self.session}/element/{self.find(selector)}/value", {"text": text})

    def fill(self, selector: str, text: str) -> None:
        _post(f"{self.session}/element/{self.find(selector)}/clear", {})
        self.type(selector, text)

    def wait(self, script: str, *arguments: Any, seconds: float = 20) -> Any:
        """What a script returns as soon as that is true."""
        return wait(lambda: self.run(script, *arguments), seconds=seconds, what=script)

    def resize(self, width: int, height: int) -> None:
        """Of the page itself, also below the least width of a window."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        _post(f"{self.session}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": values})

    def print_preview(self) -> None:
        """Show the page as it is printed."""
        media = {"cmd": "Emulation.setEmulatedMedia", "params": {"media": "print"}}
        _post(f"{self.session}/goog/cdp/execute", media)
        self.run("window.dispatchEvent(new Event('beforeprint'))")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_get(f"{self.session}/screenshot")))

    def errors(self) -> list[str]:
        """What the page has logged as an error since the last call, but for replies that are no success."""
        entries = _post(f"{self.session}/se/log", {"type": "browser"})
        return [each["message"] for each in entries if each["level"] == "SEVERE" and each["source"] != "network"]


def wait(check: Callable[[], Any], *, seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < until, f"not within {seconds} seconds: {what}"
        time.sleep(0.03)
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    found = chromium()
    assert found is not None, "ask chromium() first"
    port = free_port()
    driver = subprocess.Popen([found[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900"]
    options = {"goog:chromeOptions": {"binary": found[0], "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
    try:
        wait(lambda: _ready(url), seconds=30, what="chromedriver")
        session = _post(f"{url}/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        yield Browser(f"{url}/session/{session}")
        _send(urllib.request.Request(f"{url}/session/{session}", method="DELETE"))
    finally:
        driver.terminate()
        driver.wait()


def _ready(url: str) -> bool:
    try:
        return bool(_get(f"{url}/status")["ready"])
    except OSError:
        return False


def _get(url: str) -> Any:
    return _send(urllib.request.Request(url))


def _post(url: str, body: dict[str, Any]) -> Any:
    return _send(urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}))


def _send(request: urllib.request.Request) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{request.full_url}: {error.read().decode()[:600]}") from None
