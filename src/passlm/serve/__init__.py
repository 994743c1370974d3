"""An OpenAI-compatible server: `schema`, `worker`, `app` and a page."""
