"""nginx, twice: as the upstream that stands in for LiteLLM, and as the reverse proxy to compare."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import canned
from tests.bench.processes import running
from tests.support.service import free_port

# Everything that nginx would otherwise keep under /var, so that it needs no root.
_MAIN = """
worker_processes 1;
daemon off;
pid {home}/nginx.pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_max_body_size 32m;
  client_body_buffer_size 4m;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  {content}
}}
"""

_STATIC = """
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    default_type application/json;
    location = /v1/chat/completions {{
      add_header {cost_header} {cost};
      return 200 '{answer}';
    }}
    location = /model/info {{ return 200 '{models}'; }}
    location = /health/liveliness {{ return 200 '"alive"'; }}
  }}
"""

_PROXY = """
  upstream litellm {{
    server 127.0.0.1:{upstream};
    keepalive 512;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://litellm;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
"""


@contextmanager
def static_upstream(home: Path) -> Generator[tuple[int, int]]:
    """Run the canned LiteLLM; yields its port and pid."""
    port = free_port()
    content = _STATIC.format(
        port=port,
        cost_header=canned.COST_HEADER,
        cost=canned.COST,
        answer=canned.answer().decode(),
        models=canned.models().decode(),
    )
    with _nginx(home / "nginx-static", content, port) as pid:
        yield port, pid


@contextmanager
def reverse_proxy(home: Path, upstream: int) -> Generator[tuple[int, int]]:
    """Run nginx before the upstream at that port; yields its port and pid."""
    port = free_port()
    content = _PROXY.format(port=port, upstream=upstream)
    with _nginx(home / "nginx-proxy", content, port) as pid:
        yield port, pid


@contextmanager
def _nginx(home: Path, content: str, port: int) -> Generator[int]:
    home.mkdir()
    config = home / "nginx.conf"
    config.write_text(_MAIN.format(home=home, content=content))
    log = home / "error.log"
    command = ["nginx", "-e", str(log), "-c", str(config)]
    ready = f"http://127.0.0.1:{port}/health/liveliness"
    with running(command, log=home / "output.log", ready_url=ready) as pid:
        yield pid
