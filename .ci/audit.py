#!/usr/bin/env python3
"""Compares all packages of the environment, those that others bring along too, with published advisories.

Ends with 1 if there is an advisory that `.ci/audit.allow` does not excuse. Where the advisory service cannot be
reached, one line says that the audit was not done, and the script ends with 0.

    .ci/audit.py [URL]     URL: of another service that speaks OSV's API
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / ".ci" / "audit.allow"
PIP_AUDIT = ["uv", "tool", "run", "pip-audit==2.10.1"]
EXPORT = ["uv", "export", "--quiet", "--all-groups", "--no-hashes", "--no-emit-project"]
# What pip-audit and requests end with, in a traceback and with the code of an audit that has found something.
AWAY = re.compile(
    r"(Connection|ConnectTimeout|ReadTimeout|Proxy|SSL|HTTP|Service|NewConnection|NameResolution)\w*(Error)?\b"
)


def main(url: str | None = None) -> int:
    """Returns the exit code."""
    try:
        allowed = read_allowed(ALLOWED.read_text())
    except ValueError as error:
        print(f"{ALLOWED}: {error}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        pinned, found = Path(folder) / "requirements.txt", Path(folder) / "found.json"
        pinned.write_text(subprocess.run(EXPORT, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
        command = [*PIP_AUDIT, "--no-deps", "--disable-pip", "--requirement", str(pinned), "--progress-spinner", "off"]
        where = ["--vulnerability-service", "osv", *(["--osv-url", url] if url else [])]
        done = subprocess.run(
            [*command, *where, "--format", "json", "--output", str(found)], capture_output=True, text=True
        )
        report = json.loads(found.read_text()) if found.exists() else None
    if report is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if not AWAY.search(last):
            print(f"audit: pip-audit failed: {last}")
            return 1
        print(f"audit: NOT DONE, the advisory service cannot be reached ({last[:200]})")
        return 0
    problems, notes = judge(report, allowed)
    print("\n".join([*notes, *problems]))
    return 1 if problems else 0


def read_allowed(text: str) -> dict[str, str]:
    """Returns why an advisory does no harm here, by its name."""
    allowed = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.partition(" ")
            if len(reason.split()) < 3:
                raise ValueError(f"{line!r} does not say why: NAME and a reason, on one line")
            allowed[name] = reason.strip()
    return allowed


def judge(report: dict, allowed: dict[str, str]) -> tuple[list[str], list[str]]:
    """Returns what of pip-audit's report is not allowed, and what else there is to say."""
    problems, notes, used = [], [], set()
    packages = report["dependencies"]
    for package in packages:
        if reason := package.get("skip_reason"):
            notes.append(f"audit: {package['name']} was not looked at: {reason}")
        for hole in package.get("vulns", ()):
            names = [hole["id"], *hole["aliases"]]
            if known := allowed.keys() & names:
                used |= known
                notes.append(f"audit: {package['name']}: {hole['id']} is allowed: {allowed[min(known)]}")
                continue
            mended = ", ".join(hole["fix_versions"]) or "no version yet"
            problems.append(
                f"audit: {package['name']} {package['version']} has a known hole, {', '.join(names)}: "
                f"{hole['description'][:200]}; mended in {mended}. Raise the pin, or say in {ALLOWED.name} why it does "
                "no harm"
            )
    notes += [
        f"audit: {name} in {ALLOWED.name} is of no package any more; remove it"
        for name in sorted(allowed.keys() - used)
    ]
    notes.append(f"audit: {len(packages)} packages compared with published advisories, {len(problems)} known holes")
    return problems, notes


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
