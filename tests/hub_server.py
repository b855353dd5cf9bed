"""A real HTTP server that speaks the part of the Hub's API that releases use, on this machine, with faults on request.

Large files lie on another host name than the API, as the Hub's do, and get no token there. A commit is one step: its
files are all there afterwards, or none.
"""

import base64
import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Fault:
    """What goes wrong when a request matches.

    Attributes:
        method, path: regular expressions that must match from the start.
        status: to answer with; None cuts the connection when half of the body was read.
        times: how often; the request is served normally afterwards.
        headers: of the answer.
        served: do what was asked, and only answer wrongly.
    """

    method: str
    path: str
    status: int | None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    served: bool = False
    message: str = "injected"


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is a large one."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def git_sha1(self) -> str:
        return sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.git_sha1


@dataclass
class Repo:
    """A repository: its commits, each with all its files, newest last."""

    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, Blob] | None:
        """The files of a commit, or of the newest."""
        if revision == "main":
            return self.commits[-1][1]
        return next((files for commit, files in self.commits if commit == revision), None)

    def commit(self, files: dict[str, Blob]) -> str:
        """Add a commit and return its name."""
        self.commits.append((secrets.token_hex(20), files))
        return self.commits[-1][0]


class HubServer(ThreadingHTTPServer):
    """The server and what it knows.

    Attributes:
        users: token -> name of who may write to the repositories of that name.
        repos: owner/name -> repository.
        stored: SHA-256 -> large files that were uploaded, named by a commit or not.
        faults: what is still to go wrong.
        requests: (method, path) of all that came in.
        tokens_elsewhere: tokens that were sent where large files lie; there must be none.
        part_bytes: uploads of more are asked for in parts of so much.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens_elsewhere: list[str] = []
        self.part_bytes: int | None = None
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where large files lie."""
        return f"http://localhost:{self.server_port}"

    def make(self, repo: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        """A repository as the Hub makes it, with some files."""
        self.repos[repo] = made = Repo(private)
        content = {".gitattributes": ATTRIBUTES, **(files or {})}
        made.commit({name: Blob(data, name.endswith(LARGE)) for name, data in content.items()})
        return made

    def asked(self, method: str, path: str) -> int:
        """How many requests of a kind came in."""
        return sum(found == method and re.match(path, at) is not None for found, at in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were cut are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        with server.lock:
            server.requests.append((self.command, path))
            fault = next((one for one in server.faults if one.times and self._matches(one, path)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is None and not fault.served:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._cut()
            return
        body = self._body()
        if self.headers["Host"].startswith("localhost") and "Authorization" in self.headers:
            server.tokens_elsewhere.append(self.headers["Authorization"])
        with server.lock:
            answer = self._answer(path, body) if fault is None or fault.served else None
        if fault is not None and fault.status is None:
            self._cut()
        elif fault is not None:
            assert fault.status is not None
            echo = f"{fault.message} for {self.headers.get('Authorization', 'nobody')}"  # a server that tells too much
            self._send(fault.status, {"error": echo}, fault.headers)
        else:
            self._send(*(answer or (404, {"error": "no such address"}, {})))

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _matches(self, fault: Fault, path: str) -> bool:
        return re.fullmatch(fault.method, self.command) is not None and re.match(fault.path, path) is not None

    def _answer(self, path: str, body: bytes) -> Any:
        """Status, content (JSON or bytes) and headers."""
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return getattr(self, action)(body, **match.groupdict())
        return 404, {"error": "no such address"}, {}

    def _user(self) -> str | None:
        return self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repo(self, repo: str) -> Repo | None:
        """A repository that whoever asks may see."""
        found = self.server.repos.get(repo)
        return found if found and (not found.private or self._user() == repo.partition("/")[0]) else None

    def whoami(self, body: bytes) -> Any:
        user = self._user()
        if user is None:
            return 401, {"error": "Invalid username or password."}, {}
        return 200, {"name": user, "type": "user", "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self, body: bytes) -> Any:
        asked, user = json.loads(body), self._user()
        owner = asked.get("organization") or user
        if user is None or owner != user:
            return 403 if user else 401, {"error": f"You don't have the rights to create a model under {owner}"}, {}
        repo = f"{owner}/{asked['name']}"
        if repo in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, {}
        self.server.make(repo, asked.get("visibility") == "private")
        return 200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}, {}

    def info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        found = self._repo(repo)
        if found is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = found.files(revision)
        if files is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        commit = found.commits[-1][0] if revision == "main" else revision
        siblings = [{"rfilename": name} for name in sorted(files)]
        return 200, {"id": repo, "sha": commit, "private": found.private, "siblings": siblings, "tags": []}, {}

    def tree(self, body: bytes, repo: str, revision: str, at: str | None = None) -> Any:
        found = self._repo(repo)
        files = found.files(revision) if found else None
        if files is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if at:
            return 404, {"error": f"{at} does not exist"}, {"X-Error-Code": "EntryNotFound"}
        entries = []
        for name, blob in sorted(files.items()):
            large = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.large else {}
            entries.append({"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_sha1, **large})
        return 200, entries, {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        found = self._repo(repo)
        if found is None or self._user() != repo.partition("/")[0]:
            return 403, {"error": "You don't have write access"}, {}
        files = []
        for asked in json.loads(body)["files"]:
            blob = found.commits[-1][1].get(asked["path"])
            mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
            oid = {"oid": blob.oid} if blob else {}
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return 200, {"files": files}, {}

    def batch(self, body: bytes, repo: str) -> Any:
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if oid in self.server.stored:
                objects.append({"oid": oid, "size": size})
                continue
            signed = f"{self.server.storage}/large/{oid}"
            upload: dict[str, Any] = {"href": f"{signed}?signature=secret"}
            part = self.server.part_bytes
            if part and size > part:
                numbers = range(1, -(-size // part) + 1)
                urls = {str(number): f"{signed}/part/{number}?signature=secret" for number in numbers}
                upload = {"href": f"{self.server.url}/complete/{oid}", "header": {"chunk_size": str(part), **urls}}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def store(self, body: bytes, oid: str) -> Any:
        if sha256(body).hexdigest() != oid:
            return 400, {"error": "the content has another hash"}, {}
        self.server.stored[oid] = body
        return 200, b"", {}

    def store_part(self, body: bytes, oid: str, number: str) -> Any:
        self.server.parts.setdefault(oid, {})[int(number)] = body
        return 200, b"", {"ETag": f'"{sha1(body).hexdigest()}"'}

    def complete(self, body: bytes, oid: str) -> Any:
        parts = self.server.parts.pop(oid)
        return self.store(b"".join(parts[part["partNumber"]] for part in json.loads(body)["parts"]), oid)

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        found = self._repo(repo)
        if found is None or self._user() != repo.partition("/")[0]:
            return 403, {"error": "You don't have write access"}, {}
        files = dict(found.commits[-1][1])
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header" and value.get("parentCommit", found.commits[-1][0]) != found.commits[-1][0]:
                return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile" and value["oid"] not in self.server.stored:
                return 400, {"error": f"{value['path']} was not uploaded"}, {}
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.server.stored[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
        commit = found.commit(files)
        return 200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit}, {}

    def validate(self, body: bytes) -> Any:
        return 200, {"errors": [], "warnings": []}, {}

    def resolve(self, body: bytes, repo: str, revision: str, at: str) -> Any:
        found = self._repo(repo)
        if found is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = found.files(revision) or {}
        blob = files.get(at)
        commit = {"X-Repo-Commit": found.commits[-1][0] if revision == "main" else revision}
        if blob is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit}
        if not blob.large:
            return 200, blob.content, {"ETag": f'"{blob.git_sha1}"', **commit}
        self.server.stored[blob.sha256] = blob.content
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return 302, b"", {"Location": f"{self.server.storage}/large/{blob.sha256}?signature=secret", **linked, **commit}

    def large(self, body: bytes, oid: str) -> Any:
        content = self.server.stored[oid]
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            return 200, content, {}
        first = int(start[1])
        span = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return 206, content[first:], {"Content-Range": span}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<at>.+))?", "tree"),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "store"),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})/part/(?P<number>[0-9]+)", "store_part"),
    ("POST", "/complete/(?P<oid>[0-9a-f]{64})", "complete"),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<at>.+)", "resolve"),
    ("GET HEAD", "/large/(?P<oid>[0-9a-f]{64})", "large"),
)


@contextmanager
def hub_server(users: dict[str, str]) -> Iterator[HubServer]:
    """A server for the time of the block."""
    server = HubServer(users)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
