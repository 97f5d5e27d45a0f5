"""A headless Chromium for the tests: Debian's, with no way to any host but this one, and a log of what it asks for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-features=AutofillServerCommunication",  # it asks Google about the shape of every page's forms
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,860",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser with its profile and its log of the network, `net.json`, in the folder; the log is whole at its end."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.fail(f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"] or ""
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    try:
        driver.set_script_timeout(60)
        driver.get("about:blank")  # leaves the browser's own start page
        yield driver
    finally:
        driver.quit()


def requested(driver: webdriver.Chrome) -> list[str]:
    """The addresses that the page has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


def reached(net_log: Path) -> set[str]:
    """The hosts that the browser wanted to reach or to look up on behalf of pages from this machine.

    A host that is not to be resolved shows as `~notfound`, the name that it is mapped to.
    """
    log = json.loads(net_log.read_text())
    names = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    found = set()
    for event in log["events"]:
        params = event.get("params", {})
        origin = params.get("network_isolation_key", "") + params.get("network_anonymization_key", "")
        address = {"URL_REQUEST_START_JOB": "url", "HOST_RESOLVER_MANAGER_REQUEST": "host"}.get(names[event["type"]])
        if address in params and "127.0.0.1" in origin:
            found.add(urlsplit(params[address]).hostname or params[address])
    return found
