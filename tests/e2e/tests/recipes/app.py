"""The app behind the proxies of the recipes: says what arrived, counts uploads, answers in two parts, echoes a websocket."""

import base64
import collections
import hashlib
import http.server
import json
import threading

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
asked = collections.defaultdict(threading.Event)


class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.headers.get("upgrade", "").lower() == "websocket":
            return self.websocket()
        page, _, key = self.path.partition("?")
        if page == "/parts":
            return self.parts(asked[key])
        if page == "/on":
            asked[key].set()
        names = ["host", "x-forwarded-for", "x-forwarded-proto"]
        self.answer({name: self.headers.get(name) for name in names} | {"target": self.path})

    def do_POST(self):
        left = count = int(self.headers["content-length"])
        while left and (part := self.rfile.read(min(left, 1 << 20))):
            left -= len(part)
        self.answer({"bytes": count - left})

    def parts(self, go_on):
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"6\r\nfirst\n\r\n")
        go_on.wait()
        self.wfile.write(b"5\r\nlast\n\r\n0\r\n\r\n")

    def answer(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def websocket(self):
        self.close_connection = True
        key = self.headers["sec-websocket-key"] + GUID
        self.send_response(101)
        self.send_header("upgrade", "websocket")
        self.send_header("connection", "upgrade")
        self.send_header("sec-websocket-accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        # Short frames only.
        while len(head := self.rfile.read(2)) == 2:
            mask, data = self.rfile.read(4), self.rfile.read(head[1] & 127)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
            self.wfile.write(bytes([head[0], len(data)]) + data)
            if head[0] & 15 == 8:
                return


http.server.ThreadingHTTPServer(("127.0.0.1", 3000), App).serve_forever()
