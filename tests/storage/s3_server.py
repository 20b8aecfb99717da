"""A server that speaks S3, as far as runs ask it: one bucket in memory, on the loopback address.

The public servers in Python need botocore, whose python-dateutil is older than that of constraints.txt.
"""

import datetime
import email.utils
import hashlib
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree
from xml.sax.saxutils import escape

BUCKET = "bucket"


class S3Server(ThreadingHTTPServer):
    """`objects`: key -> content and the time of its last write, in seconds; `asked`: the methods and keys so far.

    `page`: the most entries of a list that one answer has. `refuse(method, key)` gives the status with which a request
    is refused, or 0.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.asked, self.page, self.refuse = {}, [], 1000, lambda method, key: 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def environment(self):
        """The variables with which a process finds the server."""
        own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
        return own | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

    def put(self, key, content):
        self.objects[key] = content, datetime.datetime.now().timestamp()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer in one piece

    def log_message(self, *arguments):
        pass

    def _answer(self, method):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((method, key))
        if status := self.server.refuse(method, key):
            return self._send(status, f"<Error><Code>Refused</Code><Message>{method}</Message></Error>".encode())
        if bucket != BUCKET:
            return self._send(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
        objects = self.server.objects
        if method == "GET" and "list-type" in query:
            return self._send(200, _listed(objects, query, self.server.page).encode())
        if method == "POST" and "delete" in query:
            gone = [one.text for one in ElementTree.fromstring(body).iter() if one.tag.endswith("Key")]
            for one in gone:
                objects.pop(one, None)
            told = "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in gone)
            return self._send(200, f"<DeleteResult>{told}</DeleteResult>".encode())
        if method == "PUT":
            source = urllib.parse.unquote(self.headers.get("x-amz-copy-source", "")).lstrip("/").partition("/")[2]
            if source and source not in objects:
                return self._missing()
            self.server.put(key, objects[source][0] if source else body)
            tag = _tag(objects[key][0])
            told = f"<CopyObjectResult><ETag>{tag}</ETag></CopyObjectResult>" if source else ""
            return self._send(200, told.encode(), {"ETag": tag})
        if method == "DELETE":
            objects.pop(key, None)
            return self._send(204)
        if key not in objects:
            return self._missing()
        content, at = objects[key]
        headers = {"ETag": _tag(content), "Last-Modified": email.utils.formatdate(at, usegmt=True)}
        if (part := self.headers.get("Range")) and method == "GET":
            first, _, last = part.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            return self._send(206, content[start:end], headers)
        return self._send(200, content, headers, body=method != "HEAD")

    def _missing(self):
        self._send(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")

    def _send(self, status, content=b"", headers=None, body=True):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_PUT(self):
        self._answer("PUT")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")


def _tag(content):
    return f'"{hashlib.md5(content).hexdigest()}"'


def _listed(objects, query, page):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    entries = {}
    for key in sorted(objects):
        if key.startswith(prefix):
            inner = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            entries.setdefault(prefix + inner[0] + delimiter if inner[1] else key, not inner[1])
    after = query.get("continuation-token", query.get("start-after", ""))
    left = [entry for entry in sorted(entries) if entry > after]
    told = []
    for entry in left[:page]:
        if entries[entry]:
            content, at = objects[entry]
            when = datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
            own = f"<Key>{escape(entry)}</Key><LastModified>{when}</LastModified><ETag>{escape(_tag(content))}</ETag>"
            told.append(f"<Contents>{own}<Size>{len(content)}</Size></Contents>")
        else:
            told.append(f"<CommonPrefixes><Prefix>{escape(entry)}</Prefix></CommonPrefixes>")
    more = f"<NextContinuationToken>{escape(left[page - 1])}</NextContinuationToken>" if len(left) > page else ""
    told.append(f"<IsTruncated>{str(len(left) > page).lower()}</IsTruncated>{more}")
    return f"<ListBucketResult><Name>{BUCKET}</Name>{''.join(told)}</ListBucketResult>"
