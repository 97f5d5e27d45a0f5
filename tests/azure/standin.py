"""A stand-in for Azure: Resource Manager, Azure ML and an endpoint's scoring route over TLS, with faults on demand.

It keeps models, endpoints and deployments in memory and refuses what Azure refuses. Blob storage is Azurite.
"""

import json
import re
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import mlflow
from azure.storage.blob import BlobServiceClient, generate_container_sas
from no_code import LoadFailed, NoCodeImage

SUBSCRIPTION, GROUP, WORKSPACE = "00000000-1111-2222-3333-444444444444", "rg-test", "ws-test"
PATH = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}"
    f"/providers/Microsoft.MachineLearningServices/workspaces/{WORKSPACE}"
)
TOKEN, KEY = "bearer-token-that-is-secret", "endpoint-key-that-is-secret"
ACCOUNT, ACCOUNT_KEY, CONTAINER = "phi3store", "c2VjcmV0LWtleS1vZi10aGUtc3RhbmQtaW4=", "azureml-container"
NAME = re.compile(r"[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?")
# Seconds between two polls of an asynchronous operation.
POLL = "0.02"


@dataclass
class Fault:
    """An answer that is given in place of the right one, `times` times."""

    method: str
    path: str
    status: int
    code: str
    message: str = "the stand-in was told to"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after: bool = False


