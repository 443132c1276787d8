"""`python -m benchmarks.record`: what becomes of requests over three channels, each answer checked.

The loads are those of two of Airflow's bug reports, and what they led to: Airflow's own channel in
the version of the reports and in the one that was rebuilt since (programs/airflow_record.py), and
ours (integration/channel_load.py). It takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import airflow_venvs

PROGRAM = Path(__file__).parent / "programs" / "airflow_record.py"
ROOT = Path(__file__).parents[1]


def airflow(version: str, requests: int) -> Iterator[str]:
    """A line for each shape."""
    command = [airflow_venvs.python(version), str(PROGRAM), "--requests", str(requests)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield _told(json.loads(line))


def _told(result: dict[str, Any]) -> str:
    if result.get("killed"):
        return f"{result['shape']}: had to be killed"
    errors = ", ".join(f"{count} {name}" for name, count in result["errors"].items())
    return (
        f"{result['shape']}: {result['requests']} requests, {result['right']} right, "
        f"{result['wrong']} wrong, {result['cancelled']} cancelled, "
        f"errors: {errors or 'none'}, {result['hung']} hung"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000, help="of ours, in all")
    parser.add_argument("--beside", type=int, default=2000, help="of Airflow's, for each shape")
    arguments = parser.parse_args()
    for version in (airflow_venvs.OLD, airflow_venvs.CURRENT):
        print(f"\nAirflow {version}", flush=True)
        for line in airflow(version, arguments.beside):
            print(line, flush=True)
    print("\nproctree", flush=True)
    load = [sys.executable, "-m", "integration.channel_load"]
    subprocess.run([*load, "--requests", str(arguments.requests)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
