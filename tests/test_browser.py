"""The pages in a browser, where there is one: no sideways scrolling, no errors, pictures drawn, a click shows one method alone, heads sort.

A harness holds a page in frames of several widths and writes what it measured into its own body, which the browser prints.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape
from itertools import product

import pytest

from paretune.report.data import load
from paretune.report.page import write_page
from report_cells import JUDGED_WM, METHODS, measured, optimum, publish, record
from test_family_page import family_in
from test_family_page import measured as measured_family

WIDTHS = (360, 400, 761, 800, 912, 1400)
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser")

LOOK = """
const frames = Array.from(document.querySelectorAll("iframe"));
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement, here = { width: frame.clientWidth };
  const all = (query) => Array.from(page.querySelectorAll(query));
  const near = all(".plot").filter((plot) => plot.getBoundingClientRect().top < frame.clientHeight);
  here.scroll = root.scrollWidth;
  here.plots = all(".plot").length;
  here.drawn = all(".plot svg").length;
  here.empty = near.filter((plot) => !plot.querySelector(".series")).length;
  here.blank = all("th").filter((head) => !head.textContent.trim()).length;
  here.outside = [];
  for (const svg of all(".plot svg")) {
    const box = svg.viewBox.baseVal;
    for (const part of svg.querySelectorAll(".dot, .whisker, .label")) {
      const b = part.getBBox(), t = part.transform.baseVal.consolidate(), k = t ? t.matrix.a : 1, x = b.x * k + (t ? t.matrix.e : 0);
      if (x < -2 || x + b.width * k > box.width + 2) here.outside.push(part.outerHTML.slice(0, 120));
    }
  }
  const labels = (svg) => Array.from(svg.querySelectorAll(".label")).map((label) => label.textContent);
  here.arrows = all(".plot")[0] ? all(".plot")[0].querySelectorAll(".clipped").length : 0;
  here.labels = all(".plot")[0] ? labels(all(".plot")[0]) : [];
  here.ground = frame.contentWindow.getComputedStyle(root).backgroundColor;
  const button = all("button[data-series]").find((one) => one.dataset.series === PICKED);
  if (button) {
    button.click();
    const first = all(".plot")[0];
    here.alone = Array.from(first.querySelectorAll(".series.lead")).map((one) => one.dataset.name);
    here.pressed = all('button[data-series][aria-pressed="true"]').map((one) => one.dataset.series);
    button.click();
    here.again = Array.from(first.querySelectorAll(".series.lead")).length;
  }
  const names = () => all("#leaderboard [data-board]:not([hidden]) tbody th").map((one) => one.textContent.trim());
  const tabs = all("#leaderboard .tabs button");
  if (tabs.length) {
    here.boards = [all("#leaderboard [data-board]:not([hidden])").length];
    tabs[tabs.length - 1].click();
    here.boards.push(all("#leaderboard [data-board]:not([hidden])").length);
    here.before = names();
    all("#leaderboard [data-board]:not([hidden]) thead button").find((one) => one.dataset.key === "trainings").click();
    here.after = names();
    here.sorted = all("#leaderboard [data-board]:not([hidden]) th[aria-sort]").map((one) => one.textContent.trim());
  }
  const theme = page.getElementById("theme");
  if (theme) { theme.click(); here.other = frame.contentWindow.getComputedStyle(root).backgroundColor; }
  return here;
}
addEventListener("load", () => setTimeout(() => {
  for (const frame of frames) { try { found.push(look(frame)); } catch (error) { errors.push(String(error.stack || error)); } }
  document.body.innerHTML = "";
  document.body.textContent = "FOUND" + JSON.stringify({ found, errors }) + "END";
}, 1500));
"""


def looked(file, folder, *, picked="", widths=WIDTHS):
    """What the browser sees of a page at each width."""
    text = file.read_text(encoding="utf-8")
    watch = "<head><script>window.addEventListener('error', (event) => parent.errors.push(String(event.message)));</script>"
    source, style = escape(text.replace("<head>", watch, 1)), "border: 0; height: 900px; width:"
    frames = "".join(f'<iframe style="{style} {width}px" srcdoc="{source}"></iframe>' for width in widths)
    harness = folder / "harness.html"
    before, after = "var found = [], errors = [];", f"const PICKED = {json.dumps(picked)};{LOOK}"
    page = f"<!doctype html><meta charset=utf-8><body><script>{before}</script>{frames}<script>{after}</script>"
    harness.write_text(page, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--disable-extensions", profile)
    done = subprocess.run([BROWSER, *quiet, "--dump-dom", harness.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    seen = done.stdout.rpartition("FOUND")[2].partition("END")[0]
    result = json.loads(seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not result["errors"]
    return {here["width"]: here for here in result["found"]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Twelve methods in three settings; two of them far below the picture."""
    root, labels = tmp_path_factory.mktemp("run"), {**METHODS}
    for name, trainings in (("bridge", 3), ("conditioned", 1), ("prompted", 7)):
        labels[name] = {"method": {"name": name}, "category": "multi-policy", "share": 0.9 + trainings / 100, "trainings": trainings}
    with pytest.MonkeyPatch.context() as patch:
        for name, spec in labels.items():
            patch.setitem(METHODS, name, spec)
        for rho, label in product((0.8, 0.0, -0.8), labels):
            data = record(label, rho=rho, task_seed=100)
            if label.startswith("expert "):
                low = {"expert 0": -2.29, "expert 1": -1.17}[label]
                data["metrics"]["splits"]["train"] = measured(low * optimum(JUDGED_WM), JUDGED_WM, mixes=False)
            publish(root, data)
    return write_page(load(root), root / "report")


def test_the_report_of_twelve_methods_in_three_settings(page, tmp_path):
    assert page.stat().st_size < 2e6
    for width, here in looked(page, tmp_path, picked="experts parameter").items():
        assert here["scroll"] <= width, f"sideways scrolling at {width} px"
        assert (here["blank"], here["empty"], here["outside"]) == (0, 0, [])
        assert here["plots"] == here["drawn"] == 9
        assert here["arrows"] == 22, "each point below the picture is an arrow"
        assert {"expert objective 0 \u22122.29", "expert objective 1 \u22121.17"} <= set(here["labels"]), "and says its value"
        assert (here["alone"], here["pressed"][0]) == (["experts parameter"], "experts parameter")
        assert here["again"] == 4, "a second click shows those that matter again"
        assert here["boards"] == [1, 1], "one table at a time"
        assert here["before"][0] == here["after"][0] == "the exact optimum"
        assert here["after"][1] == "prompted", "seven trainings, the most"
        assert sorted(here["after"]) == sorted(here["before"])
        assert [head.replace("\u00ad", "") for head in here["sorted"]] == ["trainings"]
        assert {here["ground"], here["other"]} == {"rgb(255, 255, 255)", "rgb(20, 23, 27)"}


def test_the_page_of_a_family(tmp_path):
    from paretune.report.family import write_fitted

    folder = family_in(tmp_path / "run", measured_family([0.2, 0.1, 0.0, -0.1, 0.3]))
    for width, here in looked(write_fitted(folder), tmp_path).items():
        assert here["scroll"] <= width, f"sideways scrolling at {width} px"
        assert (here["blank"], here["empty"], here["outside"]) == (0, 0, [])
        assert here["plots"] == here["drawn"] == 2
