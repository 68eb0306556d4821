"""The page in a real browser: it must draw every plot and reach for nothing."""

import http.server
import re
import shutil
import subprocess
import threading

import pytest

from halfstep import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
]


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a page and returns what the browser made of it."""

    def run(page, *options):
        (tmp_path / "page.html").write_text(page)
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
            "--enable-logging=stderr", "--hide-scrollbars", *options,
            (tmp_path / "page.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console

    return run


@pytest.fixture
def server():
    """A web server on this machine and the list of what was asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_on_a_narrow_screen_every_plot_is_drawn_and_the_console_is_silent(browse, summary):
    probe = "<script>document.title = 'width ' + document.documentElement.scrollWidth</script>"
    page = report.render(summary()).replace("</body>", probe + "</body>")
    dom, console = browse(page, "--dump-dom", "--window-size=500,900")
    # nothing but the table's own box scrolls sideways
    assert "<title>width 500</title>" in dom
    assert console == []
    assert 'data-plots="12"' in dom
    # the plots that hold a drawing, not only a place for one
    drawn = re.findall(r'id="(plot-\d-\d)"[^>]*class="plot js-plotly-plot"', dom) or re.findall(
        r'class="plot js-plotly-plot"[^>]*id="(plot-\d-\d)"', dom
    )
    assert len(set(drawn)) == 12
    assert dom.count('class="main-svg"') >= 12
    assert dom.count('class="point"') > 12  # bars and markers


def test_a_screenshot_is_no_empty_page(browse, summary, tmp_path):
    shot = tmp_path / "page.png"
    browse(report.render(summary()), f"--screenshot={shot}", "--window-size=1200,1600")
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 40_000  # white paper of this size has 8 kB


def test_no_request_is_possible_whatever_is_put_into_the_page(browse, summary, server):
    address, asked = server
    # without Plotly's 5 MB it loads at once; the policy is the same
    page = re.sub(r"(?s)<script>.*</script>", "", report.render(summary()))
    bad = (
        f'<img src="{address}/image"><link rel="stylesheet" href="{address}/style">'
        f'<script src="{address}/script"></script><script>fetch("{address}/fetch")</script>'
    )
    tempted = page.replace("</main>", bad + "</main>")
    browse(tempted, "--dump-dom")
    assert asked == []
    # without the policy the browser does ask, so that this test can fail
    browse(re.sub(r"<meta http-equiv[^>]*>", "", tempted), "--dump-dom")
    assert "/image" in asked


def test_the_page_of_a_run_draws_its_heat_maps(browse, tmp_path):
    from halfstep.core.record import RecordWriter

    path, layers = tmp_path / "run.jsonl", [f"blocks.{place}" for place in range(300)]
    header = {
        "numerics": 1, "library": "torch", "halfstep": "0.1.0", "device": "cpu", "model": "Net",
        "every": 1, "policy": None, "loss_scale": None, "formats": ["float16"],
        "layers": [{"path": path, "class": "Linear", "policy": None, "compute_dtype": None}
                   for path in ["", *layers]],
    }  # fmt: skip
    with RecordWriter(path, "numerics", **header) as record:
        for number, name in enumerate(layers):
            record.write(
                {"event": "tensor", "id": number, "kind": "activation", "path": name, "name": "",
                 "class": "Linear", "dtype": "float32", "shape": [4]}
            )  # fmt: skip
        for step in range(1, 41):
            rows = [{"id": number, "count": 9, "low": number % 30 - 20, "counts": [4, 5]}
                    for number in range(300)]  # fmt: skip
            record.write(
                {"event": "numerics", "step": step, "seconds": 1.0, "loss": 1.0, "scale": 1.0,
                 "skipped": False, "rows": rows, "weight_gradients": None,
                 "activation_gradients": None}
            )  # fmt: skip
    choose = (
        "<script>const s = document.getElementById('layer'); s.value = '25';"
        "s.dispatchEvent(new Event('change'));"
        "document.title = 'rows ' + document.getElementById('overview').data[0].y.length"
        " + ' low ' + document.getElementById('detail').data[0].y[0];</script>"
    )
    page = report.page(path).replace("</body>", choose + "</body>")
    dom, console = browse(page, "--dump-dom", "--window-size=1200,1600")
    assert console == []
    assert 'data-views="1"' in dom
    # what is chosen is what is drawn: layer 25 has exponents from -20 + 25 on
    assert "<title>rows 300 low 5</title>" in dom
