"""A headless Chromium, driven over a pipe by the DevTools protocol: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 60


def chromium() -> str | None:
    """The path of a Chromium; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page; everything it says, asks for and complains of is in ``events``."""

    def __init__(self, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._next, self._rest = 0, b""
        there, self._write = os.pipe()
        self._read, back = os.pipe()

        def join() -> None:
            # High numbers first: the pipes may themselves be 3 and 4.
            first, second = os.dup(there), os.dup(back)
            os.dup2(first, 3)
            os.dup2(second, 4)

        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [chromium() or "chromium", *flags],
            preexec_fn=join,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.ask(f"{domain}.enable", page=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)

    def ask(self, method: str, *, page: bool = False, **params: Any) -> dict[str, Any]:
        """The answer to one command; ``page``: to the page instead of the browser."""
        self._next += 1
        session = {"sessionId": self.session} if page else {}
        message = {"id": self._next, "method": method, "params": params} | session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._next:
            self.events.append(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser is gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, file: Path, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Load a file in a window of this size and wait until all of it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", page=True, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", page=True, media="", features=features)
        self.ask("Page.navigate", page=True, url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is in the page."""
        found = self.ask("Runtime.evaluate", page=True, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def said(self, *methods: str) -> list[dict[str, Any]]:
        """What events of these kinds carried."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        found = self.ask("Page.captureScreenshot", page=True, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
