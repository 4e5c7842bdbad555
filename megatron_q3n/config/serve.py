"""Address of the serve stage."""

from pydantic import Field

from megatron_q3n.config.section import Section


class ServeConfig(Section):
    """HTTP server for OpenAI-compatible completions."""

    host: str = Field("127.0.0.1", description="0.0.0.0 listens on every network interface")
    port: int = Field(8000, ge=0, lt=65536, description="0: any free port, which is printed")
