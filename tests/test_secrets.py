"""No message, file or run has the passwords and tokens of URIs."""

import pytest
from helpers import TINY
from test_cli import pdiff

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hidden@host:1/x", "http://host:1/x"),
        ("http://me:hid@den@host", "http://host"),
        ("postgresql://me:hid/den@host/db", "postgresql://host/db"),
        ("at 'http://host/x?token=hidden': refused", "at 'http://host/x': refused"),
        ("url: /?token=hidden/api (refused)", "url: / (refused)"),
        ("s3://key:hidden@bucket/a@b?scheme=http&x=hidden", "s3://bucket/a@b"),
        ("s3:/key:hidden@bucket", "s3:/bucket"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////a/me@host/x.db", "sqlite:////a/me@host/x.db"),
        ("no such field; did you mean 'x'?", "no such field; did you mean 'x'?"),
    ],
)
def test_uris_lose_users_and_queries_alone(text, shown):
    assert without_secrets(text) == shown
    assert str(PdiffError(text)) == shown


ENVIRONMENT = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN"
)  # fmt: skip


def test_a_sweep_leaves_no_secret_anywhere(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, f"hidden-{name}")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"base: {TINY}\nname: tiny\nsweep: {{parameters: {{generator.members: [4, 12]}}}}\n")
    storage, uri = tmp_path / "storage", "http://me:hidden@127.0.0.1:1/?token=hidden"
    said = pdiff("sweep", file, "--storage", storage, "--tracking-uri", uri, "--in-process")
    said += pdiff("log", file, "--storage", storage, "--tracking-uri", uri, code=1)
    assert "127.0.0.1:1" in said
    assert "hidden" not in said
    written = [path for path in storage.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if b"hidden" in path.read_bytes()] == []
