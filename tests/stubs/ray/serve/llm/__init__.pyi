# What the example uses of ray 2.60, as ray/serve/llm/__init__.py and ray/llm/_internal/serve/core/configs/llm_config.py
# have it: a pydantic model, so that any other argument is an error when it runs.
from typing import Any

from ray.serve import Application

class LLMConfig:
    def __init__(
        self,
        *,
        model_loading_config: dict[str, Any],
        engine_kwargs: dict[str, Any] = ...,
        deployment_config: dict[str, Any] = ...,
        accelerator_type: str | None = ...,
        llm_engine: str = ...,
        runtime_env: dict[str, Any] | None = ...,
        placement_group_config: dict[str, Any] | None = ...,
    ) -> None: ...

def build_openai_app(llm_serving_args: dict[str, Any]) -> Application: ...
