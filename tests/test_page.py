"""The chat page in a real browser, against a server that says what it is told to: what it shows, sends, and never does.

Run: pytest tests/test_page.py (needs chromium and chromedriver: apt-get install chromium chromium-driver)
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import chromium, reached, requested
from scripted_server import ScriptedServer, running
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.remote.webelement import WebElement
from starlette.applications import Starlette
from starlette.testclient import TestClient

from phi3_mlflow.serve.page import routes

MARKDOWN = """# Capitals

Spain's is **Madrid**, *not* `Lisbon`:
it says so in [a book](https://example.invalid/book "title").

1. one
2. two
   - deep

- [x] done

> quoted

| country | capital |
|---|--:|
| Spain | Madrid |

```python
print("<Madrid>")

print(2)
```

Last &amp; least, a\\*b.
"""


class Page:
    """The page in the browser, as a user has it: what stands on it, and what can be done there."""

    def __init__(self, driver: Chrome, server: ScriptedServer):
        self.driver = driver
        self.server = server

    def open(self) -> None:
        self.driver.get(self.server.address)
        self.wait(lambda: self.all("#model option") or self.shown("#key-dialog") or self.shown("#notice"))

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not in {seconds} s; the page says: {self.find('body').text!r}"
            time.sleep(0.02)
        return value

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def shown(self, selector: str) -> bool:
        return any(element.is_displayed() for element in self.all(selector))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def send(self, text: str) -> None:
        self.find("#message").send_keys(text + Keys.ENTER)

    def idle(self) -> bool:
        return not self.run("return document.body.classList.contains('answering')")

    def ask(self, text: str = "Hello?", *pieces: str, **how: Any) -> None:
        """Sends a message and waits for its answer's end."""
        self.server.will_say(*(pieces or ("Hello.",)), **how)
        asked = len(self.all(".assistant"))
        self.send(text)
        self.wait(lambda: len(self.all(".assistant")) == asked + 1 and self.idle())

    def set(self, **options: str) -> None:
        self.find("#open-settings").click()
        for name, value in options.items():
            field = self.find(f"#options [name={name}]")
            self.run("arguments[0].value = ''", field)
            field.send_keys(value)
        self.find("#options .primary").click()

    def focused(self) -> str:
        """What a screen reader would say of the element that has the focus."""
        return self.driver.switch_to.active_element.accessible_name


def messages(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer(routes(), models=["first", "second"])) as server:
        yield server


@pytest.fixture
def page(driver: Chrome, server: ScriptedServer) -> Iterator[Page]:
    """The page, open. After each test: it has asked for nothing elsewhere, and neither script nor policy complained."""
    requested(driver)
    page = Page(driver, server)
    page.open()
    yield page
    outside = [url for url in requested(driver) if not url.startswith(f"{server.address}/")]
    assert not outside
    complaints = [entry["message"] for entry in driver.get_log("browser") if entry["source"] != "network"]
    assert not complaints
    page.run("sessionStorage.clear(); localStorage.clear()")  # a port may come again
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- the files


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=routes()))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/page/page.js", "text/javascript; charset=utf-8"),
        ("/page/vendor/marked.js", "text/javascript; charset=utf-8"),
        ("/page/vendor/marked.LICENSE.txt", "text/plain; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_each_file_comes_with_its_type_and_a_policy_that_allows_nothing_from_elsewhere(client, path, kind):
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not any(word in " ".join(policy.values()) for word in ("unsafe", "*", "http", "data:"))
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_file_that_has_not_changed_is_not_sent_again(client):
    first = client.get("/page/page.js")
    again = client.get("/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert client.get("/page/page.js", headers={"If-None-Match": '"other"'}).content == first.content


def test_only_the_pages_own_files_are_there(client):
    for path in ("/page/", "/page/page.py", "/page/../page.py", "/page/%2e%2e/page.py", "/page/index.html"):
        assert client.get(path).status_code == 404, path


# ---- answers


def test_an_answer_is_shown_while_it_comes_and_as_markdown(page):
    page.server.will_say("# Cap", "itals\n\n", *[f"word{i} " for i in range(200)], delay=0.02)
    page.send("Talk.")
    page.wait(lambda: "word3 " in page.text(".answer p"))
    assert page.text(".answer h3") == "Capitals"
    assert not page.idle()
    page.find("#stop").click()
    page.wait(page.idle)

    page.ask("Again.", *MARKDOWN)
    last = ".assistant:last-child "
    assert page.text(last + "h3") == "Capitals"
    assert page.text(last + "strong") == "Madrid"
    assert page.text(last + "p code") == "Lisbon"
    assert page.text(last + "ol > li ul > li") == "deep"
    assert page.text(last + "blockquote") == "quoted"
    assert [cell.text for cell in page.all(last + "td")] == ["Spain", "Madrid"]
    assert page.text(last + ".code code") == 'print("<Madrid>")\n\nprint(2)'
    assert page.text(last + ".language") == "python"
    assert page.text(last + ".answer > p:last-child") == "Last & least, a*b."


def test_what_is_built_piece_by_piece_equals_what_is_built_at_once(page):
    texts = [
        MARKDOWN,
        "- a\n\n- b\n\n  c\n\n1. x\n\n2. y\n\n2",
        "a\r\nb\r\n\r\n```\r\nc\r\n\r\n\r\nd\r\n```\r\ne",
        "Title\n===\n\ntext\n---\n\n    code\n\n\n    more\n\n***\n",
        "~~~~\n```\n~~~~\n<div>\n\n*a*\n\n</div>\n\n|a|\n|-|\n|b|\n\nc|d",
        "**never closed `nor this [or](this\n\n> a\nb\n> c\n\n![",
    ]
    differing = page.driver.execute_async_script(
        """
        const [texts, done] = arguments;
        import("/page/markdown.js").then(({ Markdown }) => {
          const code = (text, language) => {
            const node = document.createElement("pre");
            node.textContent = `${language}:${text}`;
            return node;
          };
          const built = (steps) => {
            const markdown = new Markdown(document.createElement("div"), code);
            for (const text of steps) markdown.update(text);
            return markdown.element.innerHTML;
          };
          done(texts.filter((text) => built([text]) !== built([...text].map((_, index) => text.slice(0, index + 1)))));
        });
        """,
        texts,
    )
    assert differing == []


def test_the_buttons_copy_the_code_and_the_answer(page):
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    answer = "Look:\n\n```sh\nls -l\n```\n"
    page.ask("How?", answer)
    for selector, text in ((".copy-code", "ls -l"), (".assistant .copy", answer), (".user .copy", "How?")):
        page.find(selector).click()
        read = "navigator.clipboard.readText().then(arguments[0])"
        page.wait(lambda text=text, read=read: page.driver.execute_async_script(read) == text)
    assert page.text("#status") == "Copied"


def test_copying_works_where_the_browser_gives_pages_no_clipboard(page):
    page.ask("How?", "So.")
    page.run("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.run("document.addEventListener('copy', () => { window.copied = getSelection().toString() })")
    page.find(".assistant .copy").click()
    page.wait(lambda: page.run("return window.copied") == "So.")
    assert "Copy answer" in page.focused()


@pytest.mark.parametrize("way", ["button", "Esc"])
def test_stopping_ends_the_servers_work_and_keeps_what_was_said(page, way):
    page.server.will_say("One ", *["more "] * 1000, delay=0.02)
    page.send("Count.")
    page.wait(lambda: "One more" in page.text(".answer"))
    if way == "button":
        page.find("#stop").click()
    else:
        page.press(Keys.ESCAPE)
    assert page.server.closed.wait(60)
    page.wait(page.idle)
    assert "stopped" in page.text(".stats")
    kept = page.text(".answer")
    page.ask("Go on.")
    assert messages(page.server.requests[-1])[1] == ("assistant", kept)


def test_retry_asks_again_without_the_answer_that_was(page):
    page.ask("Hello?", "Bad.")
    page.server.will_say("Good.")
    page.find(".retry").click()
    page.wait(lambda: page.text(".answer") == "Good." and page.idle())
    assert messages(page.server.requests[-1]) == [("user", "Hello?")]
    assert len(page.all(".turn")) == 2


def test_an_edited_message_is_sent_anew_and_what_followed_it_is_dropped(page):
    page.ask("What is the capitol of Spain?", "A building.")
    page.ask("No.", "Yes.")
    page.find(".user .edit").click()
    field = page.driver.switch_to.active_element
    assert field.get_property("value") == "What is the capitol of Spain?"
    page.server.will_say("Madrid.")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("What is the capital of Spain?", Keys.ENTER)
    page.wait(lambda: page.text(".answer") == "Madrid." and page.idle())
    assert messages(page.server.requests[-1]) == [("user", "What is the capital of Spain?")]
    assert [turn.text for turn in page.all(".said")] == ["What is the capital of Spain?"]


def test_an_edit_that_is_given_up_changes_nothing(page):
    page.ask("Hello?")
    page.find(".user .edit").click()
    page.press("x", Keys.ESCAPE)
    assert page.text(".said") == "Hello?"
    assert page.focused() == "Edit message"
    assert len(page.all(".turn")) == 2


def test_a_request_carries_the_conversation_the_system_message_and_the_options_that_are_set(page):
    page.ask("Hello?", "Hi.")
    assert page.server.requests[0] == {
        "model": "first",
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.set(system="Be brief.", temperature="0.5", max_tokens="64", top_k="40", min_p="0.05", seed="-7", stop="a b\nc")
    page.ask("And?")
    request = page.server.requests[1]
    assert messages(request) == [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hi."), ("user", "And?")]
    chosen = {name: request[name] for name in ("temperature", "max_tokens", "top_k", "min_p", "seed", "stop")}
    assert chosen == {
        "temperature": 0.5,
        "max_tokens": 64,
        "top_k": 40,
        "min_p": 0.05,
        "seed": -7,
        "stop": ["a b", "c"],
    }
    assert request.keys() - chosen.keys() == {"model", "messages", "stream", "stream_options"}


def test_an_option_that_cannot_be_sent_is_shown_and_the_message_stays(page):
    page.set(temperature="3")
    assert page.shown("#settings")  # it is not closed over a wrong value
    page.press(Keys.ESCAPE)
    page.send("Hello?")
    page.wait(lambda: page.shown("#settings"))
    assert page.server.requests == []
    page.press(Keys.ESCAPE)
    assert page.find("#message").get_property("value") == "Hello?"


def test_the_chosen_model_is_asked_and_remembered(page):
    page.find("#model option:nth-child(2)").click()
    page.ask("Hello?")
    assert page.server.requests[0]["model"] == "second"
    assert page.text(".who") == "second"
    page.open()
    assert page.find("#model").get_property("value") == "second"


def test_each_answer_has_its_usage_and_speed(page):
    page.ask("Hello?", *["word "] * 20, delay=0.02)
    facts = page.text(".stats").replace("\u00a0", " ").split(" · ")
    assert facts[0] == "prompt 14 (8 cached), answer 21 tokens"
    assert 5 < float(facts[1].removesuffix(" tokens/s")) < 60
    assert facts[2].startswith("first after 0.")


def test_an_answer_that_was_cut_says_so(page):
    page.ask("Hello?", "An", finish_reason="length")
    assert "cut at its token limit" in page.text(".stats").replace("\u00a0", " ")


def test_events_may_end_their_lines_as_they_like(page):
    page.ask("Hello?", "Grüße, ", "世界 😀.", newline="\r\n")
    assert page.text(".answer") == "Grüße, 世界 😀."


def test_the_conversation_outlives_a_reload_and_ends_with_a_new_chat(page):
    page.ask("Hello?", "**Hi.**")
    page.open()
    assert page.text(".answer strong") == "Hi."
    page.ask("And?")
    assert len(page.server.requests[-1]["messages"]) == 3
    page.find("#new").click()
    page.wait(lambda: page.shown("#welcome"))
    page.open()
    assert page.all(".turn") == []
    page.ask("Hello?")
    assert len(page.server.requests[-1]["messages"]) == 1


def test_a_new_chat_in_the_middle_of_an_answer_ends_both(page):
    page.server.will_say(*["word "] * 1000, delay=0.02)
    page.send("Talk.")
    page.wait(lambda: "word" in page.text(".answer"))
    page.find("#new").click()
    assert page.server.closed.wait(60)
    page.wait(lambda: page.idle() and not page.all(".turn"))


# ---- what goes wrong


def test_a_refusal_is_shown_in_the_servers_words_and_can_be_tried_again(page):
    page.ask("Hello?", status=429, error="The queue is full.", headers={"Retry-After": "7"})
    assert page.text(".assistant .problem") == "The queue is full. (Try again in 7 s.)"
    page.server.will_say("Here I am.")
    page.find(".retry").click()
    page.wait(lambda: page.text(".answer") == "Here I am.")
    assert messages(page.server.requests[-1]) == [("user", "Hello?")]
    assert not page.shown(".assistant .problem")


def test_an_error_in_mid_stream_keeps_what_was_said(page):
    page.ask("Hello?", "Half an ", "answer", error="The decoder failed.")
    assert page.text(".answer") == "Half an answer"
    assert page.text(".assistant .problem") == "The decoder failed."


def test_a_stream_that_breaks_off_is_not_taken_for_an_answer(page):
    page.ask("Hello?", "Half an ", "answer", cut=True)
    assert page.text(".answer") == "Half an answer"
    assert page.text(".assistant .problem") == "The connection was lost before the answer ended."


def test_a_server_that_is_gone_is_told_from_one_that_refuses(driver):
    with running(ScriptedServer(routes())) as server:
        page = Page(driver, server)
        page.open()
    page.send("Hello?")
    page.wait(page.idle)
    page.wait(lambda: page.text(".assistant .problem") == "The server cannot be reached.")
    driver.get_log("browser")


def test_a_list_of_models_that_does_not_come_can_be_asked_for_again(page):
    page.server.key = "k"
    page.open()
    page.press(Keys.ESCAPE)
    assert "The list of models did not come." in page.text("#notice")
    page.server.key = None
    page.find("#reload").click()
    page.wait(lambda: page.all("#model option") and not page.shown("#notice"))


# ---- the key


def test_a_server_with_a_key_is_asked_for_it_once_and_the_tab_alone_keeps_it(page):
    page.server.key = "secret"
    page.server.will_say("Welcome.")
    page.send("Hello?")
    page.wait(lambda: page.shown("#key-dialog"))
    assert page.focused() == "Key"
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: page.text("#refused") == "The server refused this key." and page.shown("#key-dialog"))
    page.find("#key").send_keys(Keys.CONTROL, "a")
    page.press(Keys.NULL, "secret", Keys.ENTER)
    page.wait(lambda: page.text(".answer") == "Welcome." and page.idle())
    assert page.server.keys[-1] == "Bearer secret"
    assert len(page.all(".turn")) == 2
    page.open()
    assert not page.shown("#key-dialog")
    assert "secret" in page.run("return JSON.stringify(sessionStorage)")
    assert "secret" not in page.run("return JSON.stringify(localStorage) + document.cookie")
    page.find("#open-settings").click()
    page.find("#open-key").click()
    page.press(Keys.DELETE, Keys.ENTER)  # what there is is selected
    page.wait(lambda: page.shown("#key-dialog"))  # forgotten, so that the list of models asks for it
    assert "secret" not in page.run("return JSON.stringify(sessionStorage)")


# ---- thumbs


def test_an_answer_with_a_trace_can_be_rated(page):
    page.ask("Hello?", "Hi.")
    assert not page.shown(".good")
    page.ask("And?", "Ho.", trace="tr-1")
    page.find(".assistant:last-child .bad").click()
    page.wait(lambda: page.find(".assistant:last-child .bad").get_attribute("aria-pressed") == "true")
    assert page.server.feedback == [{"trace_id": "tr-1", "value": False}]
    page.find(".assistant:last-child .good").click()
    page.wait(lambda: page.find(".assistant:last-child .good").get_attribute("aria-pressed") == "true")
    assert page.find(".assistant:last-child .bad").get_attribute("aria-pressed") == "false"
    assert page.server.feedback[1:] == [{"trace_id": "tr-1", "value": True}]


def test_a_rating_that_is_not_taken_is_not_shown_as_given(page):
    page.ask("Hello?", "Hi.", trace="tr-1")
    page.server.feedback_status = 503
    page.find(".good").click()
    page.wait(lambda: page.text("#status") == "The feedback was not taken: The tracking server is away.")
    assert page.find(".good").get_attribute("aria-pressed") == "false"


# ---- looks, keys and phones


def test_light_and_dark_follow_the_system_until_one_is_chosen(page):
    def light() -> bool:
        colour = page.run("return getComputedStyle(document.body).backgroundColor")
        return int(colour.split("(")[1].split(",")[0]) > 128

    def system(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    system("dark")
    assert not light()
    system("light")
    assert light()
    page.find("#theme").click()
    system("dark")
    assert light()
    page.find("#theme").click()
    system("light")
    assert not light()
    page.open()
    assert not light()
    page.find("#theme").click()
    assert light()


def test_everything_can_be_reached_and_done_with_the_keyboard_alone(page):
    assert page.focused() == "Message"
    page.server.will_say("Hi.", trace="tr-1")
    page.press("Hello,")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.press("who is there?", Keys.ENTER)
    page.wait(lambda: page.text(".answer") == "Hi." and page.idle())
    assert messages(page.server.requests[0]) == [("user", "Hello,\nwho is there?")]
    assert page.focused() == "Message"
    passed = []
    while "Message" not in passed and len(passed) < 30:
        page.press(Keys.TAB)
        if name := page.focused():  # none: the browser's own controls
            passed.append(name)
            assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid", name
    assert passed == [
        "Send",
        "Model",
        "New chat",
        "Theme: system",
        "Settings",
        "Conversation",
        "Edit message",
        "Copy message",
        "Copy answer",
        "Retry",
        "Good answer",
        "Bad answer",
        "Message",
    ]
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB * 3).key_up(Keys.SHIFT).perform()
    assert page.focused() == "Retry"
    page.server.will_say("Hi again.")
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".answer") == "Hi again." and page.idle())
    page.find("#open-settings").send_keys(Keys.ENTER)
    assert page.shown("#settings")
    page.press(Keys.ESCAPE)
    assert not page.shown("#settings")
    assert page.focused() == "Settings"


def test_every_control_has_a_name_and_what_happens_is_announced(page):
    page.ask("Hello?", "```\nx\n```", trace="tr-1")
    controls = "button, input, select, textarea, a, [tabindex]"
    page.run("for (const dialog of document.querySelectorAll('dialog')) dialog.show()")
    nameless = [
        element.get_attribute("outerHTML")
        for element in page.all(controls)
        if element.is_displayed() and element.tag_name not in ("pre",) and not element.accessible_name
    ]
    assert nameless == []
    assert page.find("#log").get_attribute("role") == "log"
    assert page.find(".assistant").get_attribute("aria-busy") == "false"
    assert page.text("#status") == "Answer finished"


def test_an_answer_that_comes_is_followed_until_somebody_scrolls_back(page):
    def left() -> float:
        return page.run(
            "const s = document.getElementById('scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight"
        )

    page.server.will_say(*["a line\n\n"] * 400, delay=0.01)
    page.send("Talk.")
    page.wait(lambda: page.run("return document.getElementById('scroller').scrollTop") > 500)
    page.wait(lambda: left() < 5)
    origin = ScrollOrigin.from_element(page.find("#scroller"))
    ActionChains(page.driver).scroll_from_origin(origin, 0, -300).perform()
    page.wait(lambda: page.shown("#jump"))
    where = page.run("return document.getElementById('scroller').scrollTop")
    page.wait(page.idle)
    assert page.run("return document.getElementById('scroller').scrollTop") == where
    page.find("#jump").click()
    page.wait(lambda: left() < 5 and not page.shown("#jump"))


WIDE = (
    "x" * 5000
    + "\n\n```\n"
    + "y" * 5000
    + "\n```\n\n|"
    + "long heading|" * 40
    + "\n|"
    + "-|" * 40
    + "\n\n"
    + "`z" * 3000
)


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_is_never_wider_than_the_screen(page, width):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 700, "deviceScaleFactor": 2, "mobile": width < 500},
    )
    page.server.models = ["a-model-with-quite-a-long-name@champion" * 3]
    page.open()
    page.ask("u" * 300, WIDE)
    page.ask("Hello?", status=400, error="e" * 3000)
    too_wide = """
        return [...document.querySelectorAll("header *, main, #log, .turn, .said, .answer > *, .problem, footer *")]
          .filter((node) => node.checkVisibility() && !node.matches(".hidden"))
          .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
          .map((node) => node.outerHTML.slice(0, 100))
    """
    assert page.run(too_wide) == []
    assert page.run("return document.getElementById('scroller').scrollWidth <= innerWidth")
    page.find("#open-settings").click()
    assert page.run("return document.getElementById('settings').scrollWidth <= innerWidth")
    page.find("#options .title button").click()


