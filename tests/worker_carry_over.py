"""Several processes carry over and pass over solved questions, stopped between two updates and resumed: the same as without."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from test_carry_over import carrying, metrics_of

from grpo import Trainer
from grpo.system import distributed
from grpo.system.stopping import Stopped


def main() -> None:
    scratch = Path(sys.argv[1])
    settings: dict[str, Any] = {
        "data": {"split": "train[:12]"},
        "rollout": {"solved_share": 0.2, "solved_from": 0.25, "signal_from": "format"},
        "algorithm": {"num_minibatches": 2},
        "distributed": {"zero_stage": 2},
    }
    whole = Trainer(carrying(scratch / "whole", steps=4, **settings))
    whole.train()
    stopped = Trainer(carrying(scratch / "stopped", steps=4, **settings))
    own, calls = stopped._optimizer_step, []

    def stops(minibatch: Any) -> None:
        calls.append(1)
        if len(calls) == 4 and stopped.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        own(minibatch)

    stopped._optimizer_step = stops  # type: ignore[method-assign]
    try:
        stopped.train()
    except Stopped:
        pass
    else:
        raise AssertionError("it was not stopped")
    resumed = Trainer(carrying(scratch / "stopped", steps=4, **settings))
    assert resumed.state.step in (1, 2), resumed.state
    resumed.train()
    if resumed.processes.is_main:
        assert metrics_of(scratch / "stopped") == metrics_of(scratch / "whole")
        assert any(row.get("rollout/carried", 0) > 0 for row in metrics_of(scratch / "whole"))
        assert any(row.get("group/passed_over", 0) > 0 for row in metrics_of(scratch / "whole"))
        print("as if it had not been")
    distributed.stop()


if __name__ == "__main__":
    main()
