"""The app that runs inside a sandbox: a page that shows its mark and talks over a websocket, counts its requests, and
writes down those that are numbered."""

import base64
import hashlib
import json
import os
import socketserver
import struct
import sys

MARK = sys.argv[1]
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
RUN = os.urandom(8).hex()
PAGE = f"""<!doctype html><meta charset="utf-8"><title>{MARK}</title><h1>{MARK}</h1><p></p><script>
const socket = new WebSocket(`${{location.origin.replace('http', 'ws')}}/socket`);
socket.onopen = () => socket.send('ping');
socket.onmessage = (event) => {{ document.querySelector('p').textContent = event.data; }};
</script>"""
seen = []
# Each number that was asked for, in the order asked: what is there twice was delivered twice.
numbers = os.open(os.path.expanduser("~/numbers"), os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)


class App(socketserver.StreamRequestHandler):
    def handle(self):
        while line := self.rfile.readline():
            method, path, _ = line.decode("latin-1").split(" ")
            headers = {}
            while line := self.rfile.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            self.rfile.read(int(headers.get("content-length", 0)))
            seen.append({"method": method, "path": path, "cookie": headers.get("cookie", "")})
            if headers.get("upgrade", "").lower() == "websocket":
                return self.websocket(headers["sec-websocket-key"])
            if path.startswith("/n/"):
                os.write(numbers, (path[3:] + "\n").encode())
            kind, body = "application/json", {"mark": MARK, "run": RUN, "requests": len(seen)}
            if path == "/":
                kind, body = "text/html", PAGE
            elif path == "/seen":
                body = seen
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

    def websocket(self, key):
        accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
        self.wfile.write(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        while len(head := self.rfile.read(2)) == 2:
            kind, size = head[0] & 15, head[1] & 127
            if size == 126:
                size = struct.unpack("!H", self.rfile.read(2))[0]
            mask, data = self.rfile.read(4), self.rfile.read(size)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
            if kind == 8:
                self.wfile.write(bytes([0x88, len(data)]) + data)
                return
            if kind == 1:
                answer = f"{MARK}:".encode() + data
                self.wfile.write(bytes([0x81, len(answer)]) + answer)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    # Else connections beyond five at once wait a second.
    request_queue_size = 128
    daemon_threads = True


Server(("127.0.0.1", 3000), App).serve_forever()
