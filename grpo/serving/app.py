"""The endpoints: OpenAI's chat and completions over the models that are hosted, and what a page and a monitor need.

POST /v1/chat/completions, /v1/completions     GET /v1/models     POST /v1/verdict
GET /health, /metrics, /openapi.json           GET / (the page)
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from grpo.serving import protocol
from grpo.serving.generation import Asked, Generation, Piece, timed_out
from grpo.serving.metrics import Metrics
from grpo.serving.models import Hosted
from grpo.serving.protocol import GREEDY_BELOW, ApiError, ChatRequest, CompletionRequest, GenerationRequest, NamedTool
from grpo.serving.replies import ChatReply, CompletionReply
from grpo.serving.scheduler import TopLogprobs, Update, Worker
from grpo.serving.text import Calls
from grpo.serving.verdicts import Verifier
from grpo.system.build import own_version
from grpo.system.out_of_memory import is_out_of_memory
from grpo.types import Sampling

LARGEST_BODY = 32 * 2**20
"""Bytes of a request."""

STALLED_SECONDS = 5.0
"""After a request's time is over, until a client that does not read its stream is given up."""

FOLDER = Path(__file__).parent
PAGE_FILES = {
    "chat.html": (FOLDER / "page" / "chat.html", "text/html"),
    "chat.css": (FOLDER / "page" / "chat.css", "text/css"),
    "chat.js": (FOLDER / "page" / "chat.js", "text/javascript"),
    "report.css": (FOLDER.parent / "report" / "page.css", "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'"
)
"""The page loads and asks this server alone."""

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        max_queue: completions of a model that may wait for a slot.
        seconds: of a request.
        api_key: what a client has to show; None: nothing.
        only_local: whether a request may name another host than this machine: a page of another site, whose name was made to
            point here, does.
    """

    max_queue: int = 256
    seconds: float = 600.0
    api_key: str | None = None
    only_local: bool = True


class Server:
    """The state behind the endpoints. All but the worker's thread runs in the event loop."""

    def __init__(self, models: list[Hosted], limits: Limits) -> None:
        self.models = {hosted.name: hosted for hosted in models}
        self.limits = limits
        self.metrics = Metrics()
        self.worker = Worker([hosted.scheduler for hosted in models], self._deliver)
        self.verifier = Verifier()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_open = dict.fromkeys(self.models, 0)  # completions of each model

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.show_model),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/verdict", self.verdict, methods=["POST"]),
            Route("/openapi.json", self.describe),
            Route("/", self.page),
            *(Route(f"/{name}", self.page) for name in PAGE_FILES),
        ]
        handlers: dict[Any, Any] = {ApiError: _answer_error, HTTPException: _answer_http, Exception: _answer_crash}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        app.add_middleware(_Guard, server=self)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.stop)
            await run_in_threadpool(self.verifier.close)

    def _deliver(self, updates: list[Update]) -> None:
        """Called by the worker's thread."""
        assert self._loop is not None, "the worker starts in the loop's lifespan"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for it
            self._loop.call_soon_threadsafe(_spread, updates)

    # ---- endpoints

    async def chat(self, request: Request) -> Response:
        asked = await _read(request, ChatRequest)
        hosted = self._hosted(asked.model)
        kwargs, tools = asked.chat_template_kwargs, asked.told_tools
        tags = await run_in_threadpool(hosted.call_tags) if tools else None
        begun = "" if tags is None else _begun(asked, tags)
        prompt, thinks = await run_in_threadpool(hosted.chat_prompt, asked.messages, kwargs, tools, begun)
        num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        calls = None
        if tags is not None:
            calls = partial(Calls, tags, 1 if asked.parallel_tool_calls is False else None, begun)
        generation = self._generation(
            hosted, asked, [prompt], [thinks], wants_logprobs=num_top is not None, calls=calls
        )
        return await self._answer(request, asked, ChatReply(generation, num_top))

    async def complete(self, request: Request) -> Response:
        asked = await _read(request, CompletionRequest)
        hosted = self._hosted(asked.model)
        if len(asked.prompts) * asked.num_choices > protocol.MOST_CHOICES:
            raise ApiError(
                f"prompt has {len(asked.prompts)} prompts with n {asked.num_choices}; a request has at most "
                f"{protocol.MOST_CHOICES} completions. Ask for fewer at once.",
                param="prompt",
            )
        prompts = await run_in_threadpool(lambda: [hosted.raw_prompt(each) for each in asked.prompts])
        generation = self._generation(
            hosted, asked, prompts, None, wants_logprobs=asked.logprobs is not None, keeps_end=asked.scores_prompts
        )
        echo = [hosted.ending.text(prompt) for prompt in prompts] if asked.echo else None
        scores = await self._scores(request, hosted, prompts) if asked.scores_prompts else None
        return await self._answer(request, asked, CompletionReply(generation, asked.logprobs, echo=echo, scores=scores))

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(hosted) for hosted in self.models.values()]})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(_described(self._hosted(request.path_params["model"])))

    async def verdict(self, request: Request) -> Response:
        asked = await _read(request, protocol.VerdictRequest)
        future = self.verifier.ask(asked.completions, asked.answer, asked.question, self.limits.seconds)
        found = await _unless_left(request, asyncio.wrap_future(future))
        return JSONResponse({"verdicts": found})

    async def page(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/") or "chat.html"
        path, kind = PAGE_FILES[name]
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return Response(path.read_bytes(), media_type=kind, headers=headers)

    async def health(self, request: Request) -> Response:
        if not self.worker.is_alive:
            return JSONResponse({"status": "the server has lost its device"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        for name, hosted in self.models.items():
            slots = hosted.scheduler.slots
            num_running = len(slots.running)
            self.metrics.set("grpo_sequences_running", num_running, model=name)
            self.metrics.set("grpo_sequences_waiting", max(self._num_open[name] - num_running, 0), model=name)
            self.metrics.set("grpo_slots", slots.num_slots, model=name)
            self.metrics.set("grpo_pages_free", slots.num_free_pages, model=name)
            self.metrics.set("grpo_pages", slots.num_pages, model=name)
            self.metrics.set("grpo_preempted_total", hosted.scheduler.num_preempted, model=name)
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def describe(self, request: Request) -> Response:
        return JSONResponse(protocol.openapi(own_version() or "0", list(self.models)))

    # ---- generating

    def _hosted(self, name: str) -> Hosted:
        if name not in self.models:
            raise ApiError(
                f"model is {name[:200]!r}; there is {', '.join(self.models)}. Name one of them.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def _generation(
        self,
        hosted: Hosted,
        asked: GenerationRequest,
        prompts: list[list[int]],
        thinks: list[bool] | None,
        *,
        wants_logprobs: bool,
        keeps_end: bool = False,
        calls: Callable[[], Calls] | None = None,
    ) -> Generation:
        limits = [hosted.token_limit(asked.token_limit, prompt) for prompt in prompts]
        how = Asked(
            _sampling(asked, hosted.sampling, max(limits)),
            secrets.randbits(62) if asked.seed is None else asked.seed,
            asked.num_choices,
            wants_logprobs,
            bool(asked.ignore_eos),
            keeps_end,
        )
        return Generation(hosted, self.worker, prompts, limits, how, thinks, self.limits.seconds, calls)

    async def _scores(self, request: Request, hosted: Hosted, prompts: list[list[int]]) -> list[list[TopLogprobs]]:
        """Log-probabilities of the prompts' tokens, one prompt after the other.

        Raises:
            ApiError: as for completions.
        """
        number = len(prompts)
        self._enter(hosted, number, f"prompt has {number} prompts", "prompt")

        async def score() -> list[list[TopLogprobs]]:
            of = self.worker.score
            return [await asyncio.wrap_future(of(hosted.scheduler, prompt)) for prompt in prompts]

        try:
            return await _unless_left(request, asyncio.wait_for(score(), self.limits.seconds))
        except TimeoutError:
            raise timed_out(self.limits.seconds) from None
        except (RuntimeError, FloatingPointError) as error:
            why = "out of memory" if isinstance(error, RuntimeError) and is_out_of_memory(error) else str(error)
            raise ApiError(f"{hosted.name} failed: {why}", status=500, type="server_error", code="failed") from None
        finally:
            self._num_open[hosted.name] -= number

    async def _answer(self, request: Request, asked: GenerationRequest, reply: ChatReply) -> Response:
        self._admit(reply.generation)
        if asked.stream:
            return _Stream(self, reply, include_usage=asked.include_usage, continuous=asked.continuous_usage)
        try:
            pieces = await _unless_left(request, _all(reply.generation))
        finally:
            self._close(reply.generation)
        return JSONResponse(reply.whole(pieces))

    def _admit(self, generation: Generation) -> None:
        """Let a request in, or not; see `_enter`."""
        number = len(generation.sequences)
        told = f"n is {generation.asked.num_choices}, which makes {number} completions"
        self._enter(generation.hosted, number, told, "n")
        generation.start()

    def _enter(self, hosted: Hosted, number: int, told: str, param: str) -> None:
        """Count so many more completions of a model.

        Raises:
            ApiError: too many are waiting, or the device is gone.
        """
        if not self.worker.is_alive:
            raise ApiError("the server has lost its device.", status=503, type="server_error", code="failed")
        name = hosted.name
        most = hosted.scheduler.slots.num_slots + self.limits.max_queue
        if number > most:
            raise ApiError(f"{told}; {most} may run or wait. Ask for fewer at once.", param=param)
        if self._num_open[name] + number > most:
            raise ApiError(
                f"{self._num_open[name]} completions of {name} run or wait, and {most} may. Try again later.",
                status=429,
                type="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )
        self._num_open[name] += number

    def _close(self, generation: Generation) -> None:
        """Of a request that has ended, one way or another: free what it holds, and count it."""
        generation.leave()
        name, now, metrics = generation.hosted.name, time.monotonic(), self.metrics
        self._num_open[name] -= len(generation.sequences)
        metrics.add("grpo_prompt_tokens_total", generation.num_prompt_tokens, model=name)
        metrics.add("grpo_completion_tokens_total", generation.num_completion_tokens, model=name)
        metrics.observe("grpo_request_seconds", now - generation.arrived, model=name)
        if generation.first_token is None:
            return
        metrics.observe("grpo_time_to_first_token_seconds", generation.first_token - generation.arrived, model=name)
        longest = max(len(answer.tokens) for answer in generation.answers)
        if longest > 1:
            seconds = (now - generation.first_token) / (longest - 1)
            metrics.observe("grpo_time_between_tokens_seconds", seconds, model=name)


def _spread(updates: list[Update]) -> None:
    for update in updates:
        update.sequence.owner.receive(update)


def _begun(asked: ChatRequest, tags: tuple[str, str]) -> str:
    """How an answer begins that has to be a call, of whatever tool or of the one that is named."""
    if isinstance(asked.tool_choice, NamedTool):
        return f'{tags[0]}\n{{"name": {json.dumps(asked.tool_choice.function.name)}, "arguments": '
    return f"{tags[0]}\n" if asked.tool_choice == "required" else ""


def _sampling(asked: GenerationRequest, usual: Sampling, limit: int) -> Sampling:
    """As a request says, else as the run has it."""

    def of(name: str) -> Any:
        value = getattr(asked, name)
        return getattr(usual, name) if value is None else value

    temperature = of("temperature")
    return Sampling(
        limit,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(of("top_k"), 0),
        top_p=of("top_p"),
        min_p=of("min_p"),
        stop=usual.stop if asked.stop is None else asked.stops,
    )


def _described(hosted: Hosted) -> dict[str, Any]:
    sampling = hosted.sampling
    return {
        "id": hosted.name,
        "object": "model",
        "created": hosted.created,
        "owned_by": "grpo",
        "max_model_len": hosted.max_context,
        "step": hosted.step,
        "template": hosted.data.template,
        "has_history": hosted.has_history,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
        },
    }


async def _all(generation: Generation) -> list[Piece]:
    return [piece async for some in generation.pieces() for piece in some]


class _Left(Exception):
    """The client has gone."""


T = TypeVar("T")


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is given up as soon as the client leaves.

    Raises:
        _Left: it did.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        for each in (working, watching):
            each.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class _Stream(StreamingResponse):
    """Server-sent events, as long as the client is there."""

    def __init__(self, server: Server, reply: ChatReply, *, include_usage: bool, continuous: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self._server, self._reply = server, reply
        self._include_usage, self._continuous = include_usage, continuous
        self._has_ended = False  # with an answer or an error, and not because the client left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._reply.generation
        try:
            left = generation.arrived + generation.seconds - time.monotonic() + STALLED_SECONDS
            with contextlib.suppress(
                TimeoutError
            ):  # sending waits for a client that does not read, for as long as it likes
                await asyncio.wait_for(super().__call__(scope, receive, send), left)
        finally:
            if not self._has_ended:
                self._server.metrics.add("grpo_clients_left_total")
            self._server._close(generation)

    async def _events(self) -> AsyncIterator[str]:
        reply = self._reply
        yield self._several(reply.first_chunks())
        try:
            async for pieces in reply.generation.pieces():
                found = [chunk for piece in pieces if (chunk := reply.chunk(piece)) is not None]
                if found:
                    yield self._several(found)
            if self._include_usage:
                suffix = ".chunk" if reply.kind.startswith("chat") else ""
                yield _event({**reply.envelope([], suffix), "usage": reply.generation.usage()})
        except ApiError as error:
            yield _event(error.body())
        self._has_ended = True
        yield "data: [DONE]\n\n"

    def _several(self, chunks: list[dict[str, Any]]) -> str:
        more: dict[str, Any] = {"usage": None} if self._include_usage else {}
        if self._continuous:
            more = {"usage": self._reply.generation.usage()}
        return "".join(_event({**chunk, **more}) for chunk in chunks)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


# ---- reading requests ------------------------------------------------------------------------------------------------


async def _read(request: Request, kind: type[R]) -> R:
    """The body of a request.

    Raises:
        ApiError: it is too large, no JSON, or not as it has to be.
    """
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > LARGEST_BODY:
            raise ApiError(
                f"the request is larger than {LARGEST_BODY // 2**20} MiB. Shorten it.", status=413, code="too_large"
            )
    parse = _parse if len(data) < 100_000 else (lambda *each: run_in_threadpool(_parse_now, *each))
    return await parse(bytes(data), kind)


async def _parse(data: bytes, kind: type[R]) -> R:
    return _parse_now(data, kind)


def _parse_now(data: bytes, kind: type[R]) -> R:
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError("the body is not a JSON object.", code="invalid_json")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise protocol.error_of(error) from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


class _Guard:
    """In front of everything: who may ask, and a count of what was answered."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client left before there was an answer

        async def count(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._refusal(scope)
            if error is not None:
                await _answer_error(None, error)(scope, receive, count)
            else:
                await self.app(scope, receive, count)
        except (_Left, ClientDisconnect):
            self.server.metrics.add("grpo_clients_left_total")
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self.server.metrics.add("grpo_requests_total", path=path, status=str(status))

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, limits = headers.get("host", ""), self.server.limits
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if limits.only_local and not is_loopback(name):
            return ApiError(
                f"the request names the host {host[:100]!r}; this server answers as localhost. Start it with --host.",
                status=403,
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return ApiError("pages of other sites may not ask this server.", status=403, code="wrong_origin")
        if limits.api_key is None or not scope["path"].startswith(("/v1", "/metrics", "/openapi.json")):
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if kind.lower() == "bearer" else ""
        if hmac.compare_digest(given.encode("latin-1"), limits.api_key.encode()):
            return None
        return ApiError(
            "the API key is missing or wrong. Send it as Authorization: Bearer KEY.",
            status=401,
            type="authentication_error",
            code="invalid_api_key",
        )


def is_loopback(name: str) -> bool:
    """Whether the host of a request is this machine's own address, of which there are 2^24."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


_PATHS = {"/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/verdict", "/health", "/metrics"}


def _answer_error(request: Request | None, error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _answer_http(request: Request, error: HTTPException) -> Response:
    found = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    response = _answer_error(request, found)
    response.headers.update(error.headers or {})
    return response


def _answer_crash(request: Request, error: Exception) -> Response:
    found = ApiError("the server failed; its log says more.", status=500, type="server_error", code="failed")
    return _answer_error(request, found)
