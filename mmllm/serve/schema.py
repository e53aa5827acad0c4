"""What clients send: OpenAI's requests, with what a model that draws needs beside them.

A parameter that OpenAI knows and we do not have is taken at the value that asks for nothing, and refused at any other: nobody gets
an answer to another question. One that nobody knows is refused. Parameters of ours are marked so.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=-2**63, lt=2**63)]
# what rounds to zero in float32 would be a division by it, or no id at all
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(lambda value: value if value > 1e-6 else 0.0)]
TopP = Annotated[float, Field(ge=1e-6, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, lt=2**31)]
Guidance = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


def _absent(value: Any) -> Any:
    if value not in (None, False, 0, "auto", "none", [], {}, "text", {"type": "text"}, ["text"], "default"):
        raise ValueError("this model has no such thing")
    return value


def _utf8(value: str) -> str:
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("the text holds half a character")  # a lone surrogate, which JSON can write and UTF-8 cannot
    return value


Text = Annotated[str, AfterValidator(_utf8)]
Absent = Annotated[Any, AfterValidator(_absent), Field(description="Taken where it asks for nothing.")]
Ignored = Annotated[Any, Field(description="Taken, and without effect here.")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ImageUrl(Strict):
    url: Text
    """data:image/…;base64,…, or http(s) where the server was told to fetch."""
    detail: Ignored = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    parts: list[Part] | None = None
    """Ours: of an assistant's message as we sent it; what it said in order, instead of `content`."""
    name: Ignored = None
    refusal: Absent = None
    tool_calls: Absent = None
    function_call: Absent = None
    audio: Absent = None
    annotations: Absent = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(Strict):
    """POST /v1/chat/completions"""

    model: Text
    messages: list[Message] = Field(min_length=1, max_length=1_000)
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """Of text, at most; the server has a limit of its own."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same under its newer name."""
    temperature: Temperature | None = None
    """Of text; 0, which takes the likeliest, where it is not given."""
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: TopK | None = None
    """Ours: only the k likeliest tokens of text."""
    image_temperature: Temperature | None = None
    """Ours, as all from here: of image codes."""
    image_top_k: TopK | None = None
    image_top_p: TopP | None = None
    guidance: Guidance | None = None
    """How much more than without the conversation pictures follow it; 1 is none."""
    max_pictures: int = Field(1, ge=0, le=16)
    """Pictures that an answer may hold."""
    pictures: Literal["markdown", "parts"] = "markdown"
    """Whether `content` holds pictures too, as Markdown with data: URLs; `parts` always does."""
    previews: bool = False
    """While a picture forms, send what there is of it as PNG with every row."""
    frequency_penalty: Absent = None
    presence_penalty: Absent = None
    logit_bias: Absent = None
    logprobs: Absent = None
    top_logprobs: Absent = None
    tools: Absent = None
    tool_choice: Absent = None
    functions: Absent = None
    function_call: Absent = None
    response_format: Absent = None
    modalities: Ignored = None
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    parallel_tool_calls: Ignored = None
    service_tier: Ignored = None
    store: Absent = None
    metadata: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class Drawing(Strict):
    """What pictures are asked for with, by words alone or with others to change."""

    prompt: Text
    model: Text | None = None
    n: int | None = Field(None, ge=1)
    size: Text | None = None
    """WIDTHxHEIGHT in pixels, one that /v1/models lists; auto is the first."""
    response_format: Literal["b64_json", "url"] | None = None
    """A url is served by us until newer pictures push it out."""
    seed: Seed | None = None
    """Ours, as the next five: same seed, same pictures."""
    guidance: Guidance | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    negative_prompt: Text | None = None
    """What guidance leads away from, instead of from no words at all."""
    stream: bool | None = None
    """Rows as they form, as OpenAI's partial images."""
    partial_images: int | None = Field(None, ge=0, le=3)
    quality: Literal["auto", "standard"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Ignored = None
    output_compression: Ignored = None
    style: Absent = None
    user: Ignored = None
    safety_identifier: Ignored = None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    """Every answer that is no success."""

    error: Error


STREAMED: dict[str, Any] = {"content": {"application/json": {}, "text/event-stream": {}}}
"""How an answer is published that comes whole or as a stream."""