# ---- hostile answers

PROBES = "window.hacked = true"
HOSTILE = {
    "image": f'<img src=x onerror="{PROBES}">',
    "script": f"<script>{PROBES}</script>\n\n<script src='https://evil.invalid/x.js'></script>",
    "svg": f'<svg onload="{PROBES}"><a xlink:href="javascript:{PROBES}"><text>x</text></a></svg>',
    "frame": f'<iframe srcdoc="<script>parent.hacked=true</script>" src="javascript:{PROBES}"></iframe>',
    "style": "<style>@import 'https://evil.invalid/x.css'; p { background: url(https://evil.invalid/x.png) }</style>",
    "links": f"[a](javascript:{PROBES}) [b](JaVaScRiPt:{PROBES}) [c](&#106;avascript:{PROBES}) "
    f"[d](java\tscript:{PROBES}) "
    f"[e](data:text/html,<script>{PROBES}</script>) [f](vbscript:x) [g](file:///etc/passwd) [h](//evil.invalid) "
    f"<javascript:{PROBES}> [i](<javascript:{PROBES}>) [j](blob:x) [k]( javascript:{PROBES})",
    "reference": f'[a][1] ![b][1] [c][2]\n\n[1]: javascript:{PROBES}\n[2]: https://evil.invalid/ "><img src=x>"',
    "images": "![a](https://evil.invalid/a.png) ![b](//evil.invalid/b.png) ![c](/v1/models) "
    "[![d](https://evil.invalid/d.png)](https://evil.invalid/) ![e](data:image/svg+xml,<svg/onload=alert(1)>)",
    "language": f'```"><img src=x onerror={PROBES}>\ncode\n```\n\n```<script>{PROBES}</script>\n```',
    "quote": f"> <b onmouseover={PROBES}>x</b>\n\n| <i onclick={PROBES}>a</i> |\n|-|\n| <img src=x onerror={PROBES}> |",
    "entities": f"&lt;img src=x onerror={PROBES}&gt; &#60;script&#62; &#x3c;script&#x3e; &#0; &#99999999; &#xd800;",
    "template": f"${{{PROBES}}} {{{{constructor.constructor('{PROBES}')()}}}} <%= x %>",
    "form": '<form action="https://evil.invalid"><input name=a autofocus><button>x</button></form><base href="https://evil.invalid/">',
    "meta": '<meta http-equiv="refresh" content="0; url=https://evil.invalid/"><link rel=stylesheet href=https://evil.invalid/>',
    "nulls": "a\u0000b\u202eevil\u2066 \ufeff\ud83d",
    "comment": f"<!-- --><img src=x onerror={PROBES}> --> <![CDATA[<script>{PROBES}</script>]]>",
    "clobber": '<img name=getElementById><a id=log></a><form id=composer name=body></form><a id="message">',
}
ALLOWED = {"A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H3", "H4", "H5", "H6", "HR", "LI", "OL"}
ALLOWED |= {"P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL", "svg", "use"}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_model_says_is_only_ever_text(page, name):
    text = HOSTILE[name]
    page.ask("Attack.", *[text[i : i + 3] for i in range(0, len(text), 3)])
    page.open()  # drawn again from what was kept
    assert set(page.run("return [...document.querySelectorAll('.answer *')].map((node) => node.tagName)")) <= ALLOWED
    attributes = page.run(
        "return [...document.querySelectorAll('.answer *')].flatMap((node) => node.getAttributeNames())"
    )
    assert not [attribute for attribute in attributes if attribute.startswith("on") or attribute in ("src", "srcdoc")]
    for address in page.run("return [...document.querySelectorAll('.answer a')].map((node) => node.href)"):
        assert address.startswith(("https://evil.invalid/", "mailto:")), address
    for link in page.all(".answer a"):
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert page.run("return window.hacked") is None
    page.ask("Still there?", "Yes.")
    assert page.text(".assistant:last-child .answer") == "Yes."


