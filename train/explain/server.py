"""A language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, OpenRouter, OpenAI and others.

The address and the key come from the environment, as the `openai` library has them: OPENAI_BASE_URL, OPENAI_API_KEY.
"""

import os
import re
import threading
from typing import NamedTuple

from shared.errors import ProjectError, Stopped, UserError, cause

_RETRIES, _SECONDS = 6, 120.0
"""Of one request: the library waits longer before each repeat, and as long as the server says."""
_MOST_ANSWER = 2048
"""Tokens of an answer, at most."""
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class Question(NamedTuple):
    """What a model is asked."""

    system: str
    user: str


class Answer(NamedTuple):
    """What a model said."""

    text: str
    """Without what it thought aloud before."""
    tokens: int
    """Of question and answer, as the server counts."""


class Server:
    """Asks a model questions, and counts the tokens that the server bills."""

    def __init__(self, model: str, temperature: float, most_tokens: int, used: int = 0) -> None:
        """Read the address and the key; sends nothing.

        `most_tokens`: after so many tokens of questions and answers, `used` of them before, no more is asked.

        Raises `UserError` when the library or an address is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise UserError("explain needs the openai library; install it with: pip install openai") from error
        key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
        if not (key or url):
            raise UserError(
                "no server to ask: set OPENAI_BASE_URL to the address of an OpenAI-compatible one, such as "
                "http://localhost:8000/v1, and OPENAI_API_KEY if it wants a key"
            )
        self._errors = openai
        self._client = openai.OpenAI(api_key=key or "none", max_retries=_RETRIES, timeout=_SECONDS)
        self.url = str(self._client.base_url)
        self.model, self.temperature = model, temperature
        self._most, self.used = most_tokens, used
        self._counting = threading.Lock()

    def ask(self, question: Question) -> Answer:
        """Send a question, and return the answer.

        Raises `Stopped` when the bound on tokens is reached, or the server is out of reach or too busy for minutes, and
        `UserError` when it refuses what it was asked.
        """
        if self.used >= self._most:
            raise Stopped(f"{self.used:,} tokens are used of --max-tokens {self._most:,}; run it again with more")
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "system", "content": question.system}, {"role": "user", "content": question.user}],
                temperature=self.temperature,
                max_completion_tokens=_MOST_ANSWER,
            )
        except self._errors.AuthenticationError as error:
            raise UserError(f"{self.url} refuses the key; set OPENAI_API_KEY ({cause(error)})") from error
        except (
            self._errors.APIConnectionError,
            self._errors.RateLimitError,
            self._errors.InternalServerError,
        ) as error:
            again = "run the same command again to go on"
            raise Stopped(f"{self.url}: {cause(error)}, after {_RETRIES + 1} tries; {again}") from error
        except self._errors.APIStatusError as error:
            hint = "check --model, --temperature and OPENAI_BASE_URL"
            raise UserError(f"{self.url} refuses the request: {cause(error)}; {hint}") from error
        except self._errors.OpenAIError as error:
            raise ProjectError(f"{self.url}: {cause(error)}") from error
        tokens = answer.usage.total_tokens if answer.usage else _guess(question)
        with self._counting:
            self.used += tokens
        text = answer.choices[0].message.content if answer.choices else None
        return Answer(_THINKING.sub("", text or "").strip(), tokens)


def _guess(question: Question) -> int:
    """Return about how many tokens a question and its answer are, for a server that does not say."""
    return (len(question.system) + len(question.user)) // 3 + _MOST_ANSWER // 8
