"""A `vllm serve` that runs elsewhere, reached over HTTP.

New weights go through a directory that both sides see: the main process writes them under a name never used before, and
the server reads them from there (`reload_weights` with `weights_path`) or fails; it cannot read older ones. vLLM answers
without proof, so its log-probabilities of some plain text must then be near the policy's, and must have moved if those
have. The server also keeps a tag of its weights: it tells, before each sampling, one that was restarted or that another
run has taken. One that keeps none (vLLM 0.26) is asked for the plain text again.
"""

from __future__ import annotations

import json
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib import request as http
from urllib.error import HTTPError

import torch
from torch import Tensor

from grpo.policy.language_model import resolve_dtype
from grpo.policy.model_source import source_of
from grpo.policy.policy import Policy
from grpo.policy.sampled_model import FORWARD_TOLERANCE, PLAIN_SENTENCES
from grpo.rollout.vllm_engine import OnAnswer, Request, Sampled
from grpo.system import progress

if TYPE_CHECKING:
    from grpo.config import Config

MOVED = 1e-3
"""A mean change in nats of the plain text's log-probabilities that tells new weights from the same ones read again."""


class ServerError(RuntimeError):
    """The server did not do what it was asked; the message says what and why."""


class NoSuchPathError(ServerError):
    """This version of the server does not have what it was asked for."""


class Server:
    """The few calls of a vLLM server that we make. A server that is silent for `timeout` seconds is taken for dead."""

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._opener = http.build_opener(http.ProxyHandler({}))  # the environment's proxy is for the world outside

    def get(self, path: str) -> Any:
        return self._call(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call(path, json.dumps(body).encode())

    def waiting(self) -> AbstractContextManager[None]:
        """Within it, this process may wait for an answer; `timeout` holds for each piece of it."""
        return progress.busy("waiting for the vLLM server", 2 * self.timeout)

    def _call(self, path: str, data: bytes | None) -> Any:
        request = http.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self.waiting(), self._opener.open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"null")
        except HTTPError as error:
            reason = f"answered {error.code} to {path}: {error.read().decode(errors='replace')[:1000]}"
            if error.code == 404:
                raise NoSuchPathError(f"vllm.url is {self.url!r}; the server there {reason}") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = f"gave no answer to {path} within vllm.timeout_seconds ({self.timeout:g}): {error!r}"
        raise ServerError(f"vllm.url is {self.url!r}; the server there {reason}")


