"""A run in a kernel of Jupyter's, as a notebook starts one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from helpers import ROOT, TINY, clean_environment

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

TIMEOUT = 100.0


class Kernel:
    """Runs code as the cells of a notebook, and answers with what a notebook shows."""

    def __init__(self, process: Any, client: BlockingKernelClient) -> None:
        self.process, self.client = process, client

    def run(self, code: str, interrupt_after: str = "") -> list[tuple[str, dict[str, Any]]]:
        """Kind and content of each message. `interrupt_after`: text of the message at which the stop button is pressed."""
        request, shown = self.client.execute(code), []
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT)
            if message["parent_header"].get("msg_id") != request:
                continue
            shown.append((message["msg_type"], message["content"]))
            if interrupt_after and interrupt_after in str(message["content"]):
                interrupt_after = ""
                self.process.send_signal(signal.SIGINT)
            if shown[-1] == ("status", {"execution_state": "idle"}):
                return shown


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    place, _ = write_connection_file(str(tmp_path / "kernel.json"))
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython"), "TERM": ""}
    environment.pop("MPLBACKEND", None)
    arguments = ["-m", "ipykernel_launcher", "-f", place]
    process = warm.Process(arguments, env=environment, cwd=tmp_path, stdout=warm.DEVNULL, stderr=warm.DEVNULL)
    client = BlockingKernelClient(connection_file=place)
    client.load_connection_file()
    client.start_channels(hb=False)  # a loaded machine's beats come late
    try:
        client.wait_for_ready(timeout=TIMEOUT)
        yield Kernel(process, client)
    finally:
        client.stop_channels()
        process.kill()
        process.wait(10)


def text_of(shown: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(content["text"] for kind, content in shown if kind == "stream")


MAKE = f"""
from grpo import Trainer
calls = []
def brief(completion: str) -> float:
    calls.append(1)
    return 1 / (1 + len(completion))
rows = [{{"question": f"What is {{i}}+1?", "answer": str(i + 1)}} for i in range(8)]
few = {{
    "data.template": "chat", "data.max_prompt_tokens": 96, "rollout.num_prompts": 4, "rollout.group_size": 2,
    "rollout.max_completion_tokens": 8, "distributed.zero_stage": 0, "scoring.num_workers": 1, "preflight.num_questions": 0,
    "memory.micro_batch_tokens": 256, "run.dir": "run", "run.steps": 300, "run.resume": "auto", "algorithm.kl_coef": 0.0,
}}
def trainer():
    return Trainer({str(TINY / "model")!r}, rewards=[brief], train_dataset=rows, settings=few)
"""


def test_a_run_in_a_notebook_has_one_display_and_saves_when_it_is_interrupted(kernel: Kernel, tmp_path: Path):
    made = kernel.run("%matplotlib inline\n" + MAKE + "first = trainer()")
    assert "reward brief changes calls; it runs in worker processes" in text_of(made)
    shown = kernel.run("first.train()", interrupt_after=" step 3/300 ")
    kinds = [kind for kind, _ in shown]
    assert kinds.count("display_data") == 1
    assert kinds.count("update_display_data") >= 2
    (begun,) = (content["transient"]["display_id"] for kind, content in shown if kind == "display_data")
    changed = [content for kind, content in shown if kind == "update_display_data"]
    assert {content["transient"]["display_id"] for content in changed} == {begun}
    assert " step 3/300 " in changed[-1]["data"]["text/plain"] or " step 4/300 " in changed[-1]["data"]["text/plain"]
    assert changed[-1]["data"]["text/html"].startswith("<pre")
    assert "CPU, native engine, run" in changed[-1]["data"]["text/plain"]
    (error,) = (content for kind, content in shown if kind == "error")
    assert error["traceback"] == ["stopped: SIGINT"]
    assert "a new trainer with settings={'run.resume': 'auto', 'run.dir': 'run'} goes on" in text_of(shown)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert (saved / "hf" / "config.json").is_file()
    after = kernel.run("again = trainer(); print('at', again.state.step, first.state.step, len(calls))")
    assert f"at {int(saved.name[5:13])} {int(saved.name[5:13])} 0" in text_of(after)
    drawn = kernel.run("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert any("image/png" in content.get("data", {}) for kind, content in drawn if kind == "display_data")
    table = kernel.run("again.metrics()[['step', 'reward/mean']]")
    assert any("<table" in content["data"].get("text/html", "") for kind, content in table if kind == "execute_result")
    assert kernel.process.poll() is None


def test_a_second_interrupt_ends_the_cell_and_not_the_kernel(kernel: Kernel):
    """As where the interpreter is busy for long: the first one has set its flag and nobody looks at it."""
    code = """
import time
from grpo.system import stopping
stopping.ONE_REQUEST_SECONDS = 0.2
kept = 42
with stopping.StopRequest(None):
    for number in range(100):
        time.sleep(0.1)
        print(number)
"""
    pressed = []
    own = kernel.process.send_signal

    def twice(number: int) -> None:
        own(number)
        warm.threading.Timer(0.5, lambda: pressed.append(own(number))).start()

    kernel.process.send_signal = twice
    shown = kernel.run(code, interrupt_after="'text': '0")
    assert [content["ename"] for kind, content in shown if kind == "error"] == ["KeyboardInterrupt"]
    assert len(pressed) == 1
    assert "42" in text_of(kernel.run("print(kept)"))
    assert os.path.exists(f"/proc/{kernel.process.pid}")
