"""The page: in a real browser, and for visitors who ask for what is not theirs."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving_utils import serving
from training_utils import REPOSITORY

from anygpt.chat.chat_model import ChatModel
from anygpt.media.writing import write_audio
from anygpt.serving.engine import Engine
from anygpt.serving.gate import Guard

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 240  # seconds; a browser and a model on a busy machine


@pytest.fixture(scope="module")
def address(tiny_model, tmp_path_factory):
    from anygpt.serving.page import make_app  # here, since gradio takes seconds, and half of the workers never need it

    folder = tmp_path_factory.mktemp("final")
    for one in tiny_model():
        one.save_pretrained(folder)
    engine = Engine(ChatModel(folder))
    with serving(make_app(engine, tmp_path_factory.mktemp("uploads"))) as address:
        yield address
    engine.close()


# ---------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium or chromedriver is not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run", "lang=en"),
        *("disable-domain-reliability", "disable-default-apps", "no-pings", "disable-features=OptimizationHints"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.command_executor.client_config.timeout = PATIENCE
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


def wait(browser, condition, what):
    redrawn = [StaleElementReferenceException]  # an element of an answer that still comes
    return WebDriverWait(browser, PATIENCE, 0.5, ignored_exceptions=redrawn).until(lambda _: condition(), what)


def find(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def bot_says(browser):
    """The texts of the answers, without what stands in for text and media that are still to come, and without the
    times that players show."""
    script = "return [...document.querySelectorAll('#chat .bot.message')].map(element => element.innerText.trim())"
    texts = [re.sub(r"\d+:\d\d", "", text) for text in browser.execute_script(script)]
    return [text for text in texts if text not in ("", "…") and not text.startswith("[")]


def pictures(browser, whose):
    """How many are there and loaded, also those out of sight."""
    script = """
        const images = [...document.querySelectorAll(arguments[0])];
        images.forEach(image => { image.loading = "eager"; });
        return images.filter(image => image.complete && image.naturalWidth).length"""
    return browser.execute_script(script, f"#chat {whose} img")


def resize(browser, width, height):
    """Of the page itself: a window has its own idea of how narrow it may be."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wait(browser, lambda: browser.execute_script("return window.innerWidth") == width, f"it is not {width} wide")


def rectangle(browser, selector):
    script = "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.left, r.right]"
    return browser.execute_script(script, selector)


def fits(browser):
    """Nothing is to be scrolled to sideways, and the box to write in takes most of the page."""
    left, right = rectangle(browser, "#message")
    width = browser.execute_script("return window.innerWidth")
    inside = browser.execute_script("return document.documentElement.scrollWidth") <= width
    return inside and left >= 0 and right <= width and right - left > min(0.75 * width, 900)


def stops(browser):
    """The buttons to stop an answer, while one comes."""
    return [b for b in find(browser, "#message button.stop-button") if b.is_displayed()]


def say(browser, text, files=()):
    wait(browser, lambda: not stops(browser), "the answer before does not end")
    box = wait(browser, lambda: (find(browser, "#message textarea") or [None])[0], "no box to write in")
    if files:  # at once: a second choice adds to the first
        find(browser, "#message input[type=file]")[0].send_keys("\n".join(map(str, files)))
        there = lambda: len(find(browser, "#message .thumbnail-item")) >= len(files)  # noqa: E731
        wait(browser, there, f"not uploaded: {files}")
    box.send_keys(text)
    box.send_keys(Keys.ENTER)


def click(browser, selector, what):
    """Click the first, as soon as it is there and the page does not move."""
    wait(browser, lambda: any(clicked(element) for element in find(browser, selector)[:1]), what)


def clicked(element):
    """Click an element; false while the page still moves."""
    try:
        element.click()
    except (ElementClickInterceptedException, ElementNotInteractableException):
        return False
    return True


def shot(browser, folder, name):
    """Kept where pytest keeps its files, for people to look at."""
    browser.save_screenshot(str(folder / f"{name}.png"))