class Refused(Exception):
    """An error answer of the service."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class StandIn:
    """The service's state and its server.

    Args:
        certificate: PEM files of certificate and key.
        storage_port: the port on which blob storage is reached.
    """

    def __init__(self, certificate: tuple[Path, Path], storage_port: int):
        self.storage = f"localhost:{storage_port}"
        self._container: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="standin-")
        self.reset()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(str, certificate))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def reset(self) -> None:
        self.models: dict[str, dict[str, dict[str, Any]]] = {}
        self.environments: dict[str, dict[str, dict[str, Any]]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.deployments: dict[str, dict[str, dict[str, Any]]] = {}
        self.operations: dict[str, dict[str, Any]] = {}
        self.served: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []
        self.scored: list[tuple[str, dict[str, Any]]] = []
        self.secrets_given = 0
        self.sas_minutes = [60]
        self.identity_datastore = False
        self.lock = threading.RLock()

    def container(self) -> Any:
        """The datastore's container, with the account's key."""
        if self._container is None:
            url = f"https://{ACCOUNT}.blob.{self.storage}"
            key = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
            self._container = BlobServiceClient(url, credential=key).get_container_client(CONTAINER)
        return self._container

    def made(self, method: str, path: str) -> int:
        """How many calls of that method were made to paths that match."""
        return sum(1 for verb, where in self.calls if verb == method and re.search(path, where))

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, headers: Any) -> tuple[int, Any, dict]:
        with self.lock:
            self.calls.append((method, path))
            fault = self._fault(method, path)
            if fault and not fault.after:
                return _refusal(fault.status, fault.code, fault.message, fault.headers)
            try:
                result = self._route(method, path, query, body, headers)
            except Refused as error:
                return _refusal(error.status, error.code, str(error), {})
            return _refusal(fault.status, fault.code, fault.message, fault.headers) if fault else result

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _route(self, method: str, path: str, query: dict[str, str], body: Any, headers: Any) -> tuple[int, Any, dict]:
        if path == "/msi/token":
            expires = str(int(time.time()) + 3600)
            return 200, {"access_token": TOKEN, "expires_on": expires, "resource": "r", "token_type": "Bearer"}, {}
        if path.startswith("/score/"):
            return self._score(path.removeprefix("/score/"), body, headers)
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if path.startswith("/operations/"):
            return self._operation(path.rpartition("/")[2])
        # Resource Manager takes any case in resource ids.
        found = re.fullmatch(re.escape(PATH) + "(/.*)?", path, re.IGNORECASE)
        if not found:
            raise Refused(404, "ResourceNotFound", f"The Resource '{path}' was not found.")
        parts = [part for part in (found[1] or "").split("/") if part]
        if not parts:
            return 200, {"id": PATH, "name": WORKSPACE, "location": "westeurope", "properties": {}}, {}
        return getattr(self, f"_{parts[0].lower()}")(method, parts[1:], query, body)

    def metadata(self) -> dict[str, str]:
        """The cloud metadata that points azure-ai-ml here."""
        return {
            "azure_portal": self.url,
            "resource_manager": self.url + "/",
            "active_directory": self.url + "/",
            "aml_resource_id": self.url + "/",
            "storage_endpoint": self.storage,
            "registry_discovery_endpoint": self.url + "/",
        }

    def _datastores(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> tuple[int, Any, dict]:
        kind = "None" if self.identity_datastore else "AccountKey"
        store = {
            "id": f"{PATH}/datastores/workspaceblobstore",
            "name": "workspaceblobstore",
            "properties": {
                "datastoreType": "AzureBlob",
                "accountName": ACCOUNT,
                "containerName": CONTAINER,
                "endpoint": self.storage,
                "protocol": "https",
                "isDefault": True,
                "credentials": {"credentialsType": kind},
            },
        }
        if not parts:
            return 200, {"value": [store]}, {}
        if parts[0] != "workspaceblobstore":
            raise Refused(404, "UserError", f"Could not find datastore {parts[0]}")
        if parts[1:] == ["listSecrets"]:
            minutes = self.sas_minutes[min(self.secrets_given, len(self.sas_minutes) - 1)]
            self.secrets_given += 1
            token = generate_container_sas(
                ACCOUNT,
                CONTAINER,
                ACCOUNT_KEY,
                permission="racwdl",
                expiry=datetime.now(UTC) + timedelta(minutes=minutes),
            )
            return 200, {"secretsType": "Sas", "sasToken": token}, {}
        return 200, store, {}

    def _models(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> tuple[int, Any, dict]:
        return self._assets(self.models, "models", method, parts, body)

    def _environments(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> tuple[int, Any, dict]:
        return self._assets(self.environments, "environments", method, parts, body)

    def _assets(self, assets: dict, kind: str, method: str, parts: list[str], body: Any) -> tuple[int, Any, dict]:
        name = parts[0]
        versions = assets.get(name)
        if method == "PUT" and len(parts) == 3:
            old = assets.setdefault(name, {}).get(parts[2])
            uri = body["properties"].get("modelUri")
            if old and old["properties"].get("modelUri") != uri:
                raise Refused(409, "UserError", "Asset paths cannot be updated.")
            if kind == "models" and "." in str(uri).rstrip("/").rpartition("/")[2]:
                raise Refused(400, "UserError", f"{uri} is a file")
            properties = {"flavors": {}, **body["properties"]}
            asset = {"id": f"{PATH}/{kind}/{name}/versions/{parts[2]}", "name": parts[2], "properties": properties}
            assets[name][parts[2]] = asset
            return 201, asset, {}
        if versions is None:
            raise Refused(404, "UserError", f"No {kind} named {name}")
        if len(parts) == 1:
            following = str(max((int(v) for v in versions if v.isdigit()), default=0) + 1)
            return 200, {"id": f"{PATH}/{kind}/{name}", "name": name, "properties": {"nextVersion": following}}, {}
        if len(parts) == 2:
            return 200, {"value": list(reversed(versions.values()))}, {}
        if parts[2] not in versions:
            raise Refused(404, "UserError", f"No {kind} named {name}:{parts[2]}")
        return 200, versions[parts[2]], {}

    def _onlineendpoints(
        self, method: str, parts: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any, dict]:
        name = parts[0]
        if len(parts) > 1 and parts[1] == "deployments":
            return self._deployment(method, name, parts[2:], body)
        if method == "PUT":
            return self._put_endpoint(name, body)
        if name not in self.endpoints:
            raise Refused(404, "ResourceNotFound", f"Endpoint {name} not found")
        if parts[1:] == ["listKeys"]:
            return 200, {"primaryKey": KEY, "secondaryKey": KEY}, {}
        return 200, self.endpoints[name], {}

    def _put_endpoint(self, name: str, body: Any) -> tuple[int, Any, dict]:
        if not 3 <= len(name) <= 32 or not NAME.fullmatch(name):
            raise Refused(400, "BadArgument", f"endpoint name {name}")
        traffic = body["properties"].get("traffic") or {}
        if sum(traffic.values()) not in (0, 100) or set(traffic) - set(self.deployments.get(name, {})):
            raise Refused(400, "BadArgument", f"traffic {traffic}")
        properties = {**body["properties"], "traffic": traffic, "scoringUri": f"{self.url}/score/{name}"}
        document = {"id": f"{PATH}/onlineEndpoints/{name}", "name": name, "location": body["location"]}
        document |= {"kind": body.get("kind"), "tags": body.get("tags") or {}}
        self.endpoints[name] = {**document, "properties": {**properties, "provisioningState": "Succeeded"}}
        return self._begin({**document, "properties": {**properties, "provisioningState": "Updating"}}, None)

    def _deployment(self, method: str, endpoint: str, parts: list[str], body: Any) -> tuple[int, Any, dict]:
        known = self.deployments.setdefault(endpoint, {})
        if not parts:
            return 200, {"value": list(known.values())}, {}
        name = parts[0]
        if parts[1:] == ["getLogs"]:
            return 200, {"content": known.get(name, {}).get("log", "Instance status:\nno log yet")}, {}
        if method != "PUT":
            if name not in known:
                raise Refused(404, "ResourceNotFound", f"Deployment {name} not found")
            return 200, known[name], {}
        problem = self._limits(name, body)
        if problem:
            raise Refused(400, "BadArgument", problem)
        properties = {**body["properties"], "scaleSettings": {"scaleType": "Default"}}
        document = {"id": f"{PATH}/onlineEndpoints/{endpoint}/deployments/{name}", "name": name}
        document |= {key: body.get(key) for key in ("location", "kind", "tags", "sku")}
        failure, log = self._start(endpoint, name, body)
        state = "Failed" if failure else "Succeeded"
        known[name] = {**document, "properties": {**properties, "provisioningState": state}, "log": log}
        return self._begin({**document, "properties": {**properties, "provisioningState": "Updating"}}, failure)

    def _limits(self, name: str, body: Any) -> str | None:
        settings = body["properties"].get("requestSettings") or {}
        seconds = _seconds(settings.get("requestTimeout") or "PT5S")
        if not 3 <= len(name) <= 32 or not NAME.fullmatch(name):
            return f"deployment name {name}"
        if seconds > 180:
            return f"requestTimeout {seconds} s is above 180 s"
        if not 1 <= body["sku"]["capacity"] <= 50:
            return f"capacity {body['sku']['capacity']}"
        return None

    def _start(self, endpoint: str, name: str, body: Any) -> tuple[str | None, str]:
        """Loads the model as the deployment would; the reason why it fails, and its log."""
        properties = body["properties"]
        found = re.search(r"models/([^/]+)/versions/([^/]+)$", properties["model"])
        asset = self.models.get(found[1], {}).get(found[2]) if found else None
        if asset is None:
            return f"model {properties['model']} not found", ""
        folder = self._download(asset["properties"]["modelUri"].partition("/paths/")[2])
        try:
            if properties.get("environmentId"):
                model = mlflow.pyfunc.load_model(str(folder))
                self.served[endpoint, name] = lambda request: _invocations(model, request)
            else:
                self.served[endpoint, name] = NoCodeImage(folder).score
        except LoadFailed as error:
            return "User container has crashed or terminated", f"Worker failed to boot.\n{error}"
        return None, "ready"

    def _download(self, prefix: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        container = self.container()
        for blob in container.list_blobs(name_starts_with=prefix + "/"):
            path = folder / blob.name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(container.download_blob(blob.name).readall())
        return folder

    def _begin(self, document: dict[str, Any], failure: str | None) -> tuple[int, Any, dict]:
        number = str(len(self.operations) + 1)
        self.operations[number] = {"polls": 0, "failure": failure}
        return 201, document, {"Azure-AsyncOperation": f"{self.url}/operations/{number}", "Retry-After": POLL}

    def _operation(self, number: str) -> tuple[int, Any, dict]:
        operation = self.operations[number]
        operation["polls"] += 1
        if operation["polls"] < 2:
            return 200, {"status": "InProgress"}, {"Retry-After": POLL}
        if operation["failure"]:
            return 200, {"status": "Failed", "error": {"code": "BadArgument", "message": operation["failure"]}}, {}
        return 200, {"status": "Succeeded"}, {}

    def _score(self, endpoint: str, body: Any, headers: Any) -> tuple[int, Any, dict]:
        if headers.get("Authorization") != f"Bearer {KEY}":
            raise Refused(401, "key_auth_bad_header", "wrong key")
        traffic = self.endpoints[endpoint]["properties"]["traffic"]
        name = headers.get("azureml-model-deployment") or max(traffic, key=lambda key: traffic[key])
        self.scored.append((name, body))
        try:
            return 200, self.served[endpoint, name](body), {}
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(400, "BadRequest", str(error)) from error


def _invocations(model: Any, request: dict[str, Any]) -> Any:
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    response = TestClient(init(model)).post("/invocations", json=request)
    if response.status_code != 200:
        raise ValueError(response.text)
    return response.json()


def _refusal(status: int, code: str, message: str, headers: dict[str, str]) -> tuple[int, Any, dict]:
    return status, {"error": {"code": code, "message": message}}, headers


def _seconds(duration: str) -> float:
    found = re.fullmatch(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?", duration)
    assert found, duration
    return int(found[1] or 0) * 3600 + int(found[2] or 0) * 60 + float(found[3] or 0)


def _handler(service: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            url = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            body = json.loads(raw) if raw else None
            status, answer, headers = service.answer(self.command, url.path, query, body, self.headers)
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = _any  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Keeps the test output clean."""

    return Handler
