"""HTTP server of one model: OpenAI-compatible completions and chat, with continuous batching.

`build.py` puts it together. One thread owns the inference engine (`generation_thread.py`); the asyncio side reads and
checks requests (`requests.py`, `application.py`), and turns tokens into replies (`choices.py`, `chat_output.py`,
`replies.py`). Which parts trust what: docs/security/server.md.
"""
