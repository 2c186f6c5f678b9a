"""The verb: what it needs, where it listens, what it prints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from scans_made import nifti

from vclipseg.console import Console
from vclipseg.errors import UsageError
from vclipseg.serve import command


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "NEEDED", ("fastapi", "not_installed_at_all"))
    with pytest.raises(
        UsageError, match=r"needs not_installed_at_all: .*pip install 'vclipseg\[serve\]'"
    ):
        command.run_verb(tmp_path, None, "127.0.0.1", 0, None, 512, Console(quiet=True))


def test_a_port_in_use(runs, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="choose another --port"):
            command.run_verb(runs, None, "127.0.0.1", port, None, 512, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_prints_where_it_is_and_ends_with_ctrl_c(runs, host):
    arguments = ["serve", str(runs), "--host", host, "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "vclipseg.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:
        printed = server.stdout.readline().strip()
        assert ("?token=" in printed) == (host != "127.0.0.1")
        base, _, token = printed.replace("0.0.0.0", "127.0.0.1").partition("/?token=")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = httpx.get(f"{base.rstrip('/')}/api/runs", headers=headers, timeout=60)
        server.send_signal(signal.SIGINT)
    assert answer.status_code == 200
    assert server.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal on Windows")
def test_nothing_is_left_when_the_terminal_is_closed(runs, tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup
        "from vclipseg.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(runs), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path)},
    ) as server:
        base = server.stdout.readline().strip()
        sent = httpx.put(f"{base}datastore/", files={"file": ("a.nii.gz", nifti())}, timeout=60)
        assert sent.status_code == 200
        assert len(list(tmp_path.glob("vclipseg-serve-*/scans/*/sent/*"))) == 1
        server.send_signal(signal.SIGHUP)
        try:
            assert server.wait(30) == 0
        finally:
            server.kill()
    assert list(tmp_path.glob("vclipseg-serve-*")) == []
