"""Config: the settings of a run (sections.py, settings.py), what may not be combined, and how YAML and overrides are read."""

from grpo.config.combinations import (
    COLUMN_IN_BRACES,
    OF_CHAT,
    TASK_PREFIX,
)
from grpo.config.load import (
    as_override,
    read_text,
    read_yaml,
    write_yaml,
)
from grpo.config.sections import (
    AlgorithmConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PreflightConfig,
    RewardConfig,
    RunConfig,
    ScheduleConfig,
    ScoringConfig,
    Section,
    SourceConfig,
    VLLMConfig,
    as_text,
)
from grpo.config.settings import (
    Config,
    setting_names,
)

__all__ = [
    "COLUMN_IN_BRACES",
    "OF_CHAT",
    "TASK_PREFIX",
    "AlgorithmConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreflightConfig",
    "RewardConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "Section",
    "SourceConfig",
    "VLLMConfig",
    "as_override",
    "as_text",
    "read_text",
    "read_yaml",
    "setting_names",
    "write_yaml",
]
