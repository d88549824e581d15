"""A headless Chromium that is driven through a pipe: pages are opened, clicked, typed at, and looked at."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
"""The browser; None where none is installed."""
WHY_NOT = f"no browser: none of {', '.join(NAMES)} is on the PATH"
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


class Chromium:
    """One page of a browser, as a context manager."""

    def __enter__(self) -> "Chromium":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # children may still write there
        # The browser reads from its descriptor 3 and writes to 4; ours are moved out of the way of these.
        (theirs_in, self._to), (self._from, theirs_out) = ([_moved(end) for end in os.pipe()] for _ in range(2))

        def in_child() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [
                *(PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
                *(f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"),
            ],
            preexec_fn=in_child,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", None
        self.requests: list[str] = []
        """The addresses that the page has asked for."""
        self.errors: list[str] = []
        """What went wrong in its script."""
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def open(self, path: Path, width: int = 1400, height: int = 1000, scheme: str = "light", scale: float = 1) -> None:
        """Open a file in a window of a size, in a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", features=features)
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 300
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < deadline, "the page doesn't load"

    def run(self, script: str):
        """The value of an expression of JavaScript."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        where = f"JSON.stringify(document.querySelector({json.dumps(selector)}).getClientRects()[0])"
        box = json.loads(self.run(where))
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            code = _KEYS[key]
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, height: int | None = None) -> bytes:
        """The window as PNG, or the page down to a height."""
        clip = {}
        if height is not None:
            clip = {"clip": {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}}
        found = self._ask("Page.captureScreenshot", captureBeyondViewport=height is not None, **clip)
        return base64.b64decode(found["data"])

    def _ask(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._heard()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(answer["params"]["exceptionDetails"]))

    def _heard(self):
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _moved(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    os.set_inheritable(moved, False)
    return moved
