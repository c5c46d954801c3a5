"""The `llm` command many times over: each job is one in a child that need not import it again."""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jobs import Job, serve
from llm.cli import cli
from openai import OpenAI


class Command:
    """One run of the command in a forked child."""

    def __init__(self, arguments: Iterable[str], environ: dict[str, str]) -> None:
        self._output, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._output)
            self._run(write_end, arguments, environ)
        os.close(write_end)

    @staticmethod
    def _run(write_end: int, arguments: Iterable[str], environ: dict[str, str]) -> NoReturn:
        status = 1
        try:
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            # `llm` reads a prompt from whatever is no terminal; here there is nothing to read.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            os.environ.update(environ)
            cli.main(list(arguments), prog_name="llm")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def interrupt_after_first_words(self) -> None:
        """Press Ctrl-C as soon as something is to be read."""
        os.read(self._output, 1)
        os.kill(self._pid, signal.SIGINT)

    def wait(self) -> dict[str, Any]:
        """Return what it said and its exit code."""
        with open(self._output, encoding="utf-8") as output:  # noqa: PTH123 - it is a descriptor
            text = output.read()
        _, status = os.waitpid(self._pid, 0)
        return {"text": text.strip(), "exit_code": os.waitstatus_to_exitcode(status)}


def start(job: Job) -> Command:
    return Command(job["arguments"], job.get("environ", {}))


def run(job: Job) -> dict[str, Any]:
    return start(job).wait()


def abort(job: Job) -> dict[str, Any]:
    command = start(job)
    command.interrupt_after_first_words()
    return command.wait()


def parallel(job: Job) -> list[dict[str, Any]]:
    return [command.wait() for command in [start(job) for _ in range(20)]]


if __name__ == "__main__":
    with OpenAI(api_key="none") as unused:
        # Their first use imports them, and each child would do it anew.
        _ = unused.chat.completions, unused.responses, unused.models
    serve({"run": run, "abort": abort, "parallel": parallel}, lambda _: {})
