"""A page in the browser to try a model: one form, served on the loopback address and nowhere else."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from ..errors import ConfigurationError, FastRobertaError
from .fill import FilledText

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fill in the mask</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; color: #222; }}
textarea {{ width: 100%; box-sizing: border-box; font: inherit; padding: .5rem; }}
button {{ font: inherit; padding: .4rem 1.2rem; margin-top: .5rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100%; }}
td {{ padding: .15rem .5rem; white-space: pre; }}
td:first-child {{ text-align: right; width: 5rem; font-variant-numeric: tabular-nums; }}
.bar {{ background: #4c78a8; height: .8rem; }}
.error {{ color: #a00; }}
code {{ background: #f3f3f3; padding: 0 .2rem; }}
</style>
</head>
<body>
<h1>Fill in the mask</h1>
<p>{model}</p>
<form>
<label for="text">A text with <code>{mask}</code> where a word is missing:</label>
<textarea id="text" name="text" rows="3">{text}</textarea>
<button>Fill in</button>
</form>
{answer}
</body>
</html>
"""


def serve(fill: Callable[[str], FilledText], name: str, mask_token: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        fill: raises FastRobertaError where a text cannot be filled in. name: of the model. port: 0 for a free one.
    Raises:
        ConfigurationError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path not in ("/", "/fill"):
                self.send_error(404)
                return
            text = parse_qs(address.query).get("text", [""])[0]
            answer: FilledText | None = None
            fault = ""
            if text:
                try:
                    answer = fill(text)
                except FastRobertaError as error:
                    fault = str(error)
            if address.path == "/fill":  # for programs
                body = json.dumps({"error": fault} if fault else asdict(answer) if answer else {}, ensure_ascii=False)
                self._send(body, "application/json", 400 if fault else 200)
                return
            shown = f'<p class="error">{html.escape(fault)}</p>' if fault else _show(answer) if answer else ""
            default = f"The capital of France is {mask_token}."
            page = PAGE.format(
                model=html.escape(name), mask=html.escape(mask_token), text=html.escape(text or default), answer=shown
            )
            self._send(page, "text/html; charset=utf-8", 200)

        def _send(self, body: str, kind: str, status: int) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigurationError(f"port = {port}: cannot be used ({error.strerror}); give another") from error
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _show(answer: FilledText) -> str:
    tables = []
    for predictions in answer.masks:
        rows = (
            f"<tr><td>{one.score:.2%}</td><td>{html.escape(one.token)}</td>"
            f'<td style="width: 50%"><div class="bar" style="width: {one.score:.2%}"></div></td></tr>'
            for one in predictions
        )
        tables.append(f"<table>{''.join(rows)}</table>")
    return "".join(tables)