def test_nor_are_errors_names_and_what_the_user_says_anything_else(page):
    attack = HOSTILE["image"]
    page.server.models = [attack]
    page.open()
    assert page.text("#model option") == attack
    page.ask(attack, status=400, error=attack)
    assert page.text(".said") == attack
    assert page.text(".who") == attack
    assert page.text(".assistant .problem") == attack
    assert page.run("return document.images.length") == 1  # its own
    assert page.run("return window.hacked") is None


def test_a_link_says_where_it_leads_and_its_host_is_looked_up_no_sooner_than_it_is_pressed(tmp_path):
    with running(ScriptedServer(routes())) as server, chromium(tmp_path) as driver:
        page = Page(driver, server)
        page.open()
        page.ask(
            "Links.",
            "[your bank](https://evil.invalid/?all=that) ![i](https://evil.invalid/i.png) https://evil.invalid",
        )
        link = page.find(".answer a")
        assert link.get_attribute("title") == "https://evil.invalid/?all=that"
        assert link.get_attribute("target") == "_blank"
        ActionChains(driver).move_to_element(link).pause(1).perform()
    assert reached(tmp_path / "net.json") == {"127.0.0.1"}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 1_000_000, id="a million letters"),
        pytest.param("```\n" + "a line of code\n" * 66_000, id="a million characters of code"),
        pytest.param("- item *a* `b` [c](https://d.invalid)\n" * 25_000, id="a million characters in a list"),
        pytest.param("> " * 500_000, id="half a million quotes"),
        pytest.param("1. * " * 20_000, id="40,000 lists"),
        pytest.param("a*b_" * 50_000, id="100,000 marks"),
        pytest.param("para *a* `b`\n\n" * 10_000, id="10,000 paragraphs"),
    ],
)
def test_a_very_long_answer_neither_stops_the_page_nor_gets_lost(page, text):
    page.run(
        "window.longest = 0; new PerformanceObserver((list) => list.getEntries().forEach((task) => {"
        " longest = Math.max(longest, task.duration) })).observe({ type: 'longtask' })"
    )
    page.server.will_say(*[text[i : i + 2000] for i in range(0, len(text), 2000)], delay=0.002)
    page.send("Talk.")
    page.wait(
        lambda: page.run("return document.querySelector('.assistant')?.getAttribute('aria-busy')") == "false", 120
    )
    assert page.run("return longest") < 10_000  # milliseconds in which the page did not answer
    shown = page.run("return document.querySelector('.answer').textContent")
    assert len(shown) > 0.25 * len(text)  # the rest is Markdown's marks
    page.ask("Still there?", "Yes.")
    assert page.text(".assistant:last-child .answer") == "Yes."


def test_a_line_that_is_no_json_is_an_error_and_no_answer(page):
    page.run(
        "const real = fetch; window.fetch = (...a) => a[0].startsWith('v1/chat')"
        " ? Promise.resolve(new Response('data: {oops\\n\\n')) : real(...a)"
    )
    page.send("Hello?")
    page.wait(lambda: page.text(".assistant .problem") == "The server sent something that is not JSON.")
