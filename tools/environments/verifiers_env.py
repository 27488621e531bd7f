"""Environments of the package verifiers (Prime Intellect), in whose form many have been published.

Those that answer a model's turns: `MultiTurnEnv` and what is made of it, as verifiers 0.3 has them (`verifiers.legacy`). From 0.4
on verifiers runs a program that asks the model by itself, and there is nothing here that could answer a turn.

A worker loads the environment once. What an episode has, `state`, comes and goes with its object; it has no client, since the
model is sampled by the trainer, and an environment that asks one fails.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import verifiers as vf
from verifiers.clients import Client
from verifiers.utils.message_utils import concat_messages, maybe_normalize_messages

T = TypeVar("T")

NOT_KEPT = ("client", "usage", "usage_tracker")
"""Of a state, what its environment makes anew or the trainer does."""


class of_verifiers:
    """An environment as `verifiers.load_environment(env, **args)` makes it. Its rubric is the reward.

    Args:
        env: its id: the name of its module, which is installed or importable.
        args: what its `load_environment` is given.
    """

    def __init__(self, env: str, args: dict[str, Any] | None = None) -> None:
        self.env, self.args = env, json.dumps(args or {}, sort_keys=True)

    @staticmethod
    def rows(size: int, seed: int, env: str, args: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of its data set from `seed` on; those behind its end are of its evaluation set."""
        made = _loaded(env, json.dumps(args or {}, sort_keys=True))
        own = made.get_dataset()
        rows = own.select(range(seed, min(seed + size, len(own)))) if seed < len(own) else made.get_eval_dataset(size)
        return [_row(row) for row in rows]

    def reset(self, given: str) -> None:
        env = self._made()
        self.state, self.messages, self.has_begun = {}, [], False
        try:
            self.state = _run(env.init_state(json.loads(given), _NoClient(None), "policy"))
            self.state = _run(env.setup_state(self.state)) or self.state
            self.messages = list(
                maybe_normalize_messages(_run(env.get_prompt_messages(self.state)), field_name="prompt")
            )
        except vf.Error:  # such as that of a sandbox which does not start
            return
        self.has_begun = True
        self._let_go()

    def step(self, text: str) -> list[str] | None:
        if not self.has_begun:
            return None
        env, state = self._made(), self.state
        said = [vf.AssistantMessage(content=text)]
        step = {"prompt": self.messages, "completion": said, "response": None, "tokens": None, "reward": None}
        more = {"advantage": None, "is_truncated": False, "trajectory_id": state["trajectory_id"], "extras": {}}
        before, found = concat_messages([self.messages, said]), list[Any]()
        try:
            _run(env.add_trajectory_step(state, {**step, **more}))
            if not _run(env.is_completed(state)):
                found = list(maybe_normalize_messages(_run(env.get_prompt_messages(state)), field_name="env_response"))
        except (
            vf.Error
        ) as error:  # such as that of a call which the model wrote badly; it ends the episode, as in theirs
            state["error"] = error
        if _run(env.is_completed(state)):
            return None
        self.messages = found
        self._let_go()
        return [str(message.content) for message in found[len(before) :]]

    def reward(self) -> float | None:
        """None: it could not begin, of which no answer is to blame."""
        env = self._made()
        if not self.has_begun:
            with suppress(vf.Error, KeyError):  # of a state that is half made
                _run(env.cleanup(self.state))
            return None
        _run(env.cleanup(self.state))
        _run(env.rubric.score_rollout(self.state))
        return float(self.state["reward"])

    def _made(self) -> Any:
        return _loaded(self.env, self.args)

    def _let_go(self) -> None:
        for name in NOT_KEPT:
            self.state.pop(name, None)


class _NoClient(Client):
    """Takes the place of the model that an environment would ask."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("the environment asks the model by itself, which is the trainer's to do")

    setup_client = to_native_tool = to_native_prompt = get_native_response = _refuse
    raise_from_native_response = from_native_response = close = _refuse


@lru_cache(maxsize=4)
def _loaded(env: str, args: str) -> Any:
    made = vf.load_environment(env, **json.loads(args))
    if not isinstance(made, vf.MultiTurnEnv):
        raise ValueError(
            f"environment.args.env is {env!r}, a {type(made).__name__}; a MultiTurnEnv answers turns. Name one."
        )
    if made.tool_defs:
        raise ValueError(
            f"environment.args.env is {env!r}, whose model calls tools; here tools are functions in tools.functions. Name "
            "another."
        )
    if made.rubric.has_group_rewards:
        raise ValueError(
            f"environment.args.env is {env!r}, whose rubric has rewards of a whole group; here an episode is scored alone. Name "
            "another."
        )
    return made


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`question` is the prompt, `given` the row as verifiers has it."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if len(prompt) == 1 and prompt[0]["role"] == "user":
            prompt = prompt[0]["content"]
    return {"question": prompt, "answer": str(row.get("answer") or ""), "given": json.dumps(row, default=str)}


_loop = asyncio.new_event_loop()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """All in one loop, to which an environment's locks belong."""
    return _loop.run_until_complete(work)
