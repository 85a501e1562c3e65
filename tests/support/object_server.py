"""A server on the loopback: enough of S3, of plain HTTP and of the Hub's API for tests.

    python tests/support/object_server.py [--latency 0.02] [--per-connection 200e6]
        [--total 1e9] [BUCKET=FOLDER ...]

Prints its address and serves until its standard input is closed. S3 and Google Cloud Storage: list
with pages, head, ranges, conditions, multipart uploads. ``/http/KEY``: the same objects as a web
server has them. ``/api/models/ORG/NAME`` and ``/ORG/NAME/resolve/…``: the Hub, which redirects
weight files to a second port, as to a content network. Latency and rates are per request and per
connection. Faults are selected by a regular expression on "METHOD /path?query".
"""

from __future__ import annotations

import argparse
import email.utils
import hashlib
import json
import mmap
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

Data = bytes | mmap.mmap


@dataclass
class Fault:
    """A failure of the next ``times`` requests that ``match``, after the first ``skip`` of them.

    Kinds: a status (``"500"``); ``reset``, ``truncate``, ``stall`` (in the body, after ``after``
    bytes); ``hang`` (no answer); ``length`` (a wrong Content-Length); ``short`` (less than the
    range, consistently declared); ``whole`` (the range is ignored); ``change`` (the object is
    replaced first); ``lost`` (no answer to a request that was executed).
    """

    kind: str
    match: str = ""
    times: int = 1
    skip: int = 0
    after: int | None = None
    seconds: float = 30.0


@dataclass
class Repository:
    """A model of the Hub: commits by revision, and the key of each file by commit."""

    commits: dict[str, str]
    files: dict[str, dict[str, str]]
    token: str = ""


