"""As much of an OpenAI-compatible server as labels of latents ask for, on this machine."""

import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.local_server import LocalServer, answer_json

KEY = "sk-of-the-test"
TOKENS = 100
"""That it bills for each question and answer."""
SPACE = r"\u0020"
"""In JSON: labels have no two spaces in a row."""


class Chat(LocalServer):
    """Labels a latent by the token that is marked most, and decides by whether that token is there, or is marked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuse_after: int | None = None
        """Questions that are answered; later ones get `refusal`."""
        self.refusal = 400
        self.always: str | None = None
        """The answer to every question for decisions."""
        super().__init__(_handler(self))

    def answer(self, key: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return a status and JSON."""
        if key != f"Bearer {KEY}":
            return 401, {"error": {"message": "Incorrect API key provided"}}
        if self.refuse_after is not None and len(self.asked) >= self.refuse_after:
            return self.refusal, {"error": {"message": "the model is not loaded"}}
        self.asked.append(body)
        text = self._text(*(message["content"] for message in body["messages"]))
        message = {"role": "assistant", "content": f"<think>\nLABEL: not this\n</think>\n{text}"}
        return 200, {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": TOKENS - 9, "completion_tokens": 9, "total_tokens": TOKENS},
        }  # fmt: skip

    def _text(self, system: str, user: str) -> str:
        if "LABEL:" in system:
            marked = re.findall("^Activations: (.*)$", user, re.MULTILINE)
            tokens = Counter(re.match(r'"(?:\\.|[^"\\])*"', line)[0] for line in marked if line)  # type: ignore[index]
            return f"LABEL: the token {tokens.most_common(1)[0][0].replace(' ', SPACE)}."
        if self.always:
            return self.always
        label, *excerpts = re.split(r"\n\nExcerpt \d+: ", user)
        token = json.loads(label.removeprefix("Label: the token ").removesuffix("."))
        if "<<" in system:
            return str(
                [int(any(token in part for part in re.findall("<<(.*?)>>", one, re.DOTALL))) for one in excerpts]
            )
        return str([int(token in one) for one in excerpts])


def _handler(chat: Chat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer_json(self, *chat.answer(self.headers.get("Authorization", ""), body))

        def log_message(self, *_: object) -> None:
            pass

    return Handler
