"""A question to an OpenAI-compatible server, in the form in which lmms-eval's `openai` model asks.

    POST /chat/completions {"model", "messages": [{"role": "user", "content": [picture …, text]}], "max_tokens", "temperature": 0}

A picture is a PNG file in a data URL, as lmms-eval 0.7.3 sends it (lmms_eval/protocol.py: to_openai_messages). Nothing but the standard
library is needed; the key, where the server wants one, is OPENAI_API_KEY's.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from data.images import load_image, to_array, to_png

TIMEOUT_S = 300
PNG = b"\x89PNG\r\n\x1a\n"


def payload(pictures: Sequence[bytes], text: str, max_tokens: int, model: str) -> dict[str, Any]:
    """The request for some picture files and a text."""
    files = [file if file.startswith(PNG) else to_png(to_array(load_image(file))) for file in pictures]
    shown = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file).decode()}} for file in files]
    return {"model": model, "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
            "max_tokens": max_tokens, "temperature": 0}


def ask(address: str, pictures: Sequence[bytes], text: str, max_tokens: int, model: str = "mmllm") -> str:
    """→ what the assistant says. Errors: ValueError that names the server and what it answered."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    body = json.dumps(payload(pictures, text, max_tokens, model)).encode()
    request = urllib.request.Request(f"{address.rstrip('/')}/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content = json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{request.full_url} answered {error.code}: {error.read(500).decode(errors='replace')}") from error
    except (OSError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{request.full_url} gave no answer ({error!r}): start `mmllm serve MODEL`, or mend --server") from error
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")  # interleaved answers come as parts