@dataclass
class Objects:
    """Objects by key (``BUCKET/NAME``), uploads, repositories, faults, and a log of requests."""

    latency: float = 0.0
    per_connection: float = 0.0  # bytes a second
    total: float = 0.0
    data: dict[str, tuple[Data, str]] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    _free_at: float = 0.0

    def put(self, key: str, data: Data, metadata: dict[str, str] | None = None) -> str:
        """Store an object; its tag."""
        seed = b"%d:%d" % (len(data), time.monotonic_ns()) if len(data) > 1 << 22 else bytes(data)
        tag = f'"{hashlib.md5(seed).hexdigest()}"'
        with self.lock:
            self.data[key] = (data, tag)
            self.metadata[key] = metadata or {}
        return tag

    def add_folder(self, bucket: str, folder: Path) -> None:
        """Store every file below ``folder``; large ones are mapped, not read."""
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            with path.open("rb") as file:
                size = path.stat().st_size
                data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
            self.put(f"{bucket}/{path.relative_to(folder).as_posix()}", data)

    def add_repository(
        self,
        name: str,
        bucket: str,
        commit: str = "a" * 40,
        revision: str = "main",
        token: str = "",
    ) -> None:
        """Show the objects of ``bucket`` as a commit of the model ``name``."""
        prefix = bucket + "/"
        files = {k.removeprefix(prefix): k for k in self.data if k.startswith(prefix)}
        repository = self.repositories.setdefault(name, Repository({}, {}, token))
        repository.files[commit] = files
        repository.commits.update({revision: commit, commit: commit})

    def keys(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(k for k in self.data if k.startswith(prefix))

    def reset(self) -> None:
        """Forget faults and the log."""
        self.faults.clear()
        self.log.clear()

    def fault_of(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def pace(self, num_bytes: int, connection: list[float]) -> None:
        """Wait until ``num_bytes`` may be sent, by the rate of all connections and of this one."""
        at = now = time.monotonic()
        if self.total:
            with self.lock:
                self._free_at = at = max(now, self._free_at)
                self._free_at += num_bytes / self.total
        if self.per_connection:
            connection[0] = max(now, connection[0])
            at = max(at, connection[0])
            connection[0] += num_bytes / self.per_connection
        if at > now + 2e-4:
            time.sleep(at - now)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, wbufsize = "HTTP/1.1", 1 << 16
    server: Server
    fault: Fault | None = None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_until = [0.0]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        objects, url = self.server.objects, urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        path = unquote(url.path).lstrip("/")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        line = f"{self.command} {self.path}"
        with objects.lock:
            objects.log.append(
                {
                    "line": line,
                    "range": self.headers.get("Range"),
                    "has_token": bool(self.headers.get("Authorization")),
                    "port": self.server.server_port,
                    "at": time.monotonic(),
                }
            )
        if objects.latency:
            time.sleep(objects.latency)
        if length and objects.per_connection:
            time.sleep(length / objects.per_connection)
        self.fault = objects.fault_of(line)
        kind = self.fault.kind if self.fault else ""
        if kind.isdigit() and len(kind) == 3:
            return self.refuse(int(kind), {"503": "SlowDown", "403": "ExpiredToken"}.get(kind, "X"))
        if kind == "hang":
            time.sleep(self.fault.seconds)
            self.close_connection = True
            return None
        if path.startswith("api/models/") or "/resolve/" in path:
            return self.hub(path, query)
        for prefix in ("cdn/", "http/"):
            if path.startswith(prefix):
                return self.send_object(path.removeprefix(prefix))
        bucket, _, key = path.partition("/")
        return getattr(self, f"s3_{self.command.lower()}")(bucket, key, query, body)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    # --- answers ---------------------------------------------------------------------------

    def answer(
        self, status: int, body: Any = b"", kind: str = "application/xml", **headers: object
    ) -> None:
        if self.fault and self.fault.kind == "lost" and status < 300:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if len(body) and self.command != "HEAD":
            self.send_body(memoryview(body))

    def send_body(self, view: memoryview) -> None:
        fault, objects = self.fault, self.server.objects
        stop = None
        if fault and fault.kind in ("truncate", "stall", "reset"):
            stop = len(view) // 2 if fault.after is None else fault.after
        self.wfile.flush()
        for start in range(0, len(view), 256 << 10):
            part = view[start : start + (256 << 10)]
            if stop is not None and start + len(part) > stop:
                self.connection.sendall(view[start : max(start, stop)])
                return self.break_off(fault)
            objects.pace(len(part), self.sent_until)
            self.connection.sendall(part)
        return None

    def break_off(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault.kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.answer(status, body if self.command != "HEAD" else b"")

    def send_object(self, key: str, **headers: object) -> None:
        objects, fault = self.server.objects, self.fault
        kind = fault.kind if fault else ""
        data, tag = objects.data.get(key, (None, ""))
        if data is None:
            return self.refuse(404, "NoSuchKey")
        if kind == "change":
            tag = objects.put(key, bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        if not self.is_current(tag):
            return self.refuse(412, "PreconditionFailed")
        wanted = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if wanted and kind != "whole":
            first, last = wanted.groups()
            start = int(first) if first else max(0, stop - int(last))
            stop = min(stop, int(last) + 1) if first and last else stop
            if start >= len(data):
                return self.refuse(416, "InvalidRange")
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if kind == "short":
            stop = start + max(1, (stop - start) // 2)
        view = memoryview(data)[start:stop]
        if kind == "length":
            headers["Content_Length"] = len(view) + 100
            self.close_connection = True
        self.answer(
            206 if "Content_Range" in headers else 200,
            view,
            "application/octet-stream",
            ETag=tag,
            X_Goog_Generation=generation_of(tag),
            Accept_Ranges="bytes",
            Last_Modified=email.utils.formatdate(1.7e9, usegmt=True),
            **objects.metadata.get(key, {}),
            **headers,
        )
        return None

    def is_current(self, tag: str) -> bool:
        return self.headers.get("If-Match") in (None, tag, "*")

    # --- S3 --------------------------------------------------------------------------------

    def s3_get(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        if key:
            return self.send_object(f"{bucket}/{key}")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after = query.get("continuation-token", query.get("start-after", ""))
        found, folders = [], {}
        for full in self.server.objects.keys(f"{bucket}/{prefix}"):
            name = full.removeprefix(f"{bucket}/")
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders[prefix + rest.split(delimiter)[0] + delimiter] = True
            elif name > after:
                found.append((full, name))
        size = int(query.get("max-keys", 1000))
        page, more = found[:size], len(found) > size
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><ETag>{self.server.objects.data[full][1]}</ETag>"
            f"<Size>{len(self.server.objects.data[full][0])}</Size></Contents>"
            for full, name in page
        )
        entries += "".join(
            f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders
        )
        if more:
            token = escape(page[-1][1])
            entries += f"<NextContinuationToken>{token}</NextContinuationToken>"
        self.answer(
            200,
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{entries}</ListBucketResult>".encode(),
        )
        return None

    def s3_head(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        self.send_object(f"{bucket}/{key}")

    def s3_put(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        full, objects = f"{bucket}/{key}", self.server.objects
        if "uploadId" in query:
            if query["uploadId"] not in objects.uploads:
                return self.refuse(404, "NoSuchUpload")
            objects.uploads[query["uploadId"]][1][int(query["partNumber"])] = body
            return self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        with objects.lock:
            if not self.may_put(full):
                return self.refuse(412, "PreconditionFailed")
            tag = objects.put(full, body, self.sent_metadata())
        return self.answer(200, ETag=tag, X_Goog_Generation=generation_of(tag))

    def s3_post(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        full, objects = f"{bucket}/{key}", self.server.objects
        if "uploads" in query:
            upload = f"u{len(objects.uploads)}-{time.monotonic_ns()}"
            objects.uploads[upload] = (full, {})
            objects.metadata[upload] = self.sent_metadata()
            return self.answer(
                200,
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
        if "delete" in query:
            names = [k.decode() for k in re.findall(rb"<Key>(.*?)</Key>", body)]
            with objects.lock:
                for name in names:
                    objects.data.pop(f"{bucket}/{name}", None)
            gone = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            return self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        with objects.lock:
            if query.get("uploadId") not in objects.uploads:
                return self.refuse(404, "NoSuchUpload")
            if not self.may_put(full):
                return self.refuse(412, "PreconditionFailed")
            parts = objects.uploads.pop(query["uploadId"])[1]
            data = b"".join(parts[i] for i in sorted(parts))
            tag = objects.put(full, data, objects.metadata.pop(query["uploadId"]))
        return self.answer(
            200,
            f"<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
            f"<ETag>{tag}</ETag></CompleteMultipartUploadResult>".encode(),
        )

    def s3_delete(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        with self.server.objects.lock:
            if "uploadId" in query:
                self.server.objects.uploads.pop(query["uploadId"], None)
            else:
                self.server.objects.data.pop(f"{bucket}/{key}", None)
        self.answer(204)

    def sent_metadata(self) -> dict[str, str]:
        return {k: v for k, v in self.headers.items() if "-meta-" in k.lower()}

    def may_put(self, key: str) -> bool:
        tag = self.server.objects.data.get(key, (None, None))[1]
        is_refused = self.headers.get("If-None-Match") == "*" and tag
        generation = self.headers.get("x-goog-if-generation-match")
        if generation is not None and int(generation) != generation_of(tag):
            return False
        return not is_refused and self.headers.get("If-Match") in (None, tag)

    # --- the Hub ---------------------------------------------------------------------------

    def hub(self, path: str, query: dict[str, str]) -> None:  # noqa: PLR0911 - an answer each
        objects = self.server.objects
        pattern = r"(?:api/models/)?([^/]+/[^/]+)(?:/(revision|resolve|tree)/([^/]+)(?:/(.*))?)?$"
        parsed = re.match(pattern, path)
        name, verb, revision, file = parsed.groups() if parsed else ("", "", "", "")
        repository = objects.repositories.get(name)
        if repository is None:
            return self.send_json(401, {"error": "not found"}, X_Error_Code="RepoNotFound")
        token = self.headers.get("Authorization")
        if repository.token and token != f"Bearer {repository.token}":
            return self.send_json(401, {"error": "gated"}, X_Error_Code="GatedRepo")
        commit = repository.commits.get(revision or "main")
        if commit is None:
            return self.send_json(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        files = repository.files[commit]
        if path.startswith("api/"):
            return self.send_json(200, self.listing(name, verb, commit, files, query))
        key = files.get(file or "")
        if key is None:
            return self.send_json(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        data, tag = objects.data[key]
        if not file.endswith(".safetensors"):
            return self.send_object(key, X_Repo_Commit=commit)
        link = f"{self.server.content_network}/cdn/{quote(key)}?signature=secret{time.time():.0f}"
        return self.answer(
            302,
            b"",
            Location=link,
            ETag=tag,
            X_Repo_Commit=commit,
            X_Linked_Size=len(data),
            X_Linked_Etag=tag,
        )

    def listing(
        self, name: str, verb: str, commit: str, files: dict[str, str], query: dict[str, str]
    ) -> Any:
        sizes = {path: len(self.server.objects.data[key][0]) for path, key in sorted(files.items())}
        oids = {path: hashlib.sha1(path.encode()).hexdigest() for path in sizes}
        if verb == "tree":
            return [
                {"type": "file", "path": path, "size": size, "oid": oids[path]}
                for path, size in sizes.items()
            ]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sizes]
        if "blobs" in query:
            for entry in siblings:
                size = sizes[entry["rfilename"]]
                sha = hashlib.sha256(entry["rfilename"].encode()).hexdigest()
                entry |= {"size": size, "blobId": oids[entry["rfilename"]]}
                entry["lfs"] = {"size": size, "sha256": sha, "pointerSize": 1}
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return {"id": name, "sha": commit, "siblings": siblings, "tags": [], **flags}

    def send_json(self, status: int, value: Any, **headers: object) -> None:
        self.answer(status, json.dumps(value).encode(), "application/json", **headers)


def generation_of(tag: str | None) -> int:
    """The number of a version for Google Cloud Storage; 0 of none."""
    return zlib.crc32(tag.encode()) if tag else 0


class Server(ThreadingHTTPServer):
    """The store, or the content network of its Hub, on a port of its own."""

    daemon_threads, request_queue_size = True, 256
    objects: Objects
    content_network = ""

    def handle_error(self, *arguments: object) -> None:
        pass  # a client that went away


def serve(objects: Objects) -> tuple[Callable[[], None], str]:
    """Serve ``objects`` from threads of this process: what ends it, and the address."""
    servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.objects = objects
        server.content_network = f"http://127.0.0.1:{servers[1].server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop() -> None:
        for server in servers:
            server.shutdown()
            server.server_close()

    return stop, f"http://127.0.0.1:{servers[0].server_port}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("latency", "per-connection", "total"):
        parser.add_argument(f"--{option}", type=float, default=0.0)
    parser.add_argument("folders", nargs="*", metavar="BUCKET=FOLDER")
    given = parser.parse_args()
    stored = Objects(given.latency, given.per_connection, given.total)
    for entry in given.folders:
        bucket_name, _, place = entry.partition("=")
        stored.add_folder(bucket_name, Path(place))
        stored.add_repository(f"org/{bucket_name}", bucket_name)
    print(serve(stored)[1], flush=True)
    sys.stdin.read()
