"""The playground in a browser, where Gradio, Playwright and a browser are: it loads from its own host, and everything on it answers."""

from __future__ import annotations

import base64
import itertools
import shutil
import threading

import httpx2 as httpx
import pytest

pytest.importorskip("gradio")

from paretune.report.playground import mount
from paretune.serve.app import _listening, _Told, default_preference, make_app
from paretune.serve.engine import Engine
from paretune.serve.protocol import Served
from serving import Letters, spoken_family
from test_family_page import family_in, measured

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
KEY = "key-of-this-test"


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Two servers of one family: one open to all, with something measured, and one that has a key, without a task."""
    import uvicorn

    family, made, running = spoken_family(), {}, []
    folder = family_in(tmp_path_factory.mktemp("run"), measured([0.2, 0.1, 0.0, -0.1, 0.3]))
    task = Letters("hello", "where is parcel 7?", objectives=family.objectives)
    for name, key, scored, folders in (("open", None, task, {"family": folder}), ("closed", KEY, None, {})):
        served = Served("family", family, default_preference(family, None), task=scored)
        app = make_app({"family": served}, Engine({"family": family}), key=key)
        mount(app, folders)
        listening, ready = _listening("127.0.0.1", 0), threading.Event()
        server = _Told(uvicorn.Config(app, log_level="error"), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        made[name] = f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.append((server, thread, listening))
    yield made
    for server, thread, listening in running:
        server.should_exit = True
        thread.join(30)
        listening.close()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no browser")
    with sync.sync_playwright() as play:
        made = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, urls):
    """The page, opened; that nothing was asked of another host, and no script failed, is seen at its end."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    made, asked, errors = context.new_page(), [], []
    made.on("request", lambda request: asked.append(request.url))
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(f"{urls['open']}/playground/")
    made.wait_for_selector(".pt-slider input", timeout=60_000)
    yield made
    made.wait_for_timeout(200)
    context.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((urls["open"], "data:", "blob:"))] == []
    assert errors == []


def numbers(page):
    return [float(each.input_value()) for each in page.locator(".pt-slider input[type=range]").all()]


def cards(page):
    return page.locator(".pt-card .pt-said").all_inner_texts()


def until(page, test):
    """Wait until something holds."""
    for _ in range(300):
        if test():
            return
        page.wait_for_timeout(100)
    raise AssertionError((numbers(page), page.locator(".pt-card, .toast-body").all_inner_texts()))


def ask(page, text="where is parcel 7?"):
    page.fill(".pt-prompt textarea", text)
    page.get_by_role("button", name="Answer", exact=True).click()
    until(page, lambda: page.locator(".pt-card .pt-note").count() == 3)  # all three are cut at their longest length


def test_answers_are_those_of_sample_and_follow_the_sliders(page):
    """With the keyboard alone, from one slider: the other gives way, and all answers are the family's own there."""
    ask(page)

    def said(w):
        return family.sample([[{"role": "user", "content": "where is parcel 7?"}]], w, temperature=0)[0][0]

    family = spoken_family()
    assert said([0.5, 0.5]) != said([0.8, 0.2]), "else the test says nothing"
    before = cards(page)
    assert len(set(before)) == 3
    assert before[0].strip() == said([0.5, 0.5]).strip()
    page.locator(".pt-slider input[type=range]").first.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    until(page, lambda: page.locator(".pt-card h3").first.inner_text().endswith("polite 0.80, brief 0.20"))
    until(page, lambda: page.locator(".pt-card .pt-note").count() == 3)
    assert numbers(page) == [0.8, 0.2]
    after = cards(page)
    assert after[0].strip() == said([0.8, 0.2]).strip() != before[0].strip()
    assert after[1:] == before[1:]
    assert page.locator(".pt-picture svg").count() == 1, "what was measured"
    assert "you" in page.locator(".pt-picture").inner_text()
    page.get_by_role("button", name="Color the tokens").click()
    until(page, lambda: page.locator(".pt-key").count() == 2)
    assert page.locator(".pt-card:first-child .pt-said span").count() == 16, "as many tokens as were drawn"
    assert "polite" in page.locator(".pt-card .pt-said span").first.get_attribute("title")


