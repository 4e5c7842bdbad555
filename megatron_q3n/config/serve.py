"""Settings of the serve stage: address, API key, and limits of requests."""

import ipaddress
import re

from pydantic import Field, field_validator

from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.config.section import Section

# settings of section `inference` that the serve stage uses; the others are parameters of each request
SHARED_WITH_INFERENCE = ("draft_depth", "prefill_tokens", "max_sequences", "tokenizer")


class ServeConfig(Section):
    """HTTP server for OpenAI-compatible completions and chat."""

    host: str = Field("127.0.0.1", description="0.0.0.0 listens on every network interface")
    port: int = Field(8000, ge=0, lt=65536, description="0: any free port, which is printed")
    model_name: str = Field("policy", min_length=1, description="name of the model in requests and replies")
    api_key_env: str = Field(
        "Q3N_API_KEY",
        description="environment variable with the API key. Where it is set, every request except /health needs the "
        "key (Authorization: Bearer …). Weight updates always need one. HTTP rollout engines send its value.",
    )
    max_body_mib: float = Field(16, gt=0, description="largest request body, in MiB")
    max_choices: int = Field(1024, gt=0, description="most completions of one request: prompts × n")
    max_requests: int = Field(256, gt=0, description="most requests at a time; others get status 429")
    timeout_seconds: float = Field(600, gt=0, description="longest time for one request, from its body to its reply")
    idle_timeout_seconds: float = Field(
        75, gt=0, description="connections on which no complete request arrives for this long are closed"
    )

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            # an empty name would listen on every interface
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
                raise ValueError(
                    "must be an IP address or a host name: 127.0.0.1 (this machine only), or 0.0.0.0 (every interface)"
                ) from None
        return host

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("must be the name of an environment variable, not the key itself")
        return name


def unused_inference_settings(settings: InferenceConfig) -> list[str]:
    """Return the settings of section `inference` that differ from their defaults and have no effect on a server."""
    current, defaults = settings.model_dump(), InferenceConfig().model_dump()
    return [name for name in current if current[name] != defaults[name] and name not in SHARED_WITH_INFERENCE]
