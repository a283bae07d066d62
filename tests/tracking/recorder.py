"""A server that speaks as much of MLflow's REST interface as a run needs, and keeps all that it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit


class Recorder:
    """The runs of one experiment, and every request as text: its line, its headers and its body.

    Args:
        folder: for the artifacts, which clients write there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.port = 0

    def answer(self, call: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Do what a call asks for; returns the answer."""
        if call == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}}
        if call == "runs/create":
            return {"run": self._create(fields)}
        if call == "runs/search":
            return {"runs": [run for run in self.runs.values() if run["info"]["run_id"] in self._children(fields)]}
        run = self.runs[fields["run_id"]]
        if call == "runs/get":
            return {"run": run}
        if call == "runs/update":
            run["info"].update({key: value for key, value in fields.items() if key != "run_uuid"})
            return {"run_info": run["info"]}
        new = fields if call == "runs/log-batch" else {}
        if call == "runs/set-tag":
            new = {"tags": [fields]}
        for kind, entries in new.items():
            if kind in run["data"]:
                run["data"][kind] += entries
        return {}

    def _create(self, fields: dict[str, Any]) -> dict[str, Any]:
        run_id = f"{len(self.runs) + 1:032x}"
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": "RUNNING"}
        info |= {"lifecycle_stage": "active", "artifact_uri": f"file://{self.folder}/{run_id}"}
        info |= {"start_time": fields["start_time"], "run_name": fields["run_name"]}
        data: dict[str, list[Any]] = {"tags": list(fields["tags"]), "params": [], "metrics": []}
        self.runs[run_id] = {"info": info, "data": data, "inputs": {}}
        return self.runs[run_id]

    def _children(self, fields: dict[str, Any]) -> list[str]:
        tag = {"key": "mlflow.parentRunId", "value": fields["filter"].split("'")[1]}
        return [run_id for run_id, run in self.runs.items() if tag in run["data"]["tags"]]


@contextmanager
def recording(folder: Path) -> Iterator[Recorder]:
    """Serve a `Recorder` on a free port of this machine."""
    recorder = Recorder(folder)

    class Handler(BaseHTTPRequestHandler):
        """Passes requests on."""

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            recorder.requests.append(f"{self.requestline}\n{self.headers}\n{body}")
            address = urlsplit(self.path)
            call = address.path.partition("/mlflow/")[2]
            fields = {**dict(parse_qsl(address.query)), **(json.loads(body) if body else {})}
            try:
                status, answer = 200, recorder.answer(call, fields)
            except KeyError:
                status, answer = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": call}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = _handle

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