def test_sliders_stay_on_the_simplex(page):
    slider = page.locator(".pt-slider input[type=range]").last
    box = slider.bounding_box()
    for share in (0.9, 0.0, 1.0, 0.33):
        page.mouse.click(box["x"] + box["width"] * (0.005 + 0.99 * share), box["y"] + box["height"] / 2)
        page.wait_for_timeout(150)
        until(page, lambda: round(sum(numbers(page)), 6) == 1)
        assert numbers(page)[1] == pytest.approx(share, abs=0.03)


def test_questions_end_in_a_preference_that_the_sliders_take(page):
    """Answered with the keyboard, until no more is asked."""
    page.get_by_role("tab", name="Ten questions").click()
    page.get_by_role("button", name="Begin").press("Enter")
    for number in itertools.count(1):
        until(page, lambda number=number: f"Question {number} " in head(page) or "Your preference" in head(page))
        if "Your preference" in head(page):
            break
        page.get_by_role("button", name=("Left is better", "No difference", "Right is better")[number % 3]).press("Enter")
    assert 2 <= number <= 11
    paste = page.locator(".pt-paste textarea, .pt-paste input").input_value()
    found = [float(part.partition("=")[2]) for part in paste.removeprefix("--preference ").split(",")]
    assert sum(found) == pytest.approx(1)
    assert page.locator(".pt-table tr").count() == 2
    page.get_by_role("button", name="Set the sliders to it").press("Enter")
    until(page, lambda: numbers(page) == found)


def head(page):
    return " ".join(page.locator(".pt-question h3").all_inner_texts())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_the_dark(browser, urls, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(f"{urls['open']}/playground/")
    page.wait_for_selector(".pt-slider input", timeout=60_000)
    ask(page)
    for tab in ("Answers", "Ten questions"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.get_by_role("tab", name="Answers").click()
    bright = page.evaluate(
        """() => [".pt-said", ".pt-card"].map((name, k) => {
            const style = getComputedStyle(document.querySelector(name));
            const found = (k ? style.backgroundColor : style.color).match(/[0-9.]+/g).map(Number);
            return (0.2126 * found[0] + 0.7152 * found[1] + 0.0722 * found[2]) / 255;
        })"""
    )
    assert (bright[0] - bright[1] > 0.6) if scheme == "dark" else (bright[1] - bright[0] > 0.6), bright
    context.close()


def test_with_a_key_nothing_is_seen_without_it_and_what_the_page_does_not_need_is_never_there(urls):
    def get(path, password=None, **more):
        headers = {} if password is None else {"authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}
        return httpx.get(f"{urls['closed']}/playground/{path}", headers=headers | more, timeout=60)

    paths = ("", "config", "theme.css", "gradio_api/info", "gradio_api/queue/data?session_hash=a", "static/img/logo.svg", "no")
    for path in paths:
        for password in (None, "", "another key", KEY + "x"):
            assert get(path, password).status_code == 401, (path, password)
        assert get(path, authorization=f"Bearer {KEY}").status_code == 401
    assert get("").headers["www-authenticate"].startswith("Basic")
    whole = get("", KEY)
    assert whole.status_code == 200
    assert "Serve it with --recipe" in get("config", KEY).text
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/upload", "gradio_api/proxy=https://example.com/", "login", "monitoring"):
        assert get(path, KEY).status_code == 404, path
    sent = httpx.post(f"{urls['open']}/playground/gradio_api/queue/join", content=b" " * (5 * 2**20), timeout=60)
    assert sent.status_code == 413
    assert httpx.post(f"{urls['open']}/playground/gradio_api/upload", files={"files": b"x"}, timeout=60).status_code == 404
