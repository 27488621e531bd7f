"""Config: the settings of a run (sections.py, settings.py), what may not be combined, and how YAML and overrides are read."""

from grpo.config.algorithm import AlgorithmConfig
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
from grpo.config.optimizer import OptimizerConfig
from grpo.config.sections import (
    DataConfig,
    DistributedConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ModelConfig,
    PlaceConfig,
    PreflightConfig,
    RewardConfig,
    RunConfig,
    ScheduleConfig,
    ScoringConfig,
    Section,
    SourceConfig,
    TeacherConfig,
    ToolConfig,
    ToolsConfig,
    VLLMConfig,
    as_text,
)
from grpo.config.settings import (
    Config,
    Settings,
    setting_names,
)
from grpo.config.supervised import SupervisedConfig

AnyConfig = Config | SupervisedConfig
"""Of a run of either kind."""

__all__ = [
    "COLUMN_IN_BRACES",
    "OF_CHAT",
    "TASK_PREFIX",
    "AlgorithmConfig",
    "AnyConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlaceConfig",
    "PreflightConfig",
    "RewardConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "Section",
    "Settings",
    "SourceConfig",
    "SupervisedConfig",
    "TeacherConfig",
    "ToolConfig",
    "ToolsConfig",
    "VLLMConfig",
    "as_override",
    "as_text",
    "read_text",
    "read_yaml",
    "setting_names",
    "write_yaml",
]
