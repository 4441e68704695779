"""MLflow's pages of a small sweep, as a browser shows them.

Screenshots go to the folder that PDIFF_SCREENSHOTS names, if it does.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
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
    options = ["--storage", str(storage), "--in-process"]
    commands.sweep.main([str(file), *options], standalone_mode=False)
    for seed in range(2):
        alone = ["--set", "name=alone", "--set", f"sampling.seed={seed}"]
        commands.sweep.main([str(TINY), *options, *alone], standalone_mode=False)
    return Ledger(space.load(file, [f"storage={storage}"]))


@pytest.fixture(scope="module")
def pages(ledger):
    """The links that `pdiff ui` prints, by experiment, while it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from pdiff_ray.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "ui", "--storage", str(ledger.storage.local), "--port", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    found = {}
    for line in process.stdout:
        if "serving" in line:
            break
        name, *address = line.split()
        if address and address[0].startswith("http"):
            found[list(found)[-1]][name] = address[0]
        elif not address:
            found[name] = {}
    try:
        yield found
    finally:
        process.terminate()
        process.wait()


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
    page.goto("about:blank")  # else only the part behind the `#` changes
    page.goto(address)
    page.add_locator_handler(
        page.get_by_role("button", name="Close").first, lambda button: button.click()
    )  # an assistant


def picture(page, name):
    if folder := os.environ.get("PDIFF_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / f"{name}.png")


def sees(page, *texts):
    for text in texts:
        expect(page.get_by_text(text).first).to_be_visible(timeout=PATIENCE_MS)


def test_trials_of_a_sweep_are_sorted_by_the_objective(page, pages, ledger):
    visit(page, pages["members"]["trials"])
    sees(page, "How many members, and which sampler?", "8 matching runs", "Sort: objective")
    runs = page.get_by_role("link").filter(has_text=re.compile(r"^\d\d members"))
    expect(runs).to_have_count(8, timeout=PATIENCE_MS)
    numbers = [int(name[:2]) for name in runs.all_text_contents()]
    objectives = [ledger.trials[number].objective for number in numbers]
    assert objectives == sorted(objectives, reverse=True)


def test_charts_of_a_sweep_are_those_of_its_trials(page, pages):
    visit(page, pages["members"]["charts"])
    sees(page, "8 matching runs", "accuracy/generated")
    expect(page.get_by_placeholder("Search metric charts")).to_be_visible()
    picture(page, "mlflow-charts")


def test_compare_page_has_parallel_coordinates(page, pages):
    visit(page, pages["members"]["compare"])
    sees(page, "Comparing 8 Runs from 1 Experiment", "Parallel Coordinates Plot")
    plot = page.locator(".parcoords").first
    expect(plot).to_be_visible(timeout=PATIENCE_MS)
    names = plot.locator(".axis-title").all_text_contents()
    assert {"generator.members", "sampling.sampler"} <= set(names)
    picture(page, "mlflow-compare")


def test_a_run_has_its_report_and_tables(page, pages):
    visit(page, pages["members"]["trials"])
    page.get_by_role("link", name="members 6").first.click()
    sees(page, "Parent run", "Finished")
    page.get_by_role("tab", name="Artifacts").click()
    sees(page, "report.html", "table.csv", "accuracy.png", "networks")
    picture(page, "mlflow-artifacts")


def test_the_sweeps_run_leads_to_its_trials(page, pages):
    visit(page, pages["members"]["sweep"])
    sees(page, "Child runs", "Finished", "8 trials")
    page.get_by_role("tab", name="Artifacts").click()
    sees(page, "summary.csv", "similarity.png")


def test_all_trials_of_an_experiment_are_listed(page, pages):
    visit(page, pages["members"]["all"])
    sees(page, "8 matching runs", "Sort: generated/best_test_accuracy")


def test_an_experiment_without_a_sweep_has_pages_too(page, pages):
    links = pages["alone"]
    visit(page, links["latest"])
    sees(page, "Finished", "generated/best_test_accuracy", "ensemble")
    visit(page, links["trials"])
    sees(page, "2 matching runs", "Sort: generated/best_test_accuracy")
    visit(page, links["charts"])
    sees(page, "2 matching runs", "accuracy/generated")
    visit(page, links["compare"])
    sees(page, "Comparing 2 Runs from 1 Experiment")


def test_data_sets_and_models_have_their_places(page, pages):
    latest = pages["alone"]["latest"]
    visit(page, latest)
    sees(page, "Datasets", "digits (", "System metrics")
    visit(page, re.sub(r"/runs/[^?]*", "/models", latest))
    sees(page, "generated-", "base-", "Ready")
