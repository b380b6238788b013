"""What a browser shows, as pictures: `make screens`. It wants chromium, the run `demo` and the site. Those that pages
show go to figures/screens, the others, to be looked at, to runs/screens.

The explorer in a real JupyterLab after a tap and as a page from disk, a report, and a chapter of the site; wide and as
narrow as a telephone, light and dark."""
import base64

import pytest

from chromium import Browser, browser, until
from ganprompt.explorer import explore_runs
from ganprompt.files import root, run_folder
from ganprompt.outputs import small_png
from test_explorer import opened
from test_lab import executed, lab, tap_point # noqa: F401, a fixture
from test_lab import opened as opened_lab

SHOWN = {"explorer-from-disk", "explorer-in-jupyterlab", "report-wide-light"}


@pytest.fixture(scope="module")
def finished(): return run_folder("demo") # JupyterLab shows the demo, not the shop of the tests


def keep(tab, name):
    "The window as a small picture."
    out = root()/("figures" if name in SHOWN else "runs")/"screens"
    out.mkdir(exist_ok=True)
    (out/f"{name}.png").write_bytes(base64.b64decode(small_png(tab.call("Page.captureScreenshot")["data"])))


@pytest.fixture
def tab(tmp_path, request):
    tab = Browser(tmp_path/"profile", *getattr(request, "param", (1440, 900)))
    yield tab
    tab.close()


@browser
def test_the_explorer_in_jupyterlab(lab, tab): # noqa: F811
    opened_lab(tab, lab[1], "21_explorer.ipynb")
    js = executed(tab)
    tap_point(tab, js, js("lone()"))
    until(lambda: js("panel.text.includes('User ')"), 30)
    keep(tab, "explorer-in-jupyterlab")


@browser
def test_the_explorer_from_disk(tab, tmp_path):
    opened(tab, explore_runs(["demo"], str(tmp_path/"page.html"), "umap"))
    tab.tap(lambda: tab.js("place(0, lone())"), lambda: tab.js("panel.text.includes('User ')"))
    keep(tab, "explorer-from-disk")


@browser
@pytest.mark.parametrize("tab,scheme", [((1440, 900), "light"), ((1440, 900), "dark"), ((390, 844), "light")],
                         indirect=["tab"])
@pytest.mark.parametrize("name,page", [("report", run_folder("demo")/"report.html"),
                                       ("chapter", root()/"site/nbs/12_encoder.html")])
def test_a_page(name, page, tab, scheme):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(page)
    keep(tab, f"{name}-{'wide' if tab.js('innerWidth') > 999 else 'narrow'}-{scheme}")
