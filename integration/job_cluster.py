"""Where jobs run that are no local process: a server, by HTTP, in a process of its own. It takes
every submission for a new job, and writes each that took effect into a file.

    POST /TENANT/submit?key=K[&hold=1]   the handle; with hold no answer until the client is gone
    GET  /TENANT/find?key=K              the handle, or 404
    GET  /TENANT/poll?handle=H           "running", "gone", or the exit status
    POST /TENANT/cancel?handle=H
    POST /TENANT/end?status=0            of all jobs of this tenant, and of those to come
"""

from __future__ import annotations

import collections
import http.client
import http.server
import os
import select
import sys
import threading
import urllib.parse

from proctree.durable.jobs import GONE, RUNNING, Job, Polled


class Tenant:
    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, str]] = {}
        self.coming = "running"


class Cluster:
    def __init__(self, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._tenants: dict[str, Tenant] = collections.defaultdict(Tenant)

    def submit(self, tenant: str, key: str) -> str:
        with self._lock:
            jobs = self._tenants[tenant].jobs
            handle = f"{tenant}-{len(jobs)}"
            jobs[handle] = (key, self._tenants[tenant].coming)
            os.write(self._log, f"{tenant} {key} {handle}\n".encode())
            return handle

    def find(self, tenant: str, key: str) -> str | None:
        with self._lock:
            jobs = self._tenants[tenant].jobs
            return next((handle for handle, job in jobs.items() if job[0] == key), None)

    def poll(self, tenant: str, handle: str) -> str:
        with self._lock:
            return self._tenants[tenant].jobs.get(handle, ("", "gone"))[1]

    def cancel(self, tenant: str, handle: str) -> None:
        with self._lock:
            key, status = self._tenants[tenant].jobs[handle]
            if status == "running":
                self._tenants[tenant].jobs[handle] = (key, "-15")

    def end(self, tenant: str, status: str) -> None:
        with self._lock:
            here = self._tenants[tenant]
            here.coming = status
            for handle, (key, _) in here.jobs.items():
                here.jobs[handle] = (key, status)


class Handler(http.server.BaseHTTPRequestHandler):
    cluster: Cluster

    def do_POST(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        _, tenant, word = parts.path.split("/")
        args = dict(urllib.parse.parse_qsl(parts.query))
        hold = args.pop("hold", None)
        answer = getattr(self.cluster, word)(tenant, *args.values())
        if hold:
            select.select([self.connection], [], [])  # readable: the client has gone
            return
        self.send_response(404 if word == "find" and answer is None else 200)
        self.end_headers()
        self.wfile.write((answer or "").encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_args: object) -> None:
        pass


class Client:
    """A tenant of the cluster, and its jobs."""

    def __init__(self, port: int, tenant: str) -> None:
        self.port, self.tenant = port, tenant
        self.hold = False

    def call(self, method: str, word: str, **args: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            query = urllib.parse.urlencode(args)
            connection.request(method, f"/{self.tenant}/{word}?{query}")
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def submit(self, key: str) -> str:
        more = {"hold": "1"} if self.hold else {}
        return self.call("POST", "submit", key=key, **more)[1]

    def find(self, key: str) -> str | None:
        status, handle = self.call("GET", "find", key=key)
        return handle if status == 200 else None

    def poll(self, handle: str) -> Polled:
        status = self.call("GET", "poll", handle=handle)[1]
        return {"running": RUNNING, "gone": GONE}.get(status) or int(status)

    def cancel(self, handle: str) -> None:
        self.call("POST", "cancel", handle=handle)

    def end(self, status: int = 0) -> None:
        self.call("POST", "end", status=str(status))

    def job(self, every: float = 0.05) -> Job:
        return Job(self.submit, self.find, self.poll, self.cancel, name="remote", every=every)


def main() -> None:
    Handler.cluster = Cluster(sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    os.write(1, f"{server.server_port}\n".encode())
    server.serve_forever()


if __name__ == "__main__":
    main()
