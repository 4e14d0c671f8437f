"""The live page in a real browser, without a network, in both colour schemes."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from winnow.serve import live

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1100,1100",
)


def browse(url: str, profile: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *options, url]
    # A real second of the page's own clock lets it poll; the answers come from the real server.
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_nothing_on_the_page_comes_from_elsewhere():
    html = live.page()
    assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", html.split("<script>")[0])
    assert re.findall(r'https?://[^"]+', html) == ["http://www.w3.org/2000/svg"]
    assert "innerHTML" not in html  # names come from clients
    assert "default-src 'none'" in live.POLICY


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_what_runs(start, tmp_path):
    server = start(kv_dir=tmp_path / "kv")
    client = server.client(timeout=120)
    body = {"ignore_eos": True, "user": "<img src=x onerror=alert(1)>"}
    client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=4, extra_body=body)
    thread = threading.Thread(
        target=lambda: client.completions.create(
            model="tiny", prompt=[5] * 300, max_tokens=1700, extra_body=body
        )
    )
    thread.start()
    while not server.worker.running():
        time.sleep(0.01)
    page = browse(server.url, tmp_path / "a", "--virtual-time-budget=2500", "--dump-dom")
    thread.join()
    assert '<span id="state" class="">live</span>' in page
    assert "tiny, 2 layers, 2 KV heads" in page
    assert "host/pool (reusable)" in page
    assert re.search(r"beside it, disk/pool: \d+\.\d KiB of 16\.0 GiB", page)
    assert "&lt;img src=x onerror=alert(1)&gt;"[:20] in page
    assert "<img" not in page
    assert re.search(r"<td>(running|finished)</td><td class=\"n\">300</td><td class=\"n\">256</td>", page)
    assert "radix" in page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_both_colour_schemes_are_drawn(start, tmp_path):
    from PIL import Image

    server = start(api_keys=("secret",))
    shades = {}
    for scheme, option in (("light", "0"), ("dark", "1")):
        shot = tmp_path / f"{scheme}.png"
        browse(
            server.url,
            tmp_path / scheme,
            f"--blink-settings=preferredColorScheme={option}",
            "--virtual-time-budget=1500",
            f"--screenshot={shot}",
        )
        shades[scheme] = Image.open(shot).convert("L").getpixel((5, 5))
    assert sorted(shades.values())[0] < 60
    assert sorted(shades.values())[1] > 200
    page = browse(server.url, tmp_path / "c", "--virtual-time-budget=1500", "--dump-dom")
    assert "needs an API key" in page
    assert '<form id="key" class="show">' in page
