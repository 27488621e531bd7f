"""What OpenAI's clients send and expect: requests with their rules, errors, and the OpenAPI description of both.

Fields that are not known here are tolerated, as clients send many. Those that are known and would change the answer, but cannot
be honoured, are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from grpo.serving.decoder import MOST_TOP_LOGPROBS

MOST_CHOICES = 128
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_MESSAGES = MOST_PARTS = 10_000
MOST_TOOLS, LONGEST_NAME = 128, 256
MOST_TOKENS = 2**22  # of a prompt; models know fewer
HOTTEST = 100.0
LEAST_TOP_P = 1e-6  # less is lost to rounding in float32
GREEDY_BELOW = 1e-4
"""Temperatures below this take the likeliest token, which clients that may not say 0 mean; logits over less overflow."""


class ApiError(Exception):
    """Answered in OpenAI's form.

    Args:
        param: the field of the request.
        code: what a program reads, such as `model_not_found`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type = message, status, type
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(_Tolerant):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # with every chunk the usage so far, as vLLM has it


class TextPart(_Tolerant):
    type: Literal["text"]
    text: str


class CalledFunction(_Tolerant):
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    arguments: str = "{}"  # JSON


class CalledTool(_Tolerant):
    """A call in an assistant's message, as an earlier answer had it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Tolerant):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


class GenerationRequest(_Tolerant):
    """What both kinds of request have."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] | None = None
    top_p: Annotated[float, Field(ge=LEAST_TOP_P, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    ignore_eos: bool | None = False
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ResponseFormat(_Tolerant):
    type: Literal["text"]


class Function(_Tolerant):
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(_Tolerant):
    type: Literal["function"]
    function: Function


class NamedFunction(_Tolerant):
    name: str


class NamedTool(_Tolerant):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = True

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """What the model is told of: with tool_choice none of nothing, so that it calls nothing."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in self.tools or []]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_for_the_template(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in given or {}:
            if name in NOT_FOR_TEMPLATES or name.startswith("return_"):
                raise ValueError(f"{name} is no argument of a template but the server's to set. Leave it out.")
        return given

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs. Set logprobs to true.")
        names = [tool.function.name for tool in self.tools or []]
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a call, and there are no tools. Give tools, or leave it out.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}; tools has {', '.join(names)}. Name one of them."
            )
        return self


Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
SEVERAL = Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)


def _kind_of(prompt: Any) -> str:
    """Told by the first item: to try all of four types costs seconds where millions of items are of none."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(prompt, list):
        return "text"
    if isinstance(first, int) and not isinstance(first, bool):
        return "tokens"
    return "lists" if isinstance(first, list) else "texts"


PromptField = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], SEVERAL, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], SEVERAL, Tag("lists")],
    Discriminator(_kind_of),
]


class CompletionRequest(GenerationRequest):
    prompt: PromptField
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = False
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError(f"best_of is {self.best_of} and n {self.num_choices}; they must be equal. Leave it out.")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError(
                "max_tokens is 0 without echo, which asks for nothing. Set it to at least 1, or echo to true."
            )
        return self

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of the prompts' tokens are wanted, too."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class VerdictRequest(_Tolerant):
    """Asks whether answers are right. `answer` is the gold answer, as in a data set's column."""

    completions: Annotated[list[str], SEVERAL]
    answer: Annotated[str, Field(min_length=1, max_length=10_000)]
    question: str = ""

    @field_validator("completions")
    @classmethod
    def _not_too_long(cls, values: list[str]) -> list[str]:
        if any(len(value) > LONGEST_GRADED for value in values):
            raise ValueError(f"each has at most {LONGEST_GRADED:,} characters")
        return values


LONGEST_GRADED = 1_000_000

NOT_FOR_TEMPLATES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
"""What transformers' `apply_chat_template` takes for itself: a template of the client's would be a program of the client's."""

REFUSED = {
    "frequency_penalty": "penalties are not computed here. Set it to 0, or leave it out.",
    "presence_penalty": "penalties are not computed here. Set it to 0, or leave it out.",
    "repetition_penalty": "penalties are not computed here. Set it to 1, or leave it out.",
    "logit_bias": "biases are not computed here. Leave it out.",
    "response_format": "answers are not held to a form here. Leave it out, or say {'type': 'text'}.",
    "suffix": "a text is only continued here. Leave it out.",
}


def error_of(found: ValidationError) -> ApiError:
    """The first thing that is wrong with a request."""

    def names_of(error: Any) -> list[str | int]:
        return [each for each in error["loc"] if not (isinstance(each, str) and ("[" in each or each in _BRANCHES))]

    # where a field may be of several types, the one that was meant is the one that fits furthest
    first = max(found.errors(include_url=False), key=lambda error: len(names_of(error)))
    names = names_of(first)
    param = ".".join(map(str, names)) or None
    message = first["msg"].removeprefix("Value error, ")
    if param is None:
        return ApiError(message)
    if first["type"] == "missing":
        return ApiError(f"{param} is missing. Add it to the request.", param=param, code="missing_required_parameter")
    value = repr(first.get("input"))
    shown = value if len(value) <= 100 else value[:100] + "..."
    why = REFUSED.get(str(names[0]), message[0].lower() + message[1:])
    return ApiError(f"{param} is {shown}; {why}", param=param, code="invalid_value")


_BRANCHES = {"str", "constrained-str", "int", "TextPart", "NamedTool", "text", "texts", "tokens", "lists"}
"""What pydantic puts into a place to say which of several types it tried."""


def openapi(version: str, names: list[str]) -> dict[str, Any]:
    """The API in OpenAPI's form, for tools that make clients or tests of it.

    Args:
        names: of the models that are served.
    """
    schemas: dict[str, Any] = {}
    for model in (ChatRequest, CompletionRequest, VerdictRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
        if "model" in schema["properties"]:
            schema["properties"]["model"] |= {"enum": names}
    text = {"type": "string"}
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": text,
                    "type": text,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }

    def answer(description: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
        return {"description": description, "content": {kind: {"schema": schema}}}

    error = answer("what is wrong", {"$ref": "#/components/schemas/Error"})
    errors = {str(status): error for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)}
    anything = {"type": "object"}

    def post(summary: str, model: type[BaseModel], *, streams: bool) -> dict[str, Any]:
        good = answer("the answer", anything)
        if streams:
            good["content"]["text/event-stream"] = {"schema": {}}
        body = {"required": True, "content": {"application/json": {"schema": _ref(model)}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {"200": good, **errors}}}

    def get(summary: str, kind: str = "application/json", schema: dict[str, Any] = anything) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": answer("the answer", schema, kind), **errors}}}

    named = get("one of them")
    named["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {**text, "enum": names}}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "grpo serve", "version": version},
        "paths": {
            "/v1/chat/completions": post("answer a conversation", ChatRequest, streams=True),
            "/v1/completions": post("continue texts", CompletionRequest, streams=True),
            "/v1/verdict": post("tell whether answers are right", VerdictRequest, streams=False),
            "/v1/models": get("the models that are served"),
            "/v1/models/{model}": named,
            "/health": get("whether the server can answer"),
            "/metrics": get("counts and times, for Prometheus", "text/plain", text),
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
