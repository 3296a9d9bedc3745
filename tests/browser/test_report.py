"""Reports in headless Chromium: they load alone, react, can be read on small and large screens, and by everybody."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import timm_contconv as tcc

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `browser`")

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
LOCAL = ("file:", "data:", "blob:", "about:")
NARROW, WIDE = 400, 1600


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("test_convnext_dcls_gauss.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def report(model, tmp_path_factory) -> Path:
    start = timm.create_model("test_convnext_dcls_gauss", num_classes=10)
    return tcc.inspect(model, start=start).save(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_program("chromedriver")))
    yield driver
    driver.quit()


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install chromium chromium-driver"
    return path


@pytest.fixture
def page(browser, report) -> webdriver.Chrome:
    show(browser, report, WIDE)
    return browser


def show(browser, report: Path, width: int) -> None:
    """Load the page and wait until everything is drawn."""
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages said
    browser.get(report.as_uri())
    end = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() < end, f"the page is not drawn: {browser.get_log('browser')}"
        time.sleep(0.05)


def drawn(page, panel: str, name: str) -> list[dict]:
    return page.execute_script(f"return window.gallery.views.{panel}.data('{name}')")


def choose(page, element: str, value: int) -> None:
    """Move a control as a user does, and wait until the kernel is drawn."""
    page.execute_async_script(
        "const [id, value, done] = arguments; const control = document.getElementById(id); control.value = value;"
        "control.dispatchEvent(new Event(id === 'layer' ? 'change' : 'input'));"
        "setTimeout(() => requestAnimationFrame(done), 300);",
        element,
        value,
    )


def test_it_loads_without_errors_and_without_the_network(page):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requests
    assert [url for url in requests if not url.startswith(LOCAL)] == []


def test_the_slider_shows_the_kernel_of_its_channel(page, model):
    layer = model.get_submodule("stages.2.blocks.1.conv_dw")
    index = [option.text for option in page.find_elements("css selector", "#layer option")].index(
        "stages.2.blocks.1.conv_dw"
    )
    choose(page, "layer", index)
    shown = []
    for channel in (0, 7):
        choose(page, "channel", channel)
        kernel = layer.weight.detach()[channel, 0]
        rows = drawn(page, "now", "pixels")
        torch.testing.assert_close(_as_kernel(rows, kernel.shape), kernel / kernel.abs().max(), atol=0.02, rtol=0)
        shown.append(rows)
        dots = drawn(page, "now", "dots")
        position = layer.geometry["position"][:, channel, 0].detach() + 11
        torch.testing.assert_close(torch.tensor([[d["y"], d["x"]] for d in dots]).T, position, atol=0.01, rtol=0)
        assert f"channel {channel} of " in page.find_element("id", "which").text
    assert shown[0] != shown[1]


def _as_kernel(rows: list[dict], size: torch.Size) -> Tensor:
    kernel = torch.zeros(size)
    for row in rows:
        kernel[round(row["y"] + 0.5), round(row["x"] + 0.5)] = row["v"]
    return kernel


def test_the_spectrum_is_the_kernels(page, model):
    choose(page, "layer", 0)
    choose(page, "channel", 3)
    kernel = model.get_submodule("stages.0.blocks.0.conv_dw").weight.detach()[3, 0]
    values = torch.tensor([row["v"] for row in drawn(page, "spectrum", "pixels")]).view(33, 33)
    expected = torch.fft.fftshift(torch.fft.fft2(kernel, s=(32, 32)).abs())
    torch.testing.assert_close(values[:32, :32], expected / expected.max(), atol=0.02, rtol=0)


def test_the_table_sorts_by_a_click(page):
    column = [cell.text for cell in page.find_elements("css selector", "table.sortable thead th")].index("time")
    heading = page.find_elements("css selector", "table.sortable thead th")[column]
    orders = []
    for direction in ("descending", "ascending"):
        heading.find_element("tag name", "button").click()
        assert heading.get_attribute("aria-sort") == direction
        cells = page.find_elements("css selector", f"table.sortable tbody tr td:nth-child({column + 1})")
        orders.append([float(cell.get_attribute("data-value") or "-1") for cell in cells])
    assert len(set(orders[0])) > 3
    assert orders == [sorted(orders[0], reverse=True), sorted(orders[0])]


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_it_fits_and_no_text_is_tiny(browser, report, width):
    show(browser, report, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('figure canvas')].filter("
        "  c => c.getBoundingClientRect().right > document.documentElement.clientWidth).length"
    )
    assert wide == 0
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('p, td, th, dt, dd, figcaption, label, a')]"
        "  .map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    blank = browser.execute_script(
        "return [...document.querySelectorAll('figure canvas')].filter(c => { const d = c.getContext('2d')"
        "  .getImageData(0, 0, c.width, c.height).data; return d.every((v, i) => v === d[i % 4]); }).length"
    )
    assert blank == 0


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_axe_finds_no_serious_fault(browser, report, width):
    import axe_core_python

    show(browser, report, width)
    browser.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run().then(arguments[0])")
    assert found["passes"]
    serious = [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert serious == []
