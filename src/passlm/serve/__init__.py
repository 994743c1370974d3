"""An OpenAI-compatible server.

`request_schema` and `requests` read requests, `worker` and `scheduler` run them in the model's
thread, `response_builder` and `responses` send the results, and `app` puts it together. `static/`
holds the web page. Imports nothing of `bench/` or `train/`.
"""