@pytest.mark.timeout(6 * PATIENCE)
def test_a_conversation_in_a_browser(browser, address, media, tmp_path):
    browser.get(address)
    wait(browser, lambda: find(browser, "#message textarea"), "the page did not come")
    resize(browser, 1280, 900)
    wait(browser, lambda: fits(browser), "the page is not as wide as it should be")
    shot(browser, tmp_path, "wide-empty")

    click(browser, "button.toggle-button", "no button of the settings")
    click(browser, "#require input[type=checkbox]", "the settings did not open")  # the answer must contain an image
    click(browser, "#decoder-image button", "no settings of a decoder")
    steps = wait(browser, lambda: find(browser, "#steps-image input[type=number]"), "no slider of steps")[0]
    wait(browser, steps.is_displayed, "the decoder's settings did not open")
    steps.send_keys(Keys.CONTROL, "a")
    steps.send_keys("3", Keys.TAB)
    beside = lambda: rectangle(browser, "#message")[1] <= rectangle(browser, ".sidebar")[0]  # noqa: E731
    wait(browser, beside, "the settings hide the box to write in")
    shot(browser, tmp_path, "wide-settings")
    click(browser, "button.toggle-button", "no button of the settings")
    wait(browser, lambda: fits(browser), "the settings did not close")

    say(browser, "Draw a red ring.")
    wait(browser, lambda: pictures(browser, ".bot") == 1, "no picture came")
    wait(browser, lambda: bot_says(browser), "no text came")
    shot(browser, tmp_path, "wide-answer")

    write_audio(tmp_path / "sound.wav", media.audio(0), 16_000)
    media.image(0).save(tmp_path / "picture.png")
    say(browser, "And these?", [tmp_path / "picture.png", tmp_path / "sound.wav"])
    wait(browser, lambda: pictures(browser, ".bot") == 2, "no second picture came")
    wait(browser, lambda: pictures(browser, ".user") == 1, "the uploaded picture is not shown")
    wait(browser, lambda: find(browser, "#chat .user [data-testid='waveform-Audio']"), "the sound is not shown")
    shot(browser, tmp_path, "wide-uploads")

    resize(browser, 390, 850)
    wait(browser, lambda: fits(browser), "the page does not fit a narrow screen")
    shot(browser, tmp_path, "narrow")

    (tmp_path / "broken.png").write_bytes(b"no picture")
    say(browser, "What is it?", [tmp_path / "broken.png"])
    wait(browser, lambda: any("broken.png cannot be read as an image" in t for t in bot_says(browser)), "no sentence")
    assert not any(str(tmp_path.parent) in text for text in bot_says(browser)), "a path of the server"
    wait(browser, lambda: fits(browser), "the page does not fit a narrow screen")
    shot(browser, tmp_path, "narrow-error")

    assert len(bot_says(browser)) > 1

    requested = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requested if m["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((address, "data:", "blob:", "about:", "chrome"))]
    assert urls and not elsewhere, f"the page asks others: {elsewhere}"


@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_what_a_visitor_expects(browser, address, tmp_path):
    """An example is sent by a click; it can be stopped while it runs; clips play and loop."""
    browser.get(address)
    resize(browser, 1280, 900)
    wait(browser, lambda: find(browser, "#message textarea"), "the page did not come")
    next(b for b in find(browser, "button") if b.text == "New conversation").click()
    wait(browser, lambda: not bot_says(browser), "an earlier test's conversation is still there")
    assert not stops(browser), "there is nothing to stop"

    click(browser, "button.toggle-button", "no button of the settings")
    boxes = wait(browser, lambda: find(browser, "#require input[type=checkbox]"), "no settings")
    for box in boxes[:2]:  # an image and a video
        wait(browser, lambda box=box: clicked(box), "the settings did not open")
    for key in ("image", "video"):
        click(browser, f"#decoder-{key} button", "no settings of a decoder")
        steps = wait(browser, lambda k=key: find(browser, f"#steps-{k} input[type=number]"), "no slider")[0]
        wait(browser, steps.is_displayed, "the decoder's settings did not open")
        steps.send_keys(Keys.CONTROL, "a")
        steps.send_keys("99", Keys.TAB)
    click(browser, "button.toggle-button", "no button of the settings")

    next(e for e in find(browser, "button") if e.text == "Draw a red ring.").click()
    wait(browser, lambda: stops(browser), "no button to stop what runs")
    wait(browser, lambda: pictures(browser, ".bot") >= 1 and find(browser, "#chat .bot video"), "no picture and clip")
    wait(browser, lambda: not stops(browser), "the stop button stays")
    assert find(browser, "#chat .bot img")[0].get_attribute("alt") == "generated image"
    video = find(browser, "#chat .bot video")[0]
    assert video.get_attribute("loop") and video.get_attribute("autoplay")
    wait(browser, lambda: not browser.execute_script("return arguments[0].paused", video), "the clip does not play")

    users = lambda: [e.text for e in find(browser, "#chat .user.message")]  # noqa: E731
    next(e for e in find(browser, "button") if e.text == "Draw a red ring.").click()
    wait(browser, lambda: stops(browser), "no button to stop what runs")[0].click()
    wait(browser, lambda: not stops(browser), "the stop button does not stop")
    time.sleep(1)
    assert not stops(browser) and len(users()) == 2 and pictures(browser, ".bot") == 1, "it goes on"

    typed = "<b>no</b> <img src=x onerror=alert(1)> &amp; *a* 'b'"
    say(browser, typed)
    wait(browser, lambda: pictures(browser, ".bot") == len(find(browser, "#chat .bot video")) == 2, "no second answer")
    wait(browser, lambda: not stops(browser), "the stop button stays")
    assert users()[-1].endswith(typed) and not find(browser, "#chat .user b, #chat .user img")
    before = users(), bot_says(browser), pictures(browser, ".bot")
    browser.refresh()
    wait(browser, lambda: (users(), bot_says(browser), pictures(browser, ".bot")) == before, "the chat is lost")
    next(b for b in find(browser, "button") if b.text == "New conversation").click()
    wait(browser, lambda: not bot_says(browser), "the conversation is not forgotten")


# ---------------------------------------------------------------------------------------- hostile visitors


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file=../../../../etc/passwd",
        "file=%2e%2e/%2e%2e/etc/passwd",
        "file=/srv/../etc/passwd",
        "file=/proc/self/environ",
        "file=pyproject.toml",
        "file=scripts/demo.py",
        "file=https://example.com/",
        "file=http://127.0.0.1:1/",
        "file=file:///etc/passwd",
        "file=",
        "proxy=https://example.com/",
        "stream/../../etc/passwd",
        "deep_link?session_hash=a",
    ],
)
def test_no_file_of_the_server_is_readable(address, path):
    for prefix in ("", "/gradio_api"):
        answer = httpx.get(f"{address}{prefix}/{path}", timeout=PATIENCE)
        assert answer.status_code in (400, 403, 404), answer.text
        assert b"root:" not in answer.content and b"[project]" not in answer.content


