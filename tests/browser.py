"""A headless browser for tests of pages: Chromium or Chrome, where one is found.

`visit(html, hash, script)` opens a page and answers what it has become. `script` runs among the page's own,
at the end of it, and so sees its functions; it may await; what it puts into `answer` comes back.
"""

import html as markup
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium (apt-get install chromium) or chrome"
)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--window-size=1400,900",
    "--virtual-time-budget=4000",
)
ANSWER = """
(async () => {
  const answer = {};
  try { %s } catch (error) { answer.error = `${error} ${error.stack}`; }
  document.body.append(make("pre", { id: "answer" }, JSON.stringify(answer)));
})();
"""


@dataclass(frozen=True)
class Visit:
    """A page after its script has run."""

    dom: str
    console: list[str]
    """What the page wrote to the console, errors included."""
    requests: list[str]
    """Addresses that the page asked for, apart from its own file."""
    answer: dict[str, Any]


def visit(html: str, hash: str = "", script: str = "", *options: str) -> Visit:
    """Open `html` at `#hash`."""
    end = html.rindex("})();")
    page = html[:end] + ANSWER % script + html[end:]
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "report.html"), Path(folder, "net.json")
        file.write_text(page)
        folders = [f"--user-data-dir={folder}/user", f"--log-net-log={log}"]
        address = f"{file.as_uri()}#{hash}"
        run = subprocess.run(
            [str(BROWSER), *QUIET, *folders, *options, "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
        )
        asked = _asked(log.read_text())
    console = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'<pre id="answer">(.*?)</pre>', run.stdout, re.DOTALL)
    answer = json.loads(markup.unescape(found[1])) if found else {}
    assert "error" not in answer, answer["error"]
    return Visit(run.stdout, console, asked, answer)


def _asked(log: str) -> list[str]:
    """Addresses that a page asked the network for. The browser's own requests have no origin."""
    found = []
    for line in log.splitlines():
        if '"initiator"' in line:
            params = json.JSONDecoder().raw_decode(line)[0]["params"]
            if params["initiator"] != "not an origin":
                found.append(params["url"])
    return found
