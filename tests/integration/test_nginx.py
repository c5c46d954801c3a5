"""The load balancer's configuration, read by the real nginx."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.service import ROOT, free_port


def test_nginx_takes_the_configuration_for_the_replicas(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx (Debian: apt-get install nginx-light)")
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    # The names are those of the composed services, which nobody here knows.
    for replica in ("tallygate-a", "tallygate-b"):
        assert f"server {replica}:4000" in text
        text = text.replace(f"server {replica}:", "server 127.0.0.1:")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{free_port()};")
    path = tmp_path / "nginx.conf"
    path.write_text(f"pid {tmp_path}/nginx.pid;\n{text}")
    done = subprocess.run(
        [nginx, "-t", "-p", tmp_path, "-e", "stderr", "-c", path],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