def png(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_only_what_was_uploaded_can_be_read_and_named(address, tmp_path):
    """Uploads come back to who knows their path; an event that names another file is refused."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    up = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", picture.getvalue())}, timeout=PATIENCE)
    (path,) = up.json()
    assert httpx.get(f"{address}/gradio_api/file={path}", timeout=PATIENCE).content == picture.getvalue()
    assert httpx.get(f"{address}/gradio_api/file/{path}", timeout=PATIENCE).status_code == 404  # gradio's older route
    assert httpx.get(f"{address}/gradio_api/file={path}/../../../../etc/passwd", timeout=PATIENCE).status_code == 403
    config = httpx.get(f"{address}/config", timeout=PATIENCE).json()
    (submit,) = (d["id"] for d in config["dependencies"] if any(t[1] == "submit" for t in d["targets"]))
    for named in ("/etc/passwd", f"{path}/../../../../../../etc/passwd", "http://127.0.0.1:1/a.png", 7):
        file = {"path": named, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [{"text": "a", "files": [file]}], "fn_index": submit, "session_hash": "abc"}
        for route in ("queue/join", "run/predict", "api/predict"):
            answer = httpx.post(f"{address}/gradio_api/{route}", json=event, timeout=PATIENCE)
            assert answer.status_code in (400, 404), (named, answer.text)


def test_crafted_events_write_no_traceback(address, capfd, caplog):
    """What the page itself would never send: an answer of a few words at most, and one line in the log."""
    config = httpx.get(f"{address}/config", timeout=PATIENCE).json()
    submit = next(d for d in config["dependencies"] if any(t[1] == "submit" for t in d["targets"]))
    count = len(submit["inputs"])
    datas = [[], [None] * count, [7] * count, [{"text": "a", "files": [1]}, *[None] * (count - 1)]]
    bodies = [{"data": data, "fn_index": submit["id"]} for data in datas]
    bodies += [
        {"data": [], "fn_index": 999},
        {"data": [], "fn_index": -1},
        {"data": []},
        {"data": [], "api_name": "/a"},
    ]
    for number, body in enumerate(bodies):
        body["session_hash"] = f"crafted{number}"
        for route in ("queue/join", "run/predict", "call/answer"):
            answer = httpx.post(f"{address}/gradio_api/{route}", json=body, timeout=PATIENCE)
            assert "Traceback" not in answer.text, (body, answer.text)
    time.sleep(2)  # the queue works in the background
    written = "".join(capfd.readouterr())
    assert "Traceback" not in written and "Traceback" not in caplog.text


def test_too_much_is_refused(address):
    big = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("a.png", b"0" * (17 * 1024**2))}, timeout=PATIENCE
    )
    assert big.status_code == 413
    join = f"{address}/gradio_api/queue/join"
    assert httpx.post(join, content=b" " * 300_000, timeout=PATIENCE).status_code == 413
    assert httpx.post(join, content=iter([b" " * 300_000]), timeout=PATIENCE).status_code == 413
    deep = httpx.post(join, content=b"[" * 100_000, timeout=PATIENCE)
    assert deep.status_code == 400 and "nested too deeply" in deep.text


def test_the_page_names_no_other_site(address):
    answer = httpx.get(address, timeout=PATIENCE)
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "googleapis" not in answer.text and "cdnjs" not in answer.text
    config = httpx.get(f"{address}/config", timeout=PATIENCE).json()
    assert config["analytics_enabled"] is False
    assert not any("fonts.g" in sheet for sheet in config.get("stylesheets", []))


def test_uploads_are_those_inside_the_folder(tmp_path):
    guard = Guard(None, tmp_path)
    (tmp_path / "in").write_text("a")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert guard._uploaded(str(tmp_path / "in"))
    for path in (str(tmp_path), str(tmp_path) + "2/a", str(tmp_path / "link"), str(tmp_path / ".." / "a"), "a\0b", ""):
        assert not guard._uploaded(path)


# ---------------------------------------------------------------------------------------- the process


def test_foreign_pages_are_refused(address):
    port = urlparse(address).port
    for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "https://evil.example"}):
        for path in ("/", "/config", "/gradio_api/info"):
            answer = httpx.get(f"{address}{path}", headers=headers, timeout=PATIENCE)
            assert answer.status_code == 403 and "allow" in answer.json()["detail"]
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert httpx.get(address, headers=own, timeout=PATIENCE).is_success


def test_sigterm_removes_uploads(tiny_model, tmp_path):
    """Those of the page's own folder in the system's temporary one."""
    for one in tiny_model():
        one.save_pretrained(tmp_path / "final")
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "scripts/demo.py", "--checkpoint", str(tmp_path / "final"), "--port", "0"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        try:
            address = next(line for line in demo.stdout if line.startswith("Open ")).split()[-1]
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    picture = png(Image.new("RGB", (8, 8)))
                    up = httpx.post(
                        f"{address}/gradio_api/upload", files={"files": ("a.png", picture)}, timeout=PATIENCE
                    )
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            assert Path(up.json()[0]).is_file() and str(temporary) in up.json()[0]
            demo.terminate()
            assert demo.wait(PATIENCE) == 128 + signal.SIGTERM
            assert not list(temporary.glob("anygpt-demo-*"))
        finally:
            demo.kill()
