"""Airflow's ends of a channel, for the programs beside this one, which run in an Airflow venv.

To be imported before anything of Airflow's: it gives Airflow a home in a temporary directory, and
keeps standard output for the results (`show`), because Airflow logs there.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

_home = tempfile.mkdtemp(prefix="proctree-airflow-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(
    AIRFLOW_HOME=_home,
    AIRFLOW__CORE__LOAD_EXAMPLES="false",
    AIRFLOW__LOGGING__LOGGING_LEVEL="CRITICAL",
    PYTHONWARNINGS="ignore",
)
RESULTS = os.fdopen(os.dup(1), "w")
_nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(_nowhere, 1)

import airflow  # noqa: E402
import channel_shapes  # noqa: E402
from airflow.jobs.triggerer_job_runner import TriggerCommsDecoder, TriggerRunner  # noqa: E402
from airflow.sdk.execution_time.comms import (  # noqa: E402
    CommsDecoder,
    GetVariable,
    VariableResult,
)

VERSION = airflow.__version__

__all__ = [
    "RESULTS",
    "VERSION",
    "CommsDecoder",
    "GetVariable",
    "TriggerCommsDecoder",
    "echo",
    "is_answer",
    "show",
    "task_comms",
    "trigger_comms",
]


def show(result: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    RESULTS.write(json.dumps(result) + "\n")
    RESULTS.flush()


def is_answer(answer: object, key: str) -> bool:
    """Whether this is the answer to the request for `key`."""
    return isinstance(answer, VariableResult) and answer.key == key and answer.value == key


@contextmanager
def echo(*arguments: str) -> Iterator[socket.socket]:
    """A channel_echo.py with these arguments, and our end of its channel."""
    _occupy_stdin()
    with channel_shapes.echo(*arguments) as ours:
        yield ours


def task_comms(connection: socket.socket) -> CommsDecoder:
    """What a task has."""
    return CommsDecoder(socket=connection)


@asynccontextmanager
async def trigger_comms(connection: socket.socket) -> AsyncIterator[TriggerCommsDecoder]:
    """What the process of a triggerer has, wired up as it does that itself, over its standard
    input. The other end has to send a StartTriggerer first."""
    os.dup2(connection.fileno(), 0)
    runner = TriggerRunner()
    await runner.init_comms()
    comms = runner.comms_decoder
    try:
        yield comms
    finally:
        # It has two socket objects with one number, either of which would close it some day, when
        # that is the number of something else.
        comms.socket.detach()
        reader = getattr(comms, "_reader_task", None)
        if reader is not None:
            reader.cancel()
        comms._async_writer.close()
        with suppress(OSError):
            await comms._async_writer.wait_closed()


def _occupy_stdin() -> None:
    # A decoder that is done with closes it, and the next file opened would get its number.
    try:
        os.fstat(0)
    except OSError:
        assert os.dup(_nowhere) == 0
