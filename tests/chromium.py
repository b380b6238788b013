"Pages in a real browser without a network; tests that need one are skipped where there is none."
import contextlib, json, shutil, subprocess, time, urllib.request

import pytest
import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browser(test): return pytest.mark.browser(pytest.mark.skipif(not CHROMIUM, reason="no chromium")(test))


class Browser:
    "A page in a headless browser that has no network but this machine, by the protocol of its developer tools."
    def __init__(self, folder, width=1440, height=1400):
        flags = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--enable-unsafe-swiftshader",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder}"]
        self.process, mark = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL), \
            folder/"DevToolsActivePort"
        until(lambda: mark.exists() and len(mark.read_text().split()) == 2)
        with urllib.request.urlopen(f"http://127.0.0.1:{mark.read_text().split()[0]}/json") as f: tabs = json.load(f)
        self.socket = websocket.create_connection(next(t for t in tabs if t["type"] == "page")["webSocketDebuggerUrl"],
                                                  suppress_origin=True, timeout=60)
        self.n, self.requests, self.faults = 0, [], []
        for part in ("Network", "Page", "Runtime"): self.call(f"{part}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def send(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))

    def call(self, method, **params):
        self.send(method, **params)
        while (said := json.loads(self.socket.recv())).get("id") != self.n:
            if said.get("method") == "Network.requestWillBeSent": self.requests.append(said["params"]["request"]["url"])
            if said.get("method") == "Runtime.exceptionThrown": self.faults.append(said["params"])
        assert "error" not in said, said
        return said["result"]

    def js(self, code):
        said = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.absolute().as_uri())
        until(lambda: self.js("document.readyState === 'complete' && location.protocol !== 'about:'"))

    def mouse(self, send, kind, x, y, **of): send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **of)

    def hover(self, where, done): again(lambda: self.mouse(self.call, "Moved", *where()), done)

    def click(self, x, y):
        "Down and up in one go: what is held for .3 s is no tap to bokeh, and a slow machine takes that for an answer."
        self.mouse(self.call, "Moved", x, y)
        self.mouse(self.send, "Pressed", x, y, button="left", clickCount=1)
        self.mouse(self.call, "Released", x, y, button="left", clickCount=1)

    def tap(self, where, done): again(lambda: self.click(*where()), done)

    def close(self):
        self.socket.close(); self.process.terminate(); self.process.wait()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(.1)


def again(act, done, seconds=60):
    "`act` until it is `done`, as a hand does on a page that may still move."
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "nothing came of it"
        act()
        with contextlib.suppress(AssertionError): until(done, 3)