class ServedEngine:
    """See Engine in grpo/rollout/vllm_engine.py. The server may hold any weights at first, so it takes the policy's at once."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy = policy
        self.config = config
        self.server = _server(config)
        self.model = _find_model(self.server, config)["id"]
        tokens = policy.tokenizer(" ".join(PLAIN_SENTENCES), add_special_tokens=False)["input_ids"]
        self.plain_tokens = tokens[: config.max_sequence_tokens - 1]
        self.directories = (Path(config.vllm.sync_dir or "") / f"weights-{uuid.uuid4().hex}-{n}" for n in count())
        self.seen: tuple[Tensor, Tensor] | None = None  # what policy and server said of the text when it last moved
        self.told: Tensor | None = None  # what the server said of it last, on the main process
        self.keeps_tags = _keeps_tags(self.server)
        self.take_weights()

    def generate(self, requests: list[Request], on_answer: OnAnswer) -> None:
        """See Engine."""
        self._check_current()
        with ThreadPoolExecutor(min(len(requests), self.config.memory.max_sequences)) as pool, self.server.waiting():
            places = {pool.submit(self._complete, request): place for place, request in enumerate(requests)}
            try:
                for answer in as_completed(places):
                    progress.tick()
                    on_answer(places[answer], answer.result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error: nobody wants the rest

    def _complete(self, request: Request) -> Sampled:
        body = {"model": self.model, "prompt": request.token_ids, "return_token_ids": True, **request.parameters}
        (choice,) = self.server.post("/v1/completions", body)["choices"]
        return Sampled(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])

    def take_weights(self) -> None:
        """The main process hands them over; its failure is raised on every process, so that none waits for it."""
        self.taken, self.taken_version = self._policy_logprobs(), self.policy.weights_version
        self.version, problem = self.policy.processes.broadcast(self._hand_over())
        if problem is not None:
            raise ServerError(problem)

    def _hand_over(self) -> tuple[str, str | None]:
        """Every process takes part, since each may hold a share of the weights; what the main one says counts."""
        directory, problem = next(self.directories).resolve(), None
        try:
            self.policy.export(directory)
            if self.policy.processes.is_main:
                self._load(directory)
                self._check_loaded()
        except (ServerError, OSError) as error:
            problem = f"{error}\nSo the server may not have the policy's weights, which lay in {directory}."
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return directory.name, problem

    def _load(self, directory: Path) -> None:
        arguments = {"weights_path": str(directory)}
        self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        if not self.server.post("/reset_prefix_cache", {})["success"]:
            raise ServerError(
                f"vllm.url is {self.server.url!r}; the server there did not reset its prefix cache, as it does while it works "
                "on other requests. This run needs a server of its own."
            )
        if self.keeps_tags:
            self.server.post("/update_weight_version", {"new_version": directory.name})

    def _check_loaded(self) -> None:
        ours, theirs = self.taken, self._server_logprobs()
        # single unlikely tokens of plain text differ more than sampled ones on average
        own, dtype = self.config.algorithm.max_sampling_gap, self.policy.dtype
        gap, limit = _distance(ours, theirs), FORWARD_TOLERANCE[dtype] if own is None else own
        if not gap <= limit:
            raise ServerError(
                f"vllm.url is {self.server.url!r}; the server's log-probabilities of plain text are {gap:.3g} nats off the "
                f"policy's on average, more than {limit}; algorithm.max_sampling_gap sets another limit."
            )
        before = self.seen or (ours, theirs)
        moved = _distance(ours, before[0])
        if moved > MOVED and _distance(theirs, before[1]) < moved / 10:
            raise ServerError(
                f"vllm.url is {self.server.url!r}; the policy's log-probabilities of plain text have moved by {moved:.3g} nats "
                "on average and the server's have not: it kept its old weights."
            )
        if self.seen is None or moved > MOVED:
            self.seen = ours, theirs
        self.told = theirs

    def _check_current(self) -> None:
        """The weights that the server took last are still those of the policy, and still the server's."""
        changes = self.policy.weights_version - self.taken_version
        # else to ask the policy is a collective, and a process that has nothing to sample does not come here
        moved = _distance(self._policy_logprobs(), self.taken) if self.policy.holds_whole else 0.0
        if changes or moved > MOVED:
            raise RuntimeError(
                f"the policy's weights have changed since the server took them ({changes} times; its log-probabilities of plain "
                f"text have moved by {moved:.3g} nats); sync() belongs after every update and after a checkpoint is restored."
            )
        if self.keeps_tags:
            tag = self.server.get("/weight_info")["weight_version"]
            other = None if tag == self.version else f"weights {tag!r} and not {self.version!r}, which it was given"
        else:  # no collective: a process that has nothing to sample does not come here
            other = self._other_weights() if self.policy.processes.is_main else None
        if other is not None:
            raise ServerError(
                f"vllm.url is {self.server.url!r}; the server has {other}: it was restarted, or another run uses it. Go on with "
                "run.resume=auto and a server of its own."
            )

    def _other_weights(self) -> str | None:
        """How the server's weights differ from those that it was given."""
        assert self.told is not None, "it is asked after the weights were handed over"
        moved = _distance(self._server_logprobs(), self.told)
        return None if moved <= MOVED else f"other weights than it was given, {moved:.3g} nats off on average"

    def _policy_logprobs(self) -> Tensor:
        """Of each token of the plain text but the first, at temperature 1; on the CPU."""
        ids = torch.tensor([self.plain_tokens], device=self.policy.processes.device)
        return self.policy.sentence_logprobs(ids, temperature=1.0)[0].cpu()

    def _server_logprobs(self) -> Tensor:
        """The same from the server. vLLM computes them anew, past its prefix cache, and before any temperature."""
        body = {"model": self.model, "prompt": self.plain_tokens, "max_tokens": 1, "prompt_logprobs": 0}
        places = self.server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        known = zip(self.plain_tokens[1:], places[1:], strict=True)
        return torch.tensor([place[str(token)]["logprob"] for token, place in known])


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def _keeps_tags(server: Server) -> bool:
    try:
        server.get("/weight_info")
    except NoSuchPathError:
        return False
    return True


def _server(config: Config) -> Server:
    assert config.vllm.url is not None, "Config refuses vllm.mode server without vllm.url"
    return Server(config.vllm.url, timeout=config.vllm.timeout_seconds)


def check_server(config: Config) -> None:
    """Raises ValueError unless the server is there and can do what the run needs."""
    server = _server(config)
    try:
        _find_model(server, config)
        _check_options(server, config)
    except ServerError as error:
        raise ValueError(
            f"{error}. Start `vllm serve` with VLLM_SERVER_DEV_MODE=1 as docs/vllm.md says, or correct vllm.url."
        ) from error


def _find_model(server: Server, config: Config) -> dict[str, Any]:
    """The server's entry for the model that the policy starts from."""
    name, served = source_of(config.model).base, server.get("/v1/models")["data"]
    found = next((model for model in served if name in (model["id"], model["root"])), None)
    if found is None:
        raise ValueError(
            f"vllm.url is {server.url!r}; the server there serves {', '.join(repr(model['id']) for model in served)} and not "
            f"model.name {name!r}. Start it with `vllm serve {name}`, or correct vllm.url or model.name."
        )
    if found["max_model_len"] < config.max_sequence_tokens:
        raise ValueError(
            f"vllm.url is {server.url!r}; the server there takes {found['max_model_len']} tokens, and a sequence may have "
            f"{config.max_sequence_tokens} (data.max_prompt_tokens + rollout.max_completion_tokens). Start it with "
            f"--max-model-len {config.max_sequence_tokens}, or lower one of the two."
        )
    return found


def _check_options(server: Server, config: Config) -> None:
    """What a request cannot say must have been said when the server was started."""
    options = server.get("/server_info?config_format=json")["vllm_config"]["model_config"]
    needed = {
        "logprobs_mode": config.vllm_logprobs_mode,
        "generation_config": "vllm",
        "dtype": str(resolve_dtype(config.model.dtype)),
    }
    for name, value in needed.items():
        if options[name] != value:
            raise ValueError(
                f"vllm.url is {server.url!r}; the server there has {name} {options[name]!r}, and the log-probabilities of this "
                f"run need {value!r}. Start it with --{name.replace('_', '-')} {value.removeprefix('torch.')}."
            )
