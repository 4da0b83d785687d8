# Serves what ~/mark said when it was started; /well is not well while ~/unwell is there.
import http.server
import pathlib

HOME = pathlib.Path.home()
MARK = (HOME / "mark").read_text().strip() if (HOME / "mark").exists() else "empty"


class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        unwell = self.path == "/well" and (HOME / "unwell").exists()
        body = MARK.encode()
        self.send_response(500 if unwell else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", 3000), App).serve_forever()
