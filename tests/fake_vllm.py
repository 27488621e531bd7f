"""A double of vLLM 0.28: the classes and endpoints that grpo/rollout/vllm*.py uses, over a transformers model on the CPU.

Names, signatures, defaults and JSON shapes are vLLM's; a keyword that vLLM does not know is refused. It really samples,
with keys and values from a prefix cache that outlives a change of weights, so whoever forgets to load weights or to reset
the cache gets other log-probabilities. In two points it is harsher than vLLM, so that forgetting shows: sleep forgets the
cached keys and values but not that they were cached (vLLM empties the index too), and the server refuses unknown fields
of a request (vLLM ignores them).
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig


@dataclass
class SamplingParams:
    """Fields and defaults of vllm/sampling_params.py that a request may set."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if 0 < self.temperature < 1e-2:
            self.temperature = 1e-2
        if self.temperature == 0:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
        self.stop = self.stop or []
        self.stop_token_ids = self.stop_token_ids or []


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class Core:
    """What an LLM and a server have in common: a model, a prefix cache, and sampling as vllm/v1/sample/sampler.py does it."""

    def __init__(
        self, model: str, *, dtype: str, max_model_len: int, logprobs_mode: str, generation_config: str
    ) -> None:
        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len = max_model_len
        self.logprobs_mode = logprobs_mode
        assert logprobs_mode in ("raw_logprobs", "processed_logprobs"), logprobs_mode
        defaults = {} if generation_config == "vllm" else GenerationConfig.from_pretrained(model).to_diff_dict()
        self.eos = {self.lm.config.eos_token_id, *defaults.get("eos_token_id", [])}
        self.prefixes: dict[tuple[int, ...], Any] = {}

    @torch.no_grad()
    def run(self, request_id: str, prompt: list[int], params: SamplingParams) -> RequestOutput:
        if len(prompt) + (params.max_tokens or 0) > self.max_model_len:
            raise ValueError(f"the request has more than the max_model_len of {self.max_model_len} tokens")
        given = None if params.prompt_logprobs is None else self._prompt_logprobs(prompt)
        return RequestOutput(request_id, None, prompt, given, [self._complete(prompt, params)])

    def _complete(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        generator = torch.Generator()
        generator.manual_seed(params.seed) if params.seed is not None else generator.seed()
        cache, ids, logprobs = self._prefix(prompt), [], []
        token, reason, stop_reason = prompt[-1], None, None
        while reason is None:
            logits = self.lm(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float()
            token, logprob = self._sample(logits, params, generator)
            ids.append(token)
            logprobs.append({token: Logprob(logprob, 1, self.tokenizer.decode([token]))})
            reason, stop_reason = self._end(ids, params)
        text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        total = sum(place[token].logprob for token, place in zip(ids, logprobs, strict=True))
        return CompletionOutput(0, text, ids, total, None if params.logprobs is None else logprobs, reason, stop_reason)

    def _prefix(self, prompt: list[int]) -> DynamicCache:
        """Keys and values of all but the last token, from the cache if they are in it."""
        key = tuple(prompt[:-1])
        if not key:
            return DynamicCache()
        if key not in self.prefixes:
            self.prefixes[key] = self.lm(input_ids=torch.tensor([key]), past_key_values=DynamicCache()).past_key_values
        return copy.deepcopy(self.prefixes[key])

    def _sample(self, logits: Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
        raw = logits.log_softmax(-1)
        if params.temperature == 0:
            token = int(logits.argmax())
            return token, float(raw[token])
        logits = logits / params.temperature
        if params.min_p > 0:
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < params.min_p * probs.max(), -torch.inf)
        if params.top_k > 0:
            logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
        if params.top_p < 1:
            ordered, places = logits.sort()
            cut = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
            cut[-1] = False
            logits = logits.index_fill(0, places[cut], -torch.inf)
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        told = raw if self.logprobs_mode == "raw_logprobs" else logits.log_softmax(-1)
        return token, float(told[token])

    def _end(self, ids: list[int], params: SamplingParams) -> tuple[str | None, int | str | None]:
        if not params.ignore_eos and ids[-1] in self.eos:
            return "stop", None
        if ids[-1] in params.stop_token_ids:
            return "stop", ids[-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        for each in params.stop:
            if each in text:
                return "stop", each
        return ("length" if len(ids) == params.max_tokens else None), None

    def _prompt_logprobs(self, prompt: list[int]) -> list[dict[int, Logprob] | None]:
        """Past the prefix cache, at temperature 1 in both modes."""
        logprobs = self.lm(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
        return [
            None,
            *({token: Logprob(float(row[token]), 1)} for row, token in zip(logprobs, prompt[1:], strict=True)),
        ]

    @torch.no_grad()
    def reload_weights(
        self,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Tensors that are not given keep what they hold, as in vLLM, which only warns of them."""
        if weights_iterator is None:
            assert weights_path is not None, "the double knows no path of its own"
            files = sorted(Path(weights_path).glob("*.safetensors"))
            if not files:
                raise RuntimeError(f"Cannot find any model weights with `{weights_path}`")
            weights_iterator = [item for path in files for item in load_file(path).items()]
        own = dict(self.lm.named_parameters())
        for name, value in weights_iterator:
            own[name].copy_(value)

    def reset_prefix_cache(self) -> bool:
        self.prefixes.clear()
        return True


class LLM:
    """vllm.LLM with the keywords that are used here; the others of vllm.LLM and EngineArgs are left out."""

    instances: ClassVar[list[LLM]] = []

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        distributed_executor_backend: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        enable_sleep_mode: bool = False,
        enable_prefix_caching: bool | None = None,
    ) -> None:
        assert distributed_executor_backend == "external_launcher", "under torchrun nothing else finds its GPU"
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            assert name in os.environ, f"external_launcher reads {name}"
        assert torch.distributed.is_initialized(), "the process group is the trainer's"
        self.options = {name: value for name, value in locals().items() if name not in ("self", "name")}
        self.core = Core(
            model,
            dtype=dtype,
            max_model_len=max_model_len or 10**6,
            logprobs_mode=logprobs_mode,
            generation_config=generation_config,
        )
        self.asleep: set[str] = set()
        self.calls: list[str] = []
        self.count = 0
        LLM.instances.append(self)

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        assert not self.asleep, f"asleep: {self.asleep}"
        assert sampling_params is not None
        self.calls.append("generate")
        outputs = []
        for prompt, params in reversed(list(zip(prompts, sampling_params, strict=True))):  # ends in any order
            outputs.append(self.core.run(str(self.count), prompt["prompt_token_ids"], params))
            self.count += 1
        return outputs[::-1]

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        assert "weights" not in self.asleep, "the memory of the weights is not there"
        self.calls.append(method)
        assert method == "reload_weights", method
        return [self.core.reload_weights(*args, **(kwargs or {}))]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.core.reset_prefix_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.options["enable_sleep_mode"]
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            with torch.no_grad():
                for parameter in self.core.lm.parameters():
                    parameter.normal_()
        for cache in self.core.prefixes.values():
            for layer in cache.layers:
                layer.keys.normal_()

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake_up {tags}")
        self.asleep -= set(tags or self.asleep)


@contextmanager
def installed() -> Iterator[type[LLM]]:
    """`import vllm` finds the double."""
    module = ModuleType("vllm")
    module.__spec__ = type(sys.__spec__)("vllm", None)
    for each in (LLM, SamplingParams, RequestOutput, CompletionOutput):
        setattr(module, each.__name__, each)
    before = sys.modules.get("vllm")
    sys.modules["vllm"] = module
    LLM.instances.clear()
    try:
        yield LLM
    finally:
        if before is None:
            del sys.modules["vllm"]
        else:
            sys.modules["vllm"] = before


SAMPLING_FIELDS = {each.name for each in fields(SamplingParams)} - {"detokenize"}


class VLLMServer(ThreadingHTTPServer):
    """`vllm serve` with VLLM_SERVER_DEV_MODE=1, in a thread. Faults are switched on by its attributes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        defaults = {"dtype": "float32", "max_model_len": 120, "logprobs_mode": "processed_logprobs"}
        self.options = {**defaults, "generation_config": "vllm", **options}
        self.model = model
        self.lock = threading.Lock()
        self.released = threading.Event()  # what a hanging request waits for
        self.hang_on: str | None = None
        self.dev_mode = True
        self.keeps_tags = True  # vLLM 0.26 does not
        self.ignores_reload = self.keeps_prefix_cache = self.is_busy = False
        self.finish_reason: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.restart()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def restart(self) -> None:
        """As if it was ended and started again: the model's own weights."""
        self.core = Core(self.model, **self.options)
        self.weight_version = "default"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def end(self) -> None:
        self.released.set()
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()

    def __enter__(self) -> VLLMServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # Endpoints: method and path -> name of the method below.

    def get_v1_models(self, query: dict[str, Any]) -> dict[str, Any]:
        card = {"id": self.model, "object": "model", "root": self.model, "max_model_len": self.core.max_model_len}
        return {"object": "list", "data": [card]}

    def get_server_info(self, query: dict[str, Any]) -> dict[str, Any]:
        assert query == {"config_format": ["json"]}, query
        told = {**self.options, "model": self.model, "dtype": f"torch.{self.options['dtype']}"}
        return {"vllm_config": {"model_config": told}, "vllm_env": {}, "system_env": {}}

    def get_weight_info(self, query: dict[str, Any]) -> dict[str, Any]:
        return {"weight_version": self.weight_version}

    def post_update_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        (self.weight_version,) = body.values()
        return {"success": True, "new_version": body["new_version"]}

    def post_reset_prefix_cache(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.keeps_prefix_cache:
            self.core.reset_prefix_cache()
        return {"success": not self.is_busy}

    def post_collective_rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        assert set(body) <= {"method", "args", "kwargs", "timeout"}, body
        assert body["method"] == "reload_weights", body
        if not self.ignores_reload:
            self.core.reload_weights(*body.get("args", []), **body.get("kwargs", {}))
        return {"results": [None]}

    def post_v1_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        body = dict(body)
        model, prompt = body.pop("model"), body.pop("prompt")
        want_ids = body.pop("return_token_ids", False)
        assert model == self.model, model
        assert set(body) <= SAMPLING_FIELDS, set(body) - SAMPLING_FIELDS
        output = self.core.run("0", prompt, SamplingParams(**body))
        (completion,) = output.outputs
        logprobs = completion.logprobs and [
            place[token].logprob for token, place in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        given = output.prompt_logprobs and [
            place and {str(token): asdict(each) for token, each in place.items()} for place in output.prompt_logprobs
        ]
        choice = {
            "index": 0,
            "text": completion.text,
            "logprobs": logprobs
            and {
                "text_offset": [0] * len(logprobs),
                "token_logprobs": logprobs,
                "tokens": [self.core.tokenizer.decode([token]) for token in completion.token_ids],
                "top_logprobs": [{} for _ in logprobs],
            },
            "finish_reason": self.finish_reason or completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "token_ids": completion.token_ids if want_ids else None,
            "prompt_logprobs": given,
            "prompt_token_ids": prompt if want_ids else None,
        }
        return {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": model, "choices": [choice]}


DEV_ENDPOINTS = ("server_info", "weight_info", "update_weight_version", "reset_prefix_cache", "collective_rpc")


class _Handler(BaseHTTPRequestHandler):
    server: VLLMServer

    def do_GET(self) -> None:
        self._answer("get", parse_qs(urlsplit(self.path).query))

    def do_POST(self) -> None:
        self._answer("post", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, verb: str, argument: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        name = path.strip("/").replace("/", "_")
        self.server.requests.append({"path": path, **argument})
        if self.server.hang_on == path:
            self.server.released.wait(60)
        endpoint = getattr(self.server, f"{verb}_{name}", None)
        lacks_tags = name in ("weight_info", "update_weight_version") and not self.server.keeps_tags
        if endpoint is None or lacks_tags or (name in DEV_ENDPOINTS and not self.server.dev_mode):
            return self._send(404, {"detail": "Not Found"})
        try:
            with self.server.lock:
                return self._send(200, endpoint(argument))
        except Exception as error:
            return self._send(500, {"error": {"message": str(error), "type": type(error).__name__, "code": 500}})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Not into the output of the tests."""
