"""MLflow's pages of a small sweep, as a browser shows them.

Screenshots go to the folder that PDIFF_SCREENSHOTS names, if it does.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers import TINY
from playwright.sync_api import expect, sync_playwright

from pdiff_ray.cli import experiments as commands
from pdiff_ray.config import sweep as space
from pdiff_ray.sweeps.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SWEEP = {
    "parameters": {"generator.members": [6, 12], "sampling.sampler": ["ddpm", "ddim"]},
    "repeats": 2,
    "seeds": ["generator.seed", "sampling.seed"],
}
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    storage = tmp_path_factory.mktemp("browser")
    file = storage / "members.yaml"
    content = yaml.safe_dump({"base": str(TINY), "name": "members", "sweep": SWEEP}, sort_keys=False)
    file.write_text(f"# How many members, and which sampler?\n{content}")
    arguments = [str(file), "--storage", str(storage), "--in-process"]
    commands.sweep.main(arguments, standalone_mode=False)
    return Ledger(space.load(file, [f"storage={storage}"]))


@pytest.fixture(scope="module")
def pages(ledger):
    """The links that `pdiff ui` prints, while it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from pdiff_ray.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "ui", "--storage", str(ledger.storage.local), "--port", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    found = {}
    for line in process.stdout:
        if "serving" in line:
            break
        name, *address = line.split()
        found |= {name: address[0]} if address else {}
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait_for(address):
    for _ in range(120):
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.5)
    pytest.fail("MLflow does not come up")


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium; get it with `apt install chromium`")
    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.close()


def visit(page, address):
    page.goto(address)
    page.get_by_role("button", name="Close").first.click()  # the assistant's panel


def picture(page, name):
    if folder := os.environ.get("PDIFF_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / f"{name}.png")


def sees(page, *texts):
    for text in texts:
        expect(page.get_by_text(text).first).to_be_visible(timeout=PATIENCE_MS)


def test_runs_table_has_what_varies_and_what_came_out(page, pages, ledger):
    visit(page, pages["trials"])
    sees(page, "How many members, and which sampler?", "8 matching runs")
    sees(page, "generator.members", "sampling.sampler", "objective", "generated/best_test_accuracy")
    best = ledger.best()
    rows = page.get_by_role("row").filter(has_text="members")
    expect(rows.filter(has_text=f"{best.number:02}").first).to_be_visible()
    picture(page, "mlflow-trials")


def test_charts_are_grouped_by_what_varies(page, pages):
    visit(page, pages["charts"])
    sees(page, "Group by", "Sweep")
    for group in ("generator.members: 6, sampling.sampler: ddpm", "generator.members: 12, sampling.sampler: ddim"):
        expect(page.get_by_text(group).first).to_be_attached(timeout=PATIENCE_MS)
    picture(page, "mlflow-charts")


def test_compare_page_has_parallel_coordinates(page, pages):
    visit(page, pages["compare"])
    sees(page, "Comparing 8 Runs from 1 Experiment", "Parallel Coordinates Plot")
    plot = page.locator(".parcoords").first
    expect(plot).to_be_visible(timeout=PATIENCE_MS)
    names = plot.locator(".axis-title").all_text_contents()
    assert {"generator.members", "sampling.sampler"} <= set(names)
    picture(page, "mlflow-compare")


def test_a_run_has_its_report_and_tables(page, pages):
    visit(page, pages["trials"])
    page.get_by_role("link", name="members 6").first.click()
    sees(page, "Parent run", "Finished")
    page.get_by_role("tab", name="Artifacts").click()
    sees(page, "report.html", "table.csv", "accuracy.png", "networks")
    picture(page, "mlflow-artifacts")


def test_the_sweeps_run_leads_to_its_trials(page, pages):
    visit(page, pages["sweep"])
    sees(page, "Child runs", "Finished", "8 trials")
    page.get_by_role("tab", name="Artifacts").click()
    sees(page, "summary.csv", "similarity.png")
