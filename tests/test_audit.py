"""The audit of what is pinned: it fails on an advisory, and says so when it could not be done."""

import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit.py"
HOLE = {"id": "PYSEC-0", "aliases": ["CVE-0"], "fix_versions": ["2.0"], "description": "A made-up one."}
REPORT = {"dependencies": [{"name": "a", "version": "1.0", "vulns": [HOLE]}, {"name": "b", "skip_reason": "unknown"}]}


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_hole_is_a_problem_unless_it_is_allowed(audit):
    problems, notes = audit.judge(REPORT, {})
    (problem,) = problems
    assert "a 1.0 has a known hole, PYSEC-0, CVE-0: A made-up one.; mended in 2.0" in problem
    assert "audit: b was not looked at: unknown" in notes
    problems, notes = audit.judge(REPORT, audit.read_allowed("# why\n\nCVE-0 we never call it\n"))
    assert problems == []
    assert "audit: a: PYSEC-0 is allowed: we never call it" in notes
    assert "GHSA-1 in audit.allow is of no package any more" in str(audit.judge(REPORT, {"GHSA-1": "gone long ago"}))


def test_who_allows_says_why(audit):
    with pytest.raises(ValueError, match="'CVE-0' does not say why"):
        audit.read_allowed("CVE-0\n")
    audit.read_allowed(audit.ALLOWED.read_text())


class _Advisories(BaseHTTPRequestHandler):
    """Speaks OSV's API, and knows of one package with an advisory."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        affected = [{"package": {"name": "click", "ecosystem": "PyPI"}}]
        found = {"vulns": [{"id": "PYSEC-0", "summary": "A made-up one.", "affected": affected}]}
        content = json.dumps(found if asked == "click" else {}).encode()
        content = b"<html>" if self.server.state == "garbled" else content
        self.send_response(503 if asked == "numpy" and self.server.state == "ill" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Advisories)
    server.state = "whole"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_the_script_fails_on_what_a_service_knows(service):
    def run():
        url = f"http://127.0.0.1:{service.server_port}/v1/query"
        done = subprocess.run([sys.executable, SCRIPT, url], capture_output=True, text=True)
        return done.returncode, done.stdout

    code, printed = run()
    assert code == 1, printed
    assert "has a known hole, PYSEC-0: A made-up one." in printed
    assert ", 1 known holes" in printed
    service.state = "garbled"
    code, printed = run()
    assert (code, printed[:23]) == (1, "audit: pip-audit failed"), printed
    service.state = "ill"  # of which half an answer is none
    code, printed = run()
    assert (code, printed[:15]) == (0, "audit: NOT DONE"), printed
    service.server_close()
    code, printed = run()
    assert (code, printed[:15]) == (0, "audit: NOT DONE"), printed
